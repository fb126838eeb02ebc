"""A process that keeps the memory it frees is not given new pages for the next tensor."""

import platform
import runpy
import subprocess
import sys

import pytest

from multidomain_cct.commands.kept_memory import keep_freed_memory

PAGES_TAKEN = """
import resource, sys
import torch
from multidomain_cct.commands.kept_memory import keep_freed_memory

if sys.argv[1] == "keep":
    assert keep_freed_memory()

def use():
    torch.empty(64 * 2**20, dtype=torch.uint8).fill_(1)

for _ in range(20):
    use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    use()
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) * resource.getpagesize())
"""


def bytes_taken(which: str) -> int:
    """From the system, by tensors of 640 MiB in all, one after the other."""
    return int(
        subprocess.run([sys.executable, "-c", PAGES_TAKEN, which], capture_output=True, text=True, check=True).stdout
    )


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc, whose setting this is")
def test_memory_that_was_freed_is_used_again() -> None:
    assert bytes_taken("keep") < 2**20
    assert bytes_taken("return") > 2**29


def test_it_says_so_where_it_cannot_be_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.libc_ver", lambda: ("", ""))
    assert not keep_freed_memory()


def test_the_program_keeps_what_it_frees(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[bool] = []
    monkeypatch.setattr("multidomain_cct.commands.kept_memory.keep_freed_memory", lambda: kept.append(True))
    monkeypatch.setattr(sys, "argv", ["multidomain_cct", "--version"])
    monkeypatch.delitem(sys.modules, "multidomain_cct.__main__", raising=False)
    with pytest.raises(SystemExit):
        runpy.run_module("multidomain_cct", run_name="__main__")
    assert kept
