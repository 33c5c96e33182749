"""What a training step will take, counted before it is taken: memory, work, and the switches that make it fit."""
