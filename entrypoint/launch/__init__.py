"""Starting a node's ranks and returning their one verdict."""
