"""Durable files, strict YAML, printable text and seeds."""
