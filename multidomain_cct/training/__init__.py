"""Floor 3: from a recipe to a trained run."""
