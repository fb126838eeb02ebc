"""metrics.jsonl and the sums behind it."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from multidomain_cct.training.runlog import RunLog, Window, environment, read_metrics

CPU = torch.device("cpu")


def test_metrics_are_lines_of_json_in_which_nothing_is_infinite(tmp_path: Path) -> None:
    with RunLog(tmp_path, 0, 2) as log:
        log.metrics(1, {"a": 0.5, "b": math.nan, "c": math.inf, "d": None})
    (line,) = read_metrics(tmp_path / "metrics.jsonl")
    assert line.pop("sys/wall_s") >= 0
    assert line == {"step": 1, "a": 0.5, "b": None, "c": None, "d": None}


def test_a_resumed_run_drops_what_was_logged_after_its_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = ['{"step": 1}', '{"step": 2}', '{"step": 2, "val/mean_miou": 0.5}', '{"step": 3}', '{"ste']
    path.write_text("\n".join(lines))
    with RunLog(tmp_path, 2, 4):
        pass
    assert read_metrics(path) == [{"step": 1}, {"step": 2}, {"step": 2, "val/mean_miou": 0.5}]
    with RunLog(tmp_path, 2, 4, scored=False):
        pass
    assert read_metrics(path) == [{"step": 1}, {"step": 2}]


def test_only_the_first_process_logs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with RunLog(tmp_path, 0, 2, enabled=False) as log:
        log.metrics(1, {"a": 1.0})
        log.notice("hello")
        log.advance(1, Window(1), CPU, plain=True)
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out == ""


def test_progress_is_a_plain_line_outside_a_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with RunLog(tmp_path, 0, 9) as log:
        window = Window(1)
        window.add({"[a]/supervised": 1.0}, 2)
        log.advance(3, window, CPU, plain=True)
        log.advance(4, window, CPU, plain=False)
        log.notice("a\x07b")
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("step 3/9  ETA ")
    assert printed[0].endswith("MiB  [a] sup 1.000")
    assert printed[1:] == ["a\\x07b"]


def test_a_window_averages_each_loss_over_the_micro_batches_that_have_it() -> None:
    window = Window(world=2)
    window.add({"a/supervised": 1.0, "b/supervised": 4.0}, 3)
    window.add({"a/supervised": 2.0}, 3)
    metrics = window.metrics(CPU)
    assert metrics["train/a/supervised"] == 1.5
    assert metrics["train/b/supervised"] == 4.0
    assert window.images == 12
    assert "a sup 1.500 | b sup 4.000" in window.text(CPU)


def test_the_progress_line_shows_every_domain_in_the_width_there_is() -> None:
    window = Window(1)
    names = ("cityscapes", "camvid", "sun_rgbd", "pascal_voc")
    window.add({f"{name}/{loss}": 0.25 for name in names for loss in ("supervised", "consistency")}, 8)
    texts = [window.text(CPU, width) for width in (300, 150, 80, 49)]
    for text, width in zip(texts, (300, 150, 80, 49), strict=True):
        assert len(text) <= width
        assert all(name[:4] in text for name in names)
    assert "img/s" in texts[0]
    assert "cityscapes sup 0.250 con 0.250" in texts[1]
    assert "cityscapes 0.500" in texts[2]
    assert "0.50" in texts[3]


@pytest.mark.parametrize("damage", [b"", b"\xff\xfe", b"[1]\n{}\n3\n", b'{"step": "x"}', b'{"step": 1'])
def test_damaged_metrics_are_left_out(tmp_path: Path, damage: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(damage + b'\n{"step": 2}\n')
    assert read_metrics(path) == [{"step": 2}]
    assert read_metrics(tmp_path / "absent.jsonl") == []


def test_the_environment_names_command_and_versions() -> None:
    found = environment("train x", CPU, 2)
    assert found["command"] == "train x"
    assert found["processes"] == 2
    assert {"multidomain_cct", "torch"} <= found["versions"].keys()
