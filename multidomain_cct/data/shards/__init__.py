"""Tar shards and their indexes, on a disk or at an address. Nothing here knows a domain."""
