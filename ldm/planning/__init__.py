"""Memory and work of a training step, counted before it is taken, and the switches that make it fit."""
