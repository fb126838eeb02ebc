"""The commands, one file for each thing a person runs.

Each has `register`, which adds its words to the parser, and `run`.
"""
