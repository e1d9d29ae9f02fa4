"""What Karpenter's KWOK provider can buy: instance types of the real names, sizes and prices."""

from __future__ import annotations

from collections.abc import Iterable

from tests.cluster.api import Object

ZONES = ("us-east-2a", "us-east-2b")

# name: (vCPUs, memory MiB, GPUs, EFA interfaces, on-demand dollars an hour), of Karpenter's AWS provider's tables
TYPES: dict[str, tuple[int, int, int, int, float]] = {
    "p5en.48xlarge": (192, 2097152, 8, 16, 63.296),
    "p5.48xlarge": (192, 2097152, 8, 32, 55.04),
    "g6e.12xlarge": (48, 393216, 4, 1, 10.4926),
}
SPOT_SHARE = 0.4  # of the on-demand price; made up, only the order matters
CAPACITY_TYPES = ("spot", "on-demand")


def instance_types(capacity_types: Iterable[str] = CAPACITY_TYPES) -> list[Object]:
    """The provider's file, as JSON values; every type is offered in every zone."""
    return [
        {
            "name": name,
            "architecture": "amd64",
            "operatingSystems": ["linux"],
            "resources": {
                "cpu": str(cpus),
                "memory": f"{memory}Mi",
                "ephemeral-storage": "30Ti",
                "pods": "100",
                "nvidia.com/gpu": str(gpus),
                "vpc.amazonaws.com/efa": str(interfaces),
            },
            "offerings": [_offering(zone, capacity_type, price) for zone in ZONES for capacity_type in capacity_types],
        }
        for name, (cpus, memory, gpus, interfaces, price) in TYPES.items()
    ]


def _offering(zone: str, capacity_type: str, price: float) -> Object:
    labels = {"karpenter.sh/capacity-type": capacity_type, "topology.kubernetes.io/zone": zone}
    return {
        "Price": round(price * (SPOT_SHARE if capacity_type == "spot" else 1), 3),
        "Available": True,
        "Requirements": [{"key": key, "operator": "In", "values": [value]} for key, value in labels.items()],
    }
