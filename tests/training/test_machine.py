"""What Accelerate's environment and this machine mean for a recipe."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from multidomain_cct.errors import UserError
from multidomain_cct.training.machine import check_machine, set_tf32
from multidomain_cct.training.recipe import Recipe, differences
from multidomain_cct.training.run import build_accelerator

TinyRecipe = Callable[..., Recipe]


@pytest.mark.parametrize(
    ("variable", "value", "remedy"),
    [
        ("ACCELERATE_USE_DEEPSPEED", "true", "config file without it"),
        ("ACCELERATE_USE_FSDP", "true", "config file without it"),
        ("ACCELERATE_USE_MEGATRON_LM", "true", "config file without it"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "true", "config file without it"),
        ("ACCELERATE_MIXED_PRECISION", "fp8", "bf16"),
    ],
)
def test_what_training_would_mix_in_without_a_word_is_refused(
    tiny_recipe: TinyRecipe, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, remedy: str
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(UserError, match=f"^{variable} is .*environment") as refused:
        build_accelerator(tiny_recipe())
    assert remedy in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("variable", "value", "changes"),
    [
        ("ACCELERATE_USE_FSDP", "false", {}),
        ("ACCELERATE_DYNAMO_BACKEND", "NO", {}),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1", {}),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "2", {"training__accumulation": 2}),
        ("ACCELERATE_MIXED_PRECISION", "no", {"training__precision": "bf16"}),
        ("ACCELERATE_MIXED_PRECISION", "bf16", {"training__precision": "bf16"}),
    ],
)
def test_what_agrees_with_the_recipe_is_not_mentioned_and_changes_no_gradient(
    tiny_recipe: TinyRecipe, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, changes: dict[str, object]
) -> None:
    monkeypatch.setenv(variable, value)
    recipe = tiny_recipe(**changes)
    assert list(check_machine(recipe)) == []
    weight = torch.ones((), requires_grad=True)
    build_accelerator(recipe).backward(weight * 1.0)
    assert weight.grad == 1


@pytest.mark.parametrize(
    ("variable", "value", "remedy"),
    [
        ("ACCELERATE_MIXED_PRECISION", "bf16", "training.precision=bf16"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "encoder.compile=true"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "8", "training.accumulation=8"),
    ],
)
def test_what_the_recipe_decides_is_said_and_not_used(
    tiny_recipe: TinyRecipe, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, remedy: str
) -> None:
    monkeypatch.setenv(variable, value)
    (finding,) = check_machine(tiny_recipe())
    assert finding.severity == "warning"
    assert finding.key == variable
    assert remedy in finding.message
    accelerator = build_accelerator(tiny_recipe())
    weight = torch.ones((), requires_grad=True)
    accelerator.backward(weight * 1.0)
    assert weight.grad == 1
    assert accelerator.mixed_precision == "no"
    assert list(accelerator.prepare(torch.nn.Linear(2, 2)).state_dict()) == ["weight", "bias"]


@pytest.mark.parametrize(("name", "remedy"), [("wandb", "pip install wandb"), ("wanbd", 'Did you mean "wandb"')])
def test_a_tracker_that_is_not_installed_is_answered_with_its_package(
    tiny_recipe: TinyRecipe, monkeypatch: pytest.MonkeyPatch, name: str, remedy: str
) -> None:
    monkeypatch.setattr("multidomain_cct.training.machine.get_available_trackers", lambda: ["tensorboard"])
    (finding,) = check_machine(tiny_recipe(training__trackers=[name]))
    assert finding.key == "training.trackers"
    assert "Installed: tensorboard" in finding.message
    assert remedy in finding.message


@pytest.mark.parametrize(("gpu", "has_bf16", "means"), [(True, True, "bf16"), (True, False, "no"), (False, True, "no")])
def test_auto_is_bf16_where_a_gpu_has_it(
    tiny_recipe: TinyRecipe, monkeypatch: pytest.MonkeyPatch, gpu: bool, has_bf16: bool, means: str
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpu)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation: has_bf16)
    assert tiny_recipe(training__precision="auto").training.mixed_precision == means
    assert tiny_recipe(training__precision="fp16").training.mixed_precision == "fp16"


def test_auto_and_what_it_means_here_are_the_same_run(tiny_recipe: TinyRecipe) -> None:
    auto, here = (tiny_recipe(training__precision=value) for value in ("auto", tiny_recipe().training.mixed_precision))
    assert differences(auto, here) == []
    assert differences(auto, tiny_recipe(training__precision="fp16"))


@pytest.mark.parametrize(("allowed", "precision"), [(True, "high"), (False, "highest")])
def test_tf32_is_chosen_for_matrix_products_and_convolutions_of_a_gpu(
    monkeypatch: pytest.MonkeyPatch, allowed: bool, precision: str
) -> None:
    chosen = []
    monkeypatch.setattr("torch.set_float32_matmul_precision", chosen.append)
    monkeypatch.setattr("torch.backends.cudnn.allow_tf32", not allowed)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    set_tf32(allowed)
    assert chosen == []
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    set_tf32(allowed)
    assert chosen == [precision]
    assert torch.backends.cudnn.allow_tf32 is allowed
