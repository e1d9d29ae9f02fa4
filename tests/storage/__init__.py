"""S3 under faults: what is read, copied and written through a network that breaks."""
