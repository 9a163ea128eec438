"""What the probes measure, apart from their command lines: modules here know checkpoints and reports know them."""
