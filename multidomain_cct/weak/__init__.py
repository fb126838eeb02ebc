"""From image-level labels to pseudo-labels."""
