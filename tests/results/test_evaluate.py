import errno
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from torch.utils.data import get_worker_info

from multidomain_cct.__main__ import main
from multidomain_cct.data.batches import loader
from multidomain_cct.data.batches.loader import decode
from multidomain_cct.errors import UserError
from multidomain_cct.results.evaluate import evaluate, scores_as_json
from multidomain_cct.results.trained_run import TrainedRun
from multidomain_cct.training.runlog import read_metrics


def test_the_command_finds_the_scores_that_training_logged(tiny_run: Path) -> None:
    run = TrainedRun.load(tiny_run)
    logged = [line for line in read_metrics(tiny_run / "metrics.jsonl") if "val/mean_miou" in line][-1]
    answer = scores_as_json(run, evaluate(run, [], None))
    assert answer["mean_miou"] == logged["val/mean_miou"]
    assert answer["step"] == logged["step"]
    for name, domain in answer["domains"].items():
        assert domain["miou"] == logged[f"val/{name}/miou"]
        assert all(iou == logged[f"val/{name}/iou/{label}"] for label, iou in domain["iou"].items())


def test_scores_are_printed_before_they_are_written(
    tiny_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def read_only(path: Path, text: str) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr("multidomain_cct.results.evaluate.replace_text", read_only)
    assert main(["evaluate", str(tiny_run), "--domain", "shapes"]) == 1
    printed = capsys.readouterr()
    assert "mIoU" in printed.out
    assert printed.err.count("\n") == 1
    assert "Read-only file system" in printed.err


def test_a_loader_process_that_is_killed_is_said_to_be_one(
    tiny_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def killed(*arguments: object) -> object:
        if get_worker_info() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return decode(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(loader, "decode", killed)
    assert main(["evaluate", str(tiny_run), "--domain", "shapes"]) == 1
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("error: a loader process died: DataLoader worker (pid")
    assert "memory" in line


def test_any_labelled_split_and_one_domain_can_be_scored(tiny_run: Path) -> None:
    (result,) = evaluate(TrainedRun.load(tiny_run), ["shapes"], "train")
    assert (result.domain.name, result.split, result.images) == ("shapes", "train", 6)


def test_what_the_command_line_asks_for_replaces_the_recipe(tiny_run: Path) -> None:
    run = TrainedRun.load(tiny_run)
    assert run.settings() == run.recipe.evaluation
    assert run.settings(window=[64, 64], scales=[0.5, 1.0], flip=True) == replace(
        run.recipe.evaluation, window=[64, 64], scales=[0.5, 1.0], flip=True
    )


def test_a_domain_without_val_split_is_left_out_or_asked_for(
    tiny_training: Callable[..., Path], tmp_path: Path
) -> None:
    domains = {"fields": {"labelled": "2"}, "shapes": {"labelled": "2", "val_split": ""}}
    run = TrainedRun.load(tiny_training(tmp_path, "half", domains=domains))
    assert [result.domain.name for result in evaluate(run, [], None)] == ["fields"]
    with pytest.raises(UserError, match="gives shapes no val_split.*--split"):
        evaluate(run, ["shapes"], None)
    assert evaluate(run, ["shapes"], "val")[0].images == 3
    with pytest.raises(UserError, match='no head for the domain "shape".*Did you mean "shapes"'):
        evaluate(run, ["shape"], "val")


def test_shards_may_have_moved(tiny_run: Path, tmp_path: Path) -> None:
    run = TrainedRun.load(tiny_run)
    moved = shutil.copytree(run.recipe.data.shards, tmp_path / "moved")
    gone = replace(run, recipe=replace(run.recipe, data=replace(run.recipe.data, shards=str(tmp_path / "gone"))))
    with pytest.raises(UserError, match="has no val shards"):
        evaluate(gone, [], None)
    assert len(evaluate(gone, [], None, shards=moved)) == 2
