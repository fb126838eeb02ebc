"""Two toy domains, drawn on the spot."""
