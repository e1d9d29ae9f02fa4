"""What can be known before GPU nodes are asked for."""
