"""The closed-form translator: from two text encoders and prompts to an adapter, without training."""
