"""Shards -> what a training step or an evaluation sees."""
