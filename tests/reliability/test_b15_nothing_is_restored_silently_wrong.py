import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import FULL, start
from run_files import rewrite_manifest, steps_of
from safetensors.torch import load_file, save_file

from multidomain_cct.data.specification import read_domain
from multidomain_cct.errors import UserError
from multidomain_cct.model.network import Segmenter
from multidomain_cct.training.build import build_model
from multidomain_cct.training.checkpoints.checkpoint import load_checkpoint
from multidomain_cct.training.checkpoints.state import read_state
from multidomain_cct.training.recipe import Recipe
from multidomain_cct.training.schedules import build_optimiser

Checkpoint = tuple[Path, Segmenter, torch.optim.Optimizer]


@pytest.fixture(scope="module", params=["sgd", "adamw"])
def saved(
    request: pytest.FixtureRequest, tiny_training: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Checkpoint:
    """A checkpoint of a run of two domains, and a model and an optimiser that it fits."""
    from multidomain_cct.training.recipe import read_recipe

    run = tiny_training(
        tmp_path_factory.mktemp("saved"),
        optimiser={"name": request.param, "lr": 1e-3},
        perturbations={"dropout": {"count": 1}},
    )
    recipe: Recipe = read_recipe(run / "recipe.yaml")
    domains = {name: read_domain(run / "domains" / f"{name}.yaml") for name in recipe.domains}
    model = build_model(recipe, domains, unlabelled={name: True for name in domains})
    return (
        run / "checkpoints" / f"step-{steps_of(run)[-1]:08d}",
        model,
        build_optimiser(recipe.optimiser, model.encoder.backbone, model),
    )


def refusal(checkpoint: Path, saved: Checkpoint) -> str:
    """The one line with which a tampered checkpoint, whose manifest says that it is whole, is refused."""
    rewrite_manifest(checkpoint)
    with pytest.raises(UserError) as refused:
        load_checkpoint(checkpoint, saved[1], saved[2])
    line = str(refused.value)
    assert line.startswith(str(checkpoint))
    assert "\n" not in line
    return line


def tampered(file: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


@pytest.mark.parametrize("file", ["model.safetensors", "optimiser.safetensors"])
def test_each_tensor_that_is_missing_or_misshapen_is_named(
    saved: Checkpoint, tmp_path: Path, figure: Callable[[str, str], None], file: str
) -> None:
    checkpoint = shutil.copytree(saved[0], tmp_path / saved[0].name)
    whole, count = (checkpoint / file).read_bytes(), 0
    # Every tensor of the model once, every one of the optimiser with the richer state; a few where they would be the
    # same again.
    all_of_them = isinstance(saved[2], torch.optim.AdamW) == (file == "optimiser.safetensors")
    for number, (name, tensor) in enumerate(list(load_file(checkpoint / file).items())[:: 1 if all_of_them else 9]):
        wrong = {
            "missing": lambda tensors, name=name: tensors.pop(name),
            "shape": lambda tensors, name=name, tensor=tensor: tensors.update(
                {name: torch.zeros(*tensor.shape, 2, dtype=tensor.dtype)}
            ),
            "type": lambda tensors, name=name, tensor=tensor: tensors.update({name: tensor.to(torch.int16)}),
        }
        kinds = list(wrong) if FULL else [list(wrong)[number % 3]]
        for kind in kinds:
            change = wrong[kind]
            tampered(checkpoint / file, change)
            line = refusal(checkpoint, saved)
            assert name in line, line
            assert "is missing" in line if kind == "missing" else "not " in line, line
            (checkpoint / file).write_bytes(whole)
            count += 1
    rewrite_manifest(checkpoint)
    load_checkpoint(checkpoint, saved[1], saved[2])
    figure("B15", f"{file}: {count} wrong tensors refused by name")


@pytest.mark.parametrize("file", ["model.safetensors", "optimiser.safetensors"])
@pytest.mark.parametrize(
    "name",
    ["heads.fields.main.classify.weight/foo", "heads.attic.main.classify.weight", "encoder.extra/momentum_buffer"],
)
def test_a_tensor_too_many_is_named(saved: Checkpoint, tmp_path: Path, file: str, name: str) -> None:
    checkpoint = shutil.copytree(saved[0], tmp_path / saved[0].name)
    tampered(checkpoint / file, lambda tensors: tensors.update({name: torch.zeros(1)}))
    assert name in refusal(checkpoint, saved)


def test_an_optimiser_entry_that_its_list_hides_is_named(saved: Checkpoint, tmp_path: Path) -> None:
    """A moment that is gone from the tensors and from the list of them alike."""
    checkpoint = shutil.copytree(saved[0], tmp_path / saved[0].name)
    state = json.loads((checkpoint / "state.json").read_text())
    name = state["optimiser"][0]
    (checkpoint / "state.json").write_text(json.dumps(state | {"optimiser": state["optimiser"][1:]}))
    assert f"{name} was not saved with it" in refusal(checkpoint, saved)
    tampered(checkpoint / "optimiser.safetensors", lambda tensors: tensors.pop(name))
    if name.endswith("exp_avg"):
        assert f"{name} is missing" in refusal(checkpoint, saved)


@pytest.mark.parametrize(
    "item",
    [
        "step",
        "fingerprints",
        "best_step",
        "best_miou",
        "owes_evaluation",
        "images",
        "recipe",
        "domains",
        "schema",
        "optimiser",
        "scaler",
    ],
)
def test_each_item_of_the_state_that_is_missing_or_of_another_kind_is_named(
    saved: Checkpoint, tmp_path: Path, item: str
) -> None:
    checkpoint = shutil.copytree(saved[0], tmp_path / saved[0].name)
    state: dict[str, Any] = json.loads((checkpoint / "state.json").read_text())
    for broken in (
        {key: value for key, value in state.items() if key != item},
        state | {item: 2.5 if item != "best_miou" else "high"},
    ):
        (checkpoint / "state.json").write_text(json.dumps(broken))
        assert item in refusal(checkpoint, saved)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "this is not the state of a run"),
        ("{", "this is not the state of a run"),
        ('{"schema": 0}', "has the schema 0; this version reads 1 to 3"),
        ('{"schema": 4}', "has the schema 4; this version reads 1 to 3"),
        ('{"extra": 1, ', "extra is unknown"),
        ('{"scaler": {"scale": 1.0}, ', "the gradient scaler's state is {'scale': 1.0}"),
    ],
)
def test_another_state_is_refused_with_one_line(saved: Checkpoint, tmp_path: Path, content: str, message: str) -> None:
    checkpoint = shutil.copytree(saved[0], tmp_path / saved[0].name)
    plain = json.loads((checkpoint / "state.json").read_text())
    if content.endswith(", "):
        content = json.dumps(plain | json.loads(content.removesuffix(", ") + "}"))
    (checkpoint / "state.json").write_text(content)
    line = refusal(checkpoint, saved)
    assert message in line


def test_the_older_schemas_are_read_as_what_they_mean(saved: Checkpoint, tmp_path: Path) -> None:
    checkpoint = shutil.copytree(saved[0], tmp_path / saved[0].name)
    plain = json.loads((checkpoint / "state.json").read_text())
    del plain["images"]
    second = plain | {"schema": 2}
    older = {name: value for name, value in plain.items() if name != "owes_evaluation"}
    older |= {"schema": 1, "optimiser": {"numbers": {}, "entries": plain["optimiser"]}}
    for state in (second, older):
        (checkpoint / "state.json").write_text(json.dumps(state))
        rewrite_manifest(checkpoint)
        assert load_checkpoint(checkpoint, saved[1], saved[2]) == read_state(saved[0])
    (checkpoint / "state.json").write_text(json.dumps(older | {"optimiser": {"numbers": {}}}))
    assert "optimiser is None" in refusal(checkpoint, saved)


def test_a_run_that_cannot_be_restored_ends_with_one_line(
    command: Callable[..., list[str]], tmp_path: Path, figure: Callable[[str, str], None]
) -> None:
    words = command("run", "training.steps=2", "resume=auto")
    first = start(words, tmp_path / "first.txt")
    assert first.wait() == 0, first.text
    checkpoint = tmp_path / "runs" / "run" / "checkpoints" / "step-00000002"
    tampered(checkpoint / "model.safetensors", lambda tensors: tensors.pop("heads.fields.main.classify.weight"))
    rewrite_manifest(checkpoint)
    second = start(words, tmp_path / "second.txt")
    assert second.wait() == 2
    assert second.errors == [
        f"error: {checkpoint} does not fit the model: heads.fields.main.classify.weight is missing."
    ]
    assert "Traceback" not in second.text
    figure("B15", "state: every item missing, of another kind, extra, other schemas: one line each")
