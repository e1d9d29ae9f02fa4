"""Steps, losses, evaluation and checkpoints: TRL's trainers over logged groups."""
