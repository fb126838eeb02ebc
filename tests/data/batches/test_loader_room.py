"""Loader processes on a machine with little shared memory, or few open files."""

from __future__ import annotations

import os
import resource
from types import SimpleNamespace

import pytest

from multidomain_cct.data.batches.loader_room import require_room
from multidomain_cct.errors import UserError


def free(monkeypatch: pytest.MonkeyPatch, num_bytes: int) -> None:
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_bavail=num_bytes, f_frsize=1))


def files(monkeypatch: pytest.MonkeyPatch, soft: int, hard: int) -> list[tuple[int, int]]:
    """Sets the limits of this process, and returns the list of those that are asked for."""
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: (soft, hard))
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: asked.append(limits))
    return asked


def test_too_little_shared_memory_is_one_line_with_the_bytes_and_what_to_change(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    free(monkeypatch, 599)
    with pytest.raises(UserError) as error:
        require_room([60, 40], workers=2, prefetch=2)
    for part in ("need 600 bytes", "599 free", "data.workers", "data.prefetch", "--shm-size=1g"):
        assert part in str(error.value)
    free(monkeypatch, 600)
    require_room([60, 40], workers=2, prefetch=2)
    free(monkeypatch, 0)
    require_room([60, 40], workers=0, prefetch=2)


def test_the_processes_of_a_machine_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    free(monkeypatch, 3 * 2**30 - 1)
    with pytest.raises(UserError, match="for 4 processes.*--shm-size=8g"):
        require_room([2**28], workers=1, prefetch=1)


def test_a_machine_without_such_a_folder_is_not_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("multidomain_cct.data.batches.loader_room.SHARED_MEMORY", "/nowhere/shm")
    require_room([2**50], workers=1, prefetch=1)


def test_few_open_files_are_one_line_unless_more_may_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = files(monkeypatch, 32, 32)
    with pytest.raises(UserError, match=r"32 may be. Allow more: ulimit -n 1024; or set data.workers=0"):
        require_room([1] * 4, workers=2, prefetch=2)
    require_room([1] * 4, workers=0, prefetch=2)
    assert asked == []
    for hard in (4096, resource.RLIM_INFINITY):
        asked = files(monkeypatch, 32, hard)
        require_room([1] * 4, workers=2, prefetch=2)
        ((soft, same),) = asked
        assert soft > 32
        assert same == hard
    asked = files(monkeypatch, resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    require_room([1] * 4, workers=2, prefetch=2)
    assert asked == []
