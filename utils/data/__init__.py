"""From files on disk to micro-batches."""
