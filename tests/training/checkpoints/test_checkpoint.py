"""Checkpoints of a tiny model. Crashes, damage and full disks are in tests/reliability (B1, B9 to B12, B15)."""

from __future__ import annotations

import errno
import os
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from multidomain_cct.errors import UserError
from multidomain_cct.training.checkpoints import checkpoint
from multidomain_cct.training.checkpoints.checkpoint import (
    checkpoints,
    choose_checkpoint,
    damage,
    load_checkpoint,
    load_run,
    load_strictly,
    model_tensors,
    newest_checkpoint,
    save_checkpoint,
)
from multidomain_cct.training.checkpoints.optimiser_state import optimiser_tensors, restore_optimiser
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


def test_a_checkpoint_that_cannot_be_chosen_is_refused_with_the_way_out(
    tmp_path: Path, trained: tuple[nn.Module, torch.optim.Optimizer]
) -> None:
    folder = tmp_path / "checkpoints"
    with pytest.raises(UserError, match="has no checkpoints; train it first"):
        choose_checkpoint(tmp_path, "last")
    save(folder, 1, trained)
    with pytest.raises(UserError, match="has not been evaluated, .* Use --checkpoint last"):
        choose_checkpoint(tmp_path, "best")
    save(folder, 2, trained, best=1)
    (folder / "step-00000001" / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"step-00000001 is damaged \(model\.safetensors is missing\)"):
        choose_checkpoint(tmp_path, "best")
    assert choose_checkpoint(tmp_path, "last") == folder / "step-00000002"
    (folder / "step-00000002" / "state.json").write_text("{}")
    with pytest.raises(UserError, match=r"step-00000002 is damaged \(state\.json has 2 bytes"):
        choose_checkpoint(tmp_path, "best")


@pytest.mark.parametrize("content", ["[]", "{}", '{"model.safetensors": 1}', "{"])
def test_a_manifest_of_another_shape_is_damage(
    tmp_path: Path, trained: tuple[nn.Module, torch.optim.Optimizer], content: str
) -> None:
    saved = save(tmp_path, 1, trained)
    assert damage(saved) is None
    (saved / "MANIFEST.json").write_text(content)
    assert damage(saved) == "MANIFEST.json cannot be read"


def test_when_no_checkpoint_is_whole_the_newest_is_named(
    tmp_path: Path, trained: tuple[nn.Module, torch.optim.Optimizer]
) -> None:
    assert newest_checkpoint(tmp_path) == (None, [])
    for step in (1, 2):
        (save(tmp_path, step, trained) / "state.json").unlink()
    with pytest.raises(UserError, match="no checkpoint is whole: .*step-00000002 is damaged") as caught:
        newest_checkpoint(tmp_path)
    assert "step-00000001" not in str(caught.value)


def test_a_save_removes_what_a_crash_left_and_leaves_nothing_when_it_fails(
    tmp_path: Path, trained: tuple[nn.Module, torch.optim.Optimizer]
) -> None:
    for name in (".step-00000001.tmp", ".step-00000000.old"):
        (tmp_path / name).mkdir()
    saved = save(tmp_path, 1, trained)
    assert list(tmp_path.iterdir()) == [saved]
    with pytest.raises(TypeError):
        # A set has no place in JSON.
        save_checkpoint(tmp_path, RunState(step=2, fingerprints={"a/train": {1}}), *trained, keep=2)  # type: ignore[dict-item]
    assert list(tmp_path.iterdir()) == [saved]
    assert damage(saved) is None


def test_a_folder_that_cannot_be_made_is_the_error_that_is_seen(
    tmp_path: Path, trained: tuple[nn.Module, torch.optim.Optimizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(Path, "mkdir", full)
    with pytest.raises(OSError, match="No space left on device"):
        save(tmp_path, 1, trained)


def test_a_second_checkpoint_of_a_step_replaces_the_first(
    tmp_path: Path, trained: tuple[nn.Module, torch.optim.Optimizer]
) -> None:
    save(tmp_path, 1, trained)
    # A crash between the two renames leaves the first under another name.
    (tmp_path / "step-00000001").rename(tmp_path / "step-00000001.before")
    save(tmp_path, 1, trained)
    saved = save(tmp_path, 1, trained, best=1)
    assert list(tmp_path.iterdir()) == [saved]
    assert read_state(saved).best_step == 1


def test_a_damaged_later_checkpoint_does_not_push_one_out(
    tmp_path: Path, trained: tuple[nn.Module, torch.optim.Optimizer]
) -> None:
    for step in (7, 8, 9, 3, 4, 5):
        save(tmp_path, step, trained)
    kept = ["step-00000004", "step-00000005", "step-00000008", "step-00000009"]
    assert [path.name for path in checkpoints(tmp_path)] == kept


def test_the_gradient_scaler_is_restored_and_another_is_refused(
    tmp_path: Path, trained: tuple[nn.Module, torch.optim.Optimizer]
) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    saved = save_checkpoint(tmp_path, RunState(step=1, fingerprints={}), *trained, scaler, keep=1)
    found = torch.amp.GradScaler("cpu")
    load_checkpoint(saved, *trained, found)
    assert found.state_dict() == scaler.state_dict()
    for other in (None, torch.amp.GradScaler("cpu", enabled=False)):
        with pytest.raises(UserError, match="Use the precision that it was saved with"):
            load_checkpoint(saved, *trained, other)
    with pytest.raises(UserError, match="the gradient scaler's state is None, this run's has .*'scale'"):
        load_checkpoint(save(tmp_path, 2, trained), *trained, scaler)


def test_a_loaded_run_predicts_with_main_decoders_only(tiny_run: Path, tmp_path: Path) -> None:
    run = load_run(tiny_run)
    assert (run.folder, run.checkpoint) == (tiny_run, checkpoints(tiny_run / "checkpoints")[-1])
    assert not any(module.training for module in run.model.modules())
    saved = model_tensors(run.checkpoint)
    assert set(run.model.state_dict()) == {name for name in saved if ".auxiliaries." not in name} < set(saved)
    with pytest.raises(UserError, match="this is not a run's folder"):
        load_run(tmp_path)


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


@pytest.mark.parametrize("name", ["sgd", "adamw"])
@pytest.mark.parametrize("written_fused", [True, False])
def test_fused_and_other_optimisers_read_each_others_state(name: str, written_fused: bool) -> None:
    """On a GPU optimisers are fused; the run may go on elsewhere."""
    kind = {"sgd": partial(torch.optim.SGD, momentum=0.9), "adamw": torch.optim.AdamW}[name]
    models = [torch.nn.Linear(3, 2) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    fused = (written_fused, not written_fused)
    first, second = (kind(model.parameters(), lr=0.1, fused=each) for model, each in zip(models, fused, strict=True))
    inputs = torch.rand(4, 3)

    def step(number: int, optimiser: torch.optim.Optimizer) -> None:
        optimiser.zero_grad()
        models[number](inputs).square().sum().backward()
        optimiser.step()

    step(0, first)
    models[1].load_state_dict(models[0].state_dict())
    tensors = {key: value.clone() for key, value in optimiser_tensors(models[0], first).items()}
    restore_optimiser(models[1], second, tensors, list(tensors), "here")
    for _ in range(3):
        step(0, first)
        step(1, second)
    torch.testing.assert_close(models[1].weight, models[0].weight)
