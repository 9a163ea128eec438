"""Model families. Each knows itself and nothing of the training loop."""
