"""Processes that fail, and processes that are asked to stop."""
