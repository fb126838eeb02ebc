"""Run folders and checkpoints that earlier versions wrote still evaluate, resume and give their weights."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from multidomain_cct.data.specification import read_domain
from multidomain_cct.errors import UserError
from multidomain_cct.training.checkpoints.checkpoint import load_run, model_tensors
from multidomain_cct.training.checkpoints.initial_weights import load_initial_weights
from multidomain_cct.training.loop import train
from multidomain_cct.training.recipe import read_recipe, read_run_recipe


def with_trunk(run: Path) -> None:
    """Give a run's folder the names of the versions that called the backbone `trunk`."""
    recipe = run / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("backbone_factor", "trunk_factor"))
    for checkpoint in (run / "checkpoints").iterdir():
        for name in ("model.safetensors", "optimiser.safetensors"):
            tensors = load_file(checkpoint / name)
            old = {key.replace("encoder.backbone.", "encoder.trunk."): tensor for key, tensor in tensors.items()}
            assert old.keys() != tensors.keys()
            save_file(old, checkpoint / name)
        state = checkpoint / "state.json"
        state.write_text(state.read_text().replace("backbone", "trunk"))
        files = {path.name: path.read_bytes() for path in checkpoint.iterdir() if path.name != "MANIFEST.json"}
        manifest = {
            name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            for name, content in files.items()
        }
        (checkpoint / "MANIFEST.json").write_text(json.dumps(manifest))


@pytest.fixture(scope="module")
def runs(tiny_training: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run of two steps with AdamW, and a copy with the old names."""
    workspace = tmp_path_factory.mktemp("earlier")
    new = tiny_training(
        workspace,
        optimiser={"name": "adamw", "lr": 1e-3, "backbone_factor": 0.3},
        training={"steps": 2, "save_every": 1, "evaluate_every": 2},
    )
    old = workspace / "old" / new.name
    shutil.copytree(new, old)
    with_trunk(old)
    return new, old


def test_an_old_run_folder_predicts_as_it_did(runs: tuple[Path, Path]) -> None:
    images = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)
    new, old = (load_run(run) for run in runs)
    assert old.recipe == new.recipe
    assert old.recipe.optimiser.backbone_factor == 0.3
    with torch.no_grad():
        assert torch.equal(old.model.logits(images, "fields"), new.model.logits(images, "fields"))


def test_an_old_run_resumes_as_if_it_had_not_been_interrupted(runs: tuple[Path, Path], tmp_path: Path) -> None:
    old = shutil.copytree(runs[1], tmp_path / runs[1].name)
    shutil.rmtree(old / "checkpoints" / "step-00000002")
    recipe = replace(read_run_recipe(old), runs=str(tmp_path), resume="auto")
    train(recipe, [runs[0].parents[1] / "domains"])
    for name in ("model.safetensors", "optimiser.safetensors"):
        resumed, expected = (load_file(run / "checkpoints" / "step-00000002" / name) for run in (old, runs[0]))
        assert resumed.keys() == expected.keys()
        assert all(torch.equal(resumed[key], expected[key]) for key in expected)


def test_a_new_run_starts_from_the_weights_of_an_old_one(runs: tuple[Path, Path]) -> None:
    model = load_run(runs[0]).model
    domains = {name: read_domain(runs[0] / "domains" / f"{name}.yaml") for name in ("fields", "shapes")}
    wanted = model_tensors(runs[0] / "checkpoints" / "step-00000002")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    load_initial_weights(runs[1], model, domains)
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in model.state_dict().items())


def test_the_old_key_in_a_recipe_is_answered_with_the_new_one(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("domains: {camvid: {}}\noptimiser: {trunk_factor: 0.3}\n")
    with pytest.raises(UserError, match=r"mine.yaml: optimiser.trunk_factor .*optimiser.backbone_factor"):
        read_recipe(recipe)
    recipe.write_text("domains: {camvid: {}}\n")
    with pytest.raises(UserError, match=r"optimiser.trunk_factor .*optimiser.backbone_factor"):
        read_recipe(recipe, ["optimiser.trunk_factor=0.3"])
