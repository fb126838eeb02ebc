"""B25: names of images and samples lead out of no folder, into no terminal and into no page."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tars import write_tar

from multidomain_cct.__main__ import main
from multidomain_cct.commands.terminal import complain, say
from multidomain_cct.data.shards.index import ShardIndex, index_path
from multidomain_cct.data.shards.scan import index_shard
from multidomain_cct.data.shards.writer import ShardWriter
from multidomain_cct.errors import UserError
from multidomain_cct.files.printable import printable
from multidomain_cct.training.runlog import RunLog

KEYS = (
    "../a",
    "/etc/a",
    "a/../../b",
    "nul\0nul",
    "k" * 300,
    "esc\x1b[2J\x1b]0;title\x07",
    "red [bold red]x[/] [/nothing]",
    "<script>alert(1)",
    "{{7*7}}",
    "\u202ecod",
    "line\nbreak",
)
"""What somebody may call a sample."""


def picture(kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 2, (72, 96), dtype=np.uint8)).convert("L").save(buffer, kind)
    return buffer.getvalue()


def tar_of(path: Path, key: str) -> Path:
    """A shard of one sample."""
    return write_tar(path, [(f"{key}.jpg", picture("JPEG")), (f"{key}.png", picture("PNG"))])


@pytest.mark.parametrize("key", KEYS)
def test_b25_a_key_is_refused_by_the_index_or_is_a_name_that_can_do_no_harm(tmp_path: Path, key: str) -> None:
    path = tar_of(tmp_path / "train-00000.tar", key)
    try:
        (found,) = index_shard(path).keys
    except UserError as error:
        assert str(error).isprintable()
        return
    assert found.isprintable()
    assert not found.startswith("/")
    assert ".." not in found.split("/")
    assert len(found) <= 240


def test_b25_an_index_from_elsewhere_cannot_bring_in_other_keys(tmp_path: Path) -> None:
    path = tar_of(tmp_path / "train-00000.tar", "good")
    replace(index_shard(path), keys=("esc\x1b[2J",)).save(index_path(path))
    with pytest.raises(UserError, match="the index holds keys with control characters") as error:
        ShardIndex.load(index_path(path))
    assert str(error.value).isprintable()


def file_names() -> list[str]:
    """The keys that a disk can hold as file names."""
    return [key.replace("/", "_").replace("\0", "_")[:200] for key in KEYS] + ["caf\udce9"]


class Page(HTMLParser):
    """The tags of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.scripts: list[str] = []
        self._inside = False

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self._inside = tag == "script"

    def handle_endtag(self, tag: str) -> None:
        self._inside = False

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.scripts.append(data)


def test_b25_predictions_stay_in_their_folder_and_print_nothing_raw(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], record_property: Callable[[str, object], None]
) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    for number, name in enumerate(file_names()):
        # Every other one cannot be read, and is complained of by name.
        Path(os.fsdecode(os.fsencode(str(source)) + b"/" + os.fsencode(name + ".jpg"))).write_bytes(
            picture("JPEG") if number % 2 else b"none"
        )
    before = {path for path in tmp_path.rglob("*") if out not in path.parents and path != out}
    assert main(["predict", str(tiny_run), "--domain", "fields", "--out", str(out), str(source)]) == 1
    said = "".join(capsys.readouterr())
    assert said.replace("\n", "").isprintable()
    assert "Traceback" not in said
    assert {path for path in tmp_path.rglob("*") if out not in path.parents and path != out} == before
    written = len(list((out / "index").iterdir()))
    assert written == len(file_names()) // 2
    record_property(
        "B25",
        f"{len(KEYS)} keys: refused or harmless; {written} predictions, 0 outside the folder; 0 unescaped characters "
        "printed or in a report",
    )


def test_b25_a_report_shows_names_as_text(tiny_training: Callable[..., Path], tmp_path: Path) -> None:
    run = tiny_training(tmp_path)
    keys = [key for key in KEYS if key.isprintable() and len(key) < 240 and ".." not in key and not key.startswith("/")]
    folder = tmp_path / "shards/fields"
    for path in folder.glob("val-*"):
        path.unlink()
    with ShardWriter(folder, "val") as writer:
        for key in keys:
            writer.write(key, image=picture("JPEG"), mask=picture("PNG"), meta=b"{}")
    assert keys
    assert main(["report", str(run), "--out", str(tmp_path / "report.html")]) == 0
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    page = Page()
    page.feed(text)
    assert "&lt;script&gt;alert(1)" in text
    assert not any("alert" in script for script in page.scripts)
    assert "\x1b" not in text
    assert "[bold red]x[/]" in text


@pytest.mark.parametrize("key", KEYS)
def test_b25_the_terminal_and_the_log_show_any_name_and_never_fail(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], key: str
) -> None:
    complain(f"{key}: trouble")
    say(f"{key}: fine")
    out, err = capsys.readouterr()
    assert "\x1b" not in out + err
    assert "\0" not in out + err
    assert "\u202e" not in out + err
    assert printable(key).replace("\n", "").isprintable()
    with RunLog(tmp_path, 0, 1) as log:
        log.notice(f"step 1: loss is nan; keys {key}")
        log.metrics(1, {f"train/{key}": 1.0})
    assert capsys.readouterr().out.replace("\n", "").isprintable()
