"""B26: nothing that a person runs on local data tries to reach a network."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from multidomain_cct.__main__ import main

SPEC = """
name: yard
layout: folder
splits:
  train: {images: images/*.jpg, masks: masks/*.png}
  more: {images: more/*.jpg}
classes:
  - {name: grass, color: [0, 200, 0], ids: [0]}
  - {name: cat, color: [200, 0, 0], ids: [4], thing: true}
"""
RECIPE = (
    "domains: {yard: {labelled: 2, unlabelled_splits: [more], val_split: train}}\n"
    "data: {crop: [32, 32], labelled_batch: 2, unlabelled_batch: 2, workers: 1}\n"
    "encoder: {name: test_resnet, context: fpn, width: 32}\ndecoder: bilinear\ntraining: {steps: 2}\n"
)


@pytest.fixture
def attempts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What tries to reach a network, which fails.

    Sockets inside the machine (AF_UNIX), by which processes hand each other tensors, work.
    """
    found: list[str] = []

    def blocked(name: str) -> Callable[..., Any]:
        real = getattr(socket.socket, name)

        def call(self: socket.socket, address: Any, *rest: Any) -> Any:
            if self.family == socket.AF_UNIX:
                return real(self, address, *rest)
            found.append(f"{name} {address}")
            raise OSError(f"no network: {address}")

        return call

    def lookup(host: Any, *rest: Any, **options: Any) -> Any:
        found.append(f"look-up of {host}")
        raise OSError(f"no network: {host}")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, blocked(name))
    for name in ("getaddrinfo", "gethostbyname", "gethostbyname_ex"):
        monkeypatch.setattr(socket, name, lookup)
    return found


def test_b26_the_commands_reach_for_no_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, attempts: list[str], record_property: Callable[[str, object], None]
) -> None:
    rng = np.random.default_rng(0)
    for folder in ("raw/images", "raw/masks", "raw/more", "domains"):
        (tmp_path / folder).mkdir(parents=True)
    for number in range(4):
        for folder in ("images", "more"):
            Image.fromarray(rng.integers(0, 255, (48, 64, 3), dtype=np.uint8)).save(
                tmp_path / f"raw/{folder}/{number}.jpg"
            )
        Image.fromarray(rng.choice([0, 4], (48, 64)).astype(np.uint8)).save(tmp_path / f"raw/masks/{number}.png")
    (tmp_path / "domains/yard.yaml").write_text(SPEC)
    (tmp_path / "yard.yaml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OSError, match="no network"):
        socket.create_connection(("localhost", 9))
    assert len(attempts) == 1, "the block itself works"
    attempts.clear()
    shard = "data/shards/yard/train-00000.tar"
    commands = (
        ["domains"],
        ["pack", "yard", "--raw", "raw", "--workers", "1"],
        ["index", shard],
        ["yard.yaml"],
        ["yard.yaml", "training.steps=3", "name=longer"],
        ["evaluate", "runs/yard", "--split", "train"],
        ["predict", "runs/yard", "--domain", "yard", "--out", "out", "raw/more"],
        ["report", "runs/yard", "runs/longer", "--out", "both.html"],
        ["smoothness", "runs/yard", "--domain", "yard", "--split", "train", "--out", "smooth.png"],
    )
    for words in commands:
        assert main(words) == 0, words
    assert attempts == []
    record_property("B26", f"{len(commands)} commands, 0 attempts")
