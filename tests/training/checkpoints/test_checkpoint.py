"""Checkpoints of a tiny model. Crashes, damage and full disks are in tests/reliability (B1, B9 to B12, B15)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from multidomain_cct.errors import UserError
from multidomain_cct.training.checkpoints import checkpoint
from multidomain_cct.training.checkpoints.checkpoint import (
    checkpoints,
    choose_checkpoint,
    load_checkpoint,
    load_strictly,
    newest_checkpoint,
    save_checkpoint,
)
from multidomain_cct.training.checkpoints.state import RunState, read_state
from multidomain_cct.training.loop import train
from multidomain_cct.training.recipe import Recipe


@pytest.fixture
def trained() -> tuple[nn.Module, torch.optim.Optimizer]:
    """A linear layer and AdamW after one step."""
    model = nn.Linear(3, 2)
    optimiser = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimiser.step()
    return model, optimiser


def save(folder: Path, step: int, trained: tuple[nn.Module, torch.optim.Optimizer], best: int = 0) -> Path:
    state = RunState(step=step, fingerprints={"a/train": "1"}, best_step=best)
    return save_checkpoint(folder, state, *trained, keep=2)


def test_what_is_saved_is_restored(tmp_path: Path, trained: tuple[nn.Module, torch.optim.Optimizer]) -> None:
    saved = save(tmp_path, 5, trained)
    model = nn.Linear(3, 2)
    optimiser = torch.optim.AdamW(model.parameters())
    state = load_checkpoint(saved, model, optimiser)
    assert state == read_state(saved)
    assert state.step == 5
    assert torch.equal(model.weight, trained[0].weight)
    assert torch.equal(optimiser.state[model.weight]["exp_avg"], trained[1].state[trained[0].weight]["exp_avg"])


def test_the_newest_and_the_best_are_kept(tmp_path: Path, trained: tuple[nn.Module, torch.optim.Optimizer]) -> None:
    for step in range(1, 6):
        save(tmp_path, step, trained, best=min(step, 2))
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000002", "step-00000004", "step-00000005"]
    assert newest_checkpoint(tmp_path) == (tmp_path / "step-00000005", [])


def test_last_best_and_a_folder_can_be_chosen(tmp_path: Path, trained: tuple[nn.Module, torch.optim.Optimizer]) -> None:
    for step in (1, 2):
        save(tmp_path / "checkpoints", step, trained, best=1)
    first, second = checkpoints(tmp_path / "checkpoints")
    assert choose_checkpoint(tmp_path, "last") == second
    assert choose_checkpoint(tmp_path, "best") == first
    assert choose_checkpoint(tmp_path, str(first)) == first
    with pytest.raises(UserError, match="there is no such checkpoint; it is `last`, `best` or a folder"):
        choose_checkpoint(tmp_path, "newest")


def test_a_checkpoint_may_be_a_link_and_what_it_leads_to_stays(
    tmp_path: Path, trained: tuple[nn.Module, torch.optim.Optimizer]
) -> None:
    folder, disk = tmp_path / "run" / "checkpoints", tmp_path / "disk"
    disk.mkdir()
    for step in (1, 2):
        saved = save(folder, step, trained)
        saved.rename(disk / saved.name)
        saved.symlink_to(disk / saved.name)
    (folder / "step-best").symlink_to(disk / "step-00000001")
    assert newest_checkpoint(folder) == (folder / "step-00000002", [])
    for name in ("step-00000001", "step-best"):
        assert choose_checkpoint(tmp_path / "run", str(folder / name)) == folder / name
    with pytest.raises(UserError, match="is not a checkpoint of"):
        choose_checkpoint(tmp_path / "run", str(disk / "step-00000001"))
    save(folder, 2, trained)
    save(folder, 3, trained)
    assert [path.name for path in checkpoints(folder)] == ["step-00000002", "step-00000003"]
    assert sorted(path.name for path in disk.iterdir()) == ["step-00000001", "step-00000002"]
    assert all((path / "model.safetensors").is_file() for path in disk.iterdir())


def test_tensors_that_do_not_fit_are_named() -> None:
    model = nn.Linear(3, 2)
    tensors = {"weight": torch.zeros(2, 4), "scale": torch.zeros(1)}
    with pytest.raises(UserError) as caught:
        load_strictly(model, tensors, "here")
    for part in ("here does not fit", "bias is missing", "scale is unknown", "weight is [2, 4], not [2, 3]"):
        assert part in str(caught.value)


def test_a_resumed_run_hashes_its_checkpoint_once(
    tiny_recipe: Callable[..., Recipe], two_domains: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = {"steps": 2, "save_every": 1, "keep": 9, "evaluate_every": 9}
    run = train(tiny_recipe(training=training), [two_domains / "domains"])
    last = checkpoints(run / "checkpoints")[-1]
    hashed: Counter[Path] = Counter()
    file_sha256 = checkpoint.file_sha256

    def counted(path: Path) -> str:
        hashed[path] += 1
        return file_sha256(path)

    monkeypatch.setattr(checkpoint, "file_sha256", counted)
    train(tiny_recipe(training=training, resume="auto"), [two_domains / "domains"])
    assert {path.name: count for path, count in hashed.items() if path.parent == last} == {
        "model.safetensors": 1,
        "optimiser.safetensors": 1,
        "state.json": 1,
    }
