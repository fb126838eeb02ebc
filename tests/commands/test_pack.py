"""What `pack` and `domains` say, to a person and into a pipe."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from multidomain_cct.__main__ import main
from multidomain_cct.files.lock import locked

YARD = """\
layout: folder
splits:
  train: {images: photos/train/*, masks: masks/train/*}
  val: {images: photos/val/*, masks: masks/val/*}
classes:
  - {name: grass, color: [80, 180, 70]}
  - {name: cat, color: [220, 60, 60], thing: true}
"""


@pytest.fixture
def yard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a domain of two classes and no pictures."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "domains").mkdir()
    (tmp_path / "domains/yard.yaml").write_text(YARD)
    return tmp_path


def draw(split: str, name: str, ids: np.ndarray, seed: int) -> None:
    for folder in ("photos", "masks"):
        (Path("raw") / folder / split).mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(f"raw/photos/{split}/{name}.jpg")
    Image.fromarray(ids.astype(np.uint8)).save(f"raw/masks/{split}/{name}.png")


def packed(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The warnings of a packing."""
    assert main(["pack", "yard", "--raw", "raw", "--workers", "1"]) == 0
    errors = capsys.readouterr().err.splitlines()
    return [line.removeprefix("warning: ") for line in errors if line.startswith("warning: ")]


HALVES = np.repeat([[0, 1]], 8, axis=0).repeat(4, axis=1)


def test_good_labels_pass_without_a_warning(yard: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw("train", "a", HALVES, 0)
    draw("val", "b", HALVES, 1)
    assert packed(capsys) == []


def test_labels_that_teach_nothing_are_said_by_split(yard: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw("train", "a", HALVES * 255, 0)
    draw("val", "b", HALVES, 1)
    said = packed(capsys)
    assert any(line.startswith("yard/train: masks seem to hold 0 and 255 only") for line in said)
    assert any(line.startswith('yard/train: no pixel of the class "cat"') for line in said)
    assert not any(line.startswith("yard/val") for line in said)


def test_images_in_train_and_val_are_named_as_a_person_names_them(
    yard: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(3):
        draw("train", f"a{number}", HALVES, number)
    draw("val", "Foto ü 1", HALVES, 1)
    draw("val", "b", HALVES, 9)
    (line,) = packed(capsys)
    assert line.startswith("yard: 1 of 2 images of val are also in train, so its scores are too high: Foto ü 1.")


def test_files_that_are_not_read_as_images_are_counted(yard: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw("train", "a", HALVES, 0)
    Path("raw/photos/train/b.heic").touch()
    main(["pack", "yard", "--raw", "raw", "--workers", "1", "--split", "train"])
    assert "left out, as they are not images that can be read: 1 .heic" in capsys.readouterr().out


def test_a_second_packing_into_a_folder_ends_at_once_and_the_first_goes_on(
    yard: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    draw("train", "a", HALVES, 0)
    words = ["pack", "yard", "--raw", "raw", "--workers", "1", "--split", "train"]
    with locked(Path("data/shards/yard"), "packing"):
        # Another process: locks do not keep a process from itself.
        second = subprocess.run([sys.executable, "-m", "multidomain_cct", *words], capture_output=True, text=True)
    assert second.returncode == 2
    (line,) = second.stderr.splitlines()
    assert line.startswith("error: data/shards/yard is in use by process ")
    assert "(packing)" in line
    assert main(words) == 0


def test_domains_cuts_nothing_in_a_pipe(yard: Path, capsys: pytest.CaptureFixture[str]) -> None:
    title = "A title of many words " * 20
    (yard / "domains/yard.yaml").write_text(f"title: {title}\n{YARD}")
    assert main(["domains"]) == 0
    (row,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("yard"))
    assert title.strip() in row
    assert row.rstrip().endswith("domains/yard.yaml")


def test_domains_lists_thousands(yard: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(2000):
        (yard / f"domains/d{number}.yaml").write_text(
            "layout: voc\nsplits: [train]\nclasses: [{name: a, color: [0, 0, 0]}]"
        )
    assert main(["domains"]) == 0
    assert sum(line.startswith("d") for line in capsys.readouterr().out.splitlines()) >= 2000
