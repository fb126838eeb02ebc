"""Floor 4: what a run is worth and what it sees."""
