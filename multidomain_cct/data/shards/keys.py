"""Names of samples as a person writes them, and as members of a tar, whose keys end at the first dot."""

from __future__ import annotations

import re


def escape_key(name: str) -> str:
    """The name with ASCII letters, digits, - and _ kept and every other byte as =XX. Different names differ."""
    # surrogateescape: a file name on Linux need not be UTF-8.
    content = name.encode("utf-8", "surrogateescape")
    return re.sub(rb"[^A-Za-z0-9_-]", lambda byte: b"=%02X" % ord(byte[0]), content).decode("ascii")


def unescape_key(key: str) -> str:
    """The name that `escape_key` wrote as `key`; any other key, such as one of a foreign shard, as it is.

    A name that could leave a folder or control a terminal stays escaped.
    """
    if "=" not in key:
        return key
    content = re.sub(rb"=([0-9A-F]{2})", lambda code: bytes.fromhex(code[1].decode()), key.encode())
    name = content.decode("utf-8", "surrogateescape")
    leaves = name.startswith("/") or ".." in name.split("/")
    return name if escape_key(name) == key and name.isprintable() and not leaves else key
