from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from processes import Plan, start, start_ranks
from run_files import DETERMINISTIC, tensors_of
from safetensors.torch import load

Words = Callable[..., list[str]]
Tensors = dict[str, torch.Tensor]


def state(run: Path, step: int) -> Tensors:
    found = tensors_of(run, step)
    return load(found["model.safetensors"]) | load(found["optimiser.safetensors"])


def test_two_processes_give_every_head_the_gradient_that_one_gives_it(
    command: Words, tmp_path: Path, figure: Callable[[str, str], None]
) -> None:
    """After one step of SGD without weight decay the momentum is the gradient."""
    settings = {**DETERMINISTIC, "optimiser": {"lr": 0.01, "weight_decay": 0.0}}
    batches = ("training.steps=1", "data.labelled_batch=4", "data.unlabelled_batch=4")
    one = start(command("one", *batches, **settings), tmp_path / "one.txt")
    two = start_ranks(command("two", *batches, **settings), tmp_path / "two.txt", [Plan(), Plan()])
    assert [run.wait() for run in (one, *two)] == [0, 0, 0], one.text + two[0].text
    gradients = [load(tensors_of(tmp_path / "runs" / name)["optimiser.safetensors"]) for name in ("one", "two")]
    assert gradients[0].keys() == gradients[1].keys()
    largest = {}
    for part in (
        "heads.fields.main",
        "heads.fields.auxiliaries",
        "heads.shapes.main",
        "heads.shapes.auxiliaries",
        "encoder",
    ):
        names = [name for name in gradients[0] if name.startswith(part)]
        assert names, part
        assert any(gradients[0][name].abs().max() > 0 for name in names), part
        largest[part] = max((gradients[0][name] - gradients[1][name]).abs().max().item() for name in names)
    assert max(largest.values()) <= 1e-6, largest
    figure("B7", f"2 processes against 1: largest gradient difference {max(largest.values()):.1e}")


@pytest.mark.parametrize("optimiser", ["sgd", "adamw"])
def test_a_domain_that_a_step_leaves_out_keeps_its_head_and_its_optimiser_state_to_the_bit(
    command: Words, tmp_path: Path, figure: Callable[[str, str], None], optimiser: str
) -> None:
    settings = {"data__schedule": "alternate", "optimiser": {"name": optimiser, "lr": 1e-3}}
    ranks = start_ranks(
        command("run", "training.steps=4", "training.save_every=1", **settings), tmp_path / "run.txt", [Plan(), Plan()]
    )
    assert [rank.wait() for rank in ranks] == [0, 0], ranks[0].text + ranks[1].text
    saved = {step: state(tmp_path / "runs" / "run", step) for step in (1, 2, 3, 4)}
    # The first and third step are of fields, the others of shapes.
    for before, after, absent, present in (
        (1, 2, "fields", "shapes"),
        (2, 3, "shapes", "fields"),
        (3, 4, "fields", "shapes"),
    ):
        still = [name for name in saved[before] if name.startswith(f"heads.{absent}.")]
        assert len(still) > 4
        assert any("/" in name for name in still)
        assert all(torch.equal(saved[before][name], saved[after][name]) for name in still)
        assert any(
            not torch.equal(saved[before][name], saved[after][name])
            for name in saved[before]
            if name.startswith(f"heads.{present}.main")
        )
    figure("B7", f"{optimiser}: absent heads and their state equal to the bit")
