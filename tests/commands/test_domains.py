"""`domains new` writes a file that packs the folder, and nothing over an existing one."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from multidomain_cct.__main__ import main


@pytest.fixture
def raw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of photographs with YOLO's polygons, in the working directory."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "my photos"
    for split in ("train", "val"):
        for kind in ("images", "labels"):
            (folder / split / kind).mkdir(parents=True)
        Image.new("RGB", (20, 10), (90, 120, len(split))).save(folder / split / "images/a.jpg")
        (folder / split / "labels/a.txt").write_text("0 0 0 0.5 0 0.5 1 0 1\n")
    (folder / "data.yaml").write_text("names: [cat]\n")
    return folder


def test_a_first_file_is_written_and_the_next_command_packs_it(raw: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["domains", "new", "yard", "--raw", str(raw)]) == 0
    said = capsys.readouterr().out
    assert "2 classes: background, cat" in said
    assert f"pack yard --raw '{raw}'\n" in said
    assert main(["pack", "yard", "--raw", str(raw), "--workers", "1"]) == 0
    packed = capsys.readouterr()
    assert packed.out.count("50.00 %") == 4
    assert "error" not in packed.err


def test_a_file_elsewhere_is_packed_with_its_folder(raw: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["domains", "new", "yard", "--raw", str(raw), "--out", "files/yard.yaml"]) == 0
    assert f"pack yard --raw '{raw}' --domains files\n" in capsys.readouterr().out
    assert Path("files/yard.yaml").is_file()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["new", "yard"], "domains new yard: write `domains` for a list, or `domains new NAME --raw DIR"),
        (["mew", "yard", "--raw", "x"], "domains mew yard: write `domains`"),
        (["--raw", "x"], "domains with --raw or --out: write `domains`"),
        (["new", "my yard", "--raw", "x"], "domains new: NAME is 'my yard'; a name starts with a letter"),
        (["new", "yard", "--raw", "absent"], "--raw: absent: there is no such folder"),
        (
            ["new", "yard", "--raw", "my photos", "--out", "garden.yaml"],
            "--out: garden.yaml: a domain's file has its name",
        ),
        (["new", "old", "--raw", "my photos"], "domains/old.yaml: exists already. Remove it, or give another NAME"),
    ],
)
def test_what_cannot_be_written_is_one_line(
    raw: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    Path("domains").mkdir()
    Path("domains/old.yaml").write_text("kept")
    assert main(["domains", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert Path("domains/old.yaml").read_text() == "kept"
    assert sorted(Path("domains").iterdir()) == [Path("domains/old.yaml")]
