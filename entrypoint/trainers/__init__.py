"""TRL's trainers over logged groups: the losses, options and metrics are TRL's, what feeds them is ours."""
