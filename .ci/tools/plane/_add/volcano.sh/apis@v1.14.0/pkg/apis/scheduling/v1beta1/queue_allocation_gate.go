package v1beta1

// QueueAllocationGateKey is what volcano v1.15.0 wants of its apis module. The release of that module that has it is
// not to be had from Go's proxy; v1.14.0 lacks nothing else.
const QueueAllocationGateKey = GroupName + "/queue-allocation-gate"
