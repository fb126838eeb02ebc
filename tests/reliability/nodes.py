"""Two nodes on one machine: network namespaces with an address each and a cable between them.

Where the system permits none, the loopback stands for both.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

ADDRESSES = ("10.77.0.1", "10.77.0.2")
"""Seen by the two namespaces alone, whatever the machine's own networks are."""


@dataclass(frozen=True)
class Node:
    """Where a launcher of a run in several nodes is started."""

    address: str
    interface: str
    """The network interface that has the address, for gloo: by itself it looks for the address of the machine's name,
    which a namespace does not have.
    """
    words: tuple[str, ...] = ()
    """What stands before a command for it to run on the node."""


LOOPBACK = Node("127.0.0.1", "lo")


@contextmanager
def two_nodes() -> Iterator[tuple[Node, Node, str]]:
    """Two nodes, and what they are in a few words.

    A namespace lasts as long as its processes, and the cable as long as a namespace. The one process of each that this
    starts ends with its input, so that nothing is left even when the tests are killed.
    """
    with ExitStack() as opened:
        nodes = _namespaces(opened)
        if nodes is not None:
            yield *nodes, "two network namespaces"
        else:
            yield LOOPBACK, LOOPBACK, "two launchers on the loopback (no network namespaces here)"


def _namespaces(opened: ExitStack) -> tuple[Node, Node] | None:
    """Two connected namespaces; None where the system permits none, or lacks the programs.

    Whoever is not root becomes it inside a namespace of users.
    """
    user = os.geteuid() != 0
    first = _holder(opened, ["unshare", *(["--map-root-user"] if user else []), "--net"])
    if first is None:
        return None
    inside = _entering(first, user)
    second = _holder(opened, [*inside, "unshare", "--net"])
    if second is None:
        return None
    enter = (inside, _entering(second, user))
    commands = [[*inside, "ip", "link", "add", "cable", "type", "veth", "peer", "name", "cable", "netns", str(second)]]
    for words, address in zip(enter, ADDRESSES, strict=True):
        commands.append([*words, "ip", "address", "add", f"{address}/24", "dev", "cable"])
        # What a node sends to its own address goes through its loopback.
        commands += [[*words, "ip", "link", "set", interface, "up"] for interface in ("lo", "cable")]
    try:
        for command in commands:
            subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return Node(ADDRESSES[0], "cable", enter[0]), Node(ADDRESSES[1], "cable", enter[1])


def _holder(opened: ExitStack, words: list[str]) -> int | None:
    """The id of a process that holds a new namespace until `opened` is closed; None when it could not be made."""
    try:
        # The namespace is there when the first line comes.
        process = subprocess.Popen(
            [*words, "sh", "-c", "echo; exec cat"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
    except OSError:
        return None
    opened.enter_context(process)
    assert process.stdout is not None
    return process.pid if process.stdout.readline() else None


def _entering(pid: int, user: bool) -> tuple[str, ...]:
    """What stands before a command that is to run where a process is.

    It becomes the command: the id of the process stays.
    """
    return (
        "nsenter",
        f"--net=/proc/{pid}/ns/net",
        *((f"--user=/proc/{pid}/ns/user", "--preserve-credentials") if user else ()),
    )
