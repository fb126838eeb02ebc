"""Recipes x seeds, and the tables of their scores."""
