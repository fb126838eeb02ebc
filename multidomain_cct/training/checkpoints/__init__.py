"""What a run saves, and what it begins with."""
