"""metrics.jsonl and the sums behind it."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from multidomain_cct.training.runlog import RunLog, Window, environment, read_metrics


def test_metrics_are_lines_of_json_in_which_nothing_is_infinite(tmp_path: Path) -> None:
    with RunLog(tmp_path, first_step=0, num_steps=2) as log:
        log.metrics(1, {"a": 0.5, "b": math.nan, "c": math.inf, "d": None})
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "a": 0.5, "b": None, "c": None, "d": None}]


def test_a_resumed_run_drops_what_was_logged_after_its_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = ['{"step": 1}', '{"step": 2}', '{"step": 2, "val/mean_miou": 0.5}', '{"step": 3}', '{"ste']
    path.write_text("\n".join(lines))
    with RunLog(tmp_path, first_step=2, num_steps=4):
        pass
    assert read_metrics(path) == [{"step": 1}, {"step": 2}, {"step": 2, "val/mean_miou": 0.5}]
    with RunLog(tmp_path, first_step=2, num_steps=4, scored=False):
        pass
    assert read_metrics(path) == [{"step": 1}, {"step": 2}]


def test_only_the_first_process_logs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with RunLog(tmp_path, first_step=0, num_steps=2, enabled=False) as log:
        log.metrics(1, {"a": 1.0})
        log.notice("hello")
        log.advance(1, "text", plain=True)
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out == ""


def test_progress_is_a_plain_line_outside_a_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with RunLog(tmp_path, first_step=0, num_steps=9) as log:
        log.advance(3, "[a] 1.0", plain=True)
        log.advance(4, "hidden", plain=False)
        log.notice("a\x07b")
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("step 3/9  ETA ")
    assert printed[0].endswith("[a] 1.0")
    assert printed[1:] == ["a\\x07b"]


def test_a_window_averages_each_loss_over_the_micro_batches_that_have_it() -> None:
    window = Window(world=2)
    window.add({"a/supervised": 1.0, "b/supervised": 4.0}, 3)
    window.add({"a/supervised": 2.0}, 3)
    metrics = window.metrics(torch.device("cpu"))
    assert metrics["train/a/supervised"] == 1.5
    assert metrics["train/b/supervised"] == 4.0
    assert window.images == 12
    assert "a sup 1.500 | b sup 4.000" in window.text(torch.device("cpu"))


def test_the_environment_names_command_and_versions() -> None:
    found = environment("train x", torch.device("cpu"), 2)
    assert found["command"] == "train x"
    assert found["processes"] == 2
    assert {"multidomain_cct", "torch"} <= found["versions"].keys()
