"""From raw folders to batches."""
