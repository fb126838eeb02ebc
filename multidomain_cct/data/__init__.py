"""Floor 1: from raw folders to batches."""
