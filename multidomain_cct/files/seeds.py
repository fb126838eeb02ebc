"""Seeds derived from names."""

from __future__ import annotations

import hashlib


def seed_from(*parts: int | str) -> int:
    """A 63-bit seed that depends on the parts only, not on PYTHONHASHSEED, platform or library version."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1
