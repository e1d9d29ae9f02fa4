"""Real servers for the tests, each over a loopback socket and ended by its own process id."""
