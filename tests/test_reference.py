"""A step of CCT has the losses and gradients of the plain implementation of its formulas, benchmarks/plain_cct.py.

The error of a parameter's gradient is the largest difference of its entries over the largest entry of the plain one; of
a loss, the difference over the plain one. Both sides draw the same random numbers.
"""

from __future__ import annotations

import copy
import importlib.util
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from multidomain_cct.data.batches.loader import Batch
from multidomain_cct.methods.cct import CCT
from multidomain_cct.model.encoder import EncoderSettings
from multidomain_cct.model.losses import ConsistencySettings, SupervisedSettings
from multidomain_cct.model.network import Task
from multidomain_cct.model.perturbations import (
    AdversarialNoise,
    ContextMask,
    Dropout,
    FeatureDrop,
    FeatureNoise,
    GuidedCutout,
    ObjectMask,
    Perturbation,
    Perturbations,
)

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}
ADVERSARIAL_TOLERANCE = {torch.float32: 3e-5, torch.float64: 1e-11}
"""For the parameters that adversarial noise reaches."""
STEP = 10.0
"""Norm of adversarial noise's trial step. The noise follows a difference of two predictions; at the default step of 0.1
that difference is so small that the order of summation, and so the number of threads, changes the gradients by up to
3e-4 in 32 bits (twelve draws, pixelshuffle); at 10 by 7e-6. The default step is compared in 64 bits.
"""
KINDS: list[Perturbation] = [
    FeatureNoise(),
    FeatureDrop(),
    FeatureDrop(mode="quantile"),
    Dropout(),
    ObjectMask(),
    ContextMask(),
    GuidedCutout(min_area=1),
    AdversarialNoise(xi=STEP),
    AdversarialNoise(xi=STEP, eps=2.0),
]
MIX = tuple(Perturbations(adversarial_noise=AdversarialNoise(xi=STEP)).each())
FEW = (
    FeatureNoise(),
    FeatureDrop(),
    Dropout(),
    ObjectMask(),
    ContextMask(),
    GuidedCutout(min_area=2),
    AdversarialNoise(xi=STEP),
)
STREET = Task((True, False, False, True), perturbations=FEW, weight=1.0)
ROOM = Task((False, True, True), perturbations=FEW[::-1], weight=0.3, consistency=ConsistencySettings(weight=2.0))


def plain_cct() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "plain_cct", Path(__file__).parents[1] / "benchmarks" / "plain_cct.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


PLAIN = plain_cct()


def network(
    dtype: torch.dtype, tasks: dict[str, Task], *, context: str = "fpn", norm: str = "shared", decoder: str = "bilinear"
) -> CCT:
    model = CCT(
        EncoderSettings(name="test_resnet", stride=8, context=context, width=32, norm=norm), tasks, decoder=decoder
    ).to(dtype)
    with torch.no_grad():
        for parameter in model.heads.parameters():
            parameter.mul_(3 if decoder == "bilinear" else 1.5)  # fresh ones hardly vary
    return model


def batch(num_classes: int, *, pseudo_labels: bool = False, unlabelled: int = 2, seed: int = 0) -> Batch:
    """Coarse images, so that objects are larger than a position; the right of the unlabelled ones is padding."""
    draw = torch.Generator().manual_seed(seed)
    images = (
        torch.randint(0, 256, (2 + unlabelled, 3, 4, 4), dtype=torch.uint8, generator=draw)
        .repeat_interleave(16, dim=2)
        .repeat_interleave(16, dim=3)
    )
    masks = torch.randint(0, num_classes, (2, 64, 64), dtype=torch.uint8, generator=draw)
    masks[:, :3] = 255
    valid = torch.ones(unlabelled, 64, 64, dtype=torch.bool)
    valid[:, :, 52:] = False
    labels = torch.randint(0, num_classes, (unlabelled, 64, 64), dtype=torch.uint8, generator=draw)
    labels[:, 40:] = 255
    return Batch(images[:2], masks, images[2:], valid, pseudo_labels=labels if pseudo_labels else None)


def step(
    compute: object, model: CCT, batches: dict[str, Batch], progress: float
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The losses, and the gradients of their sum by parameter."""
    torch.manual_seed(5)
    losses: dict[str, Tensor] = compute(model, batches, progress)  # type: ignore[operator]
    model.zero_grad()
    torch.stack(list(losses.values())).sum().backward()
    gradients = {
        name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None
    }
    return {name: loss.detach() for name, loss in losses.items()}, gradients


def parts_of(model: CCT) -> list[str]:
    """Prefixes of the parameters' names: the encoder, and each decoder."""
    numbers = {name: range(len(head.auxiliaries)) for name, head in model.heads.items()}  # type: ignore[arg-type]
    return [
        "encoder.",
        *(
            f"heads.{name}.{part}."
            for name, own in numbers.items()
            for part in ("main", *(f"auxiliaries.{number}" for number in own))
        ),
    ]


def adversarial(model: CCT, parameter: str) -> bool:
    """Whether adversarial noise reaches the parameter: one of a decoder that sees it, or of the encoder beside one."""
    seen = {
        name
        for name, part in model.named_modules()
        if isinstance(getattr(part, "perturbation", None), AdversarialNoise)
    }
    return parameter.startswith(tuple(seen)) or (bool(seen) and parameter.startswith("encoder."))


def assert_equal_to_plain(model: CCT, batches: dict[str, Batch], progress: float = 0.05) -> None:
    expected, expected_gradients = step(PLAIN.step_losses, copy.deepcopy(model), batches, progress)
    found, gradients = step(CCT.forward, model, batches, progress)
    assert found.keys() == expected.keys()
    assert gradients.keys() == expected_gradients.keys()
    assert all(loss > 0 for loss in expected.values())
    dtype = next(model.parameters()).dtype
    for name, loss in expected.items():
        assert (found[name] - loss).abs() <= TOLERANCE[dtype] * loss, name
    scales = {name: gradient.abs().max().item() for name, gradient in expected_gradients.items()}
    learning = {name for name, scale in scales.items() if scale > 0}
    assert all(any(name.startswith(part) for name in learning) for part in parts_of(model))
    errors = {
        name: (gradients[name] - expected_gradients[name]).abs().max().item() / (scale or 1.0)
        for name, scale in scales.items()
    }
    limits = {name: (ADVERSARIAL_TOLERANCE if adversarial(model, name) else TOLERANCE)[dtype] for name in errors}
    assert not {name: error for name, error in errors.items() if not error <= limits[name]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_each_perturbation_alone_gives_the_plain_losses_and_gradients(kind: Perturbation, dtype: torch.dtype) -> None:
    assert_equal_to_plain(network(dtype, {"street": replace(STREET, perturbations=(kind,))}), {"street": batch(4)})


@pytest.mark.parametrize("decoder", ["pixelshuffle", "bilinear"])
def test_adversarial_noise_with_its_default_step_gives_the_plain_losses_and_gradients(decoder: str) -> None:
    model = network(torch.float64, {"street": replace(STREET, perturbations=(AdversarialNoise(),))}, decoder=decoder)
    assert_equal_to_plain(model, {"street": batch(4)})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("norm", ["shared", "per_domain", "frozen"])
def test_the_authors_thirty_decoders_give_the_plain_losses_and_gradients(norm: str, dtype: torch.dtype) -> None:
    assert len(MIX) == 30
    assert_equal_to_plain(
        network(dtype, {"street": replace(STREET, perturbations=MIX)}, norm=norm), {"street": batch(4)}
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("confidence", "weight_unit"), [(0.0, "pixel"), (0.5, "authors")])
@pytest.mark.parametrize("distance", ["mse", "kl", "js"])
def test_two_domains_of_different_weight_give_the_plain_losses_and_gradients(
    distance: str, confidence: float, weight_unit: str, dtype: torch.dtype
) -> None:
    own = ConsistencySettings(distance=distance, confidence=confidence, weight_unit=weight_unit, ramp="linear")
    model = network(
        dtype, {"street": replace(STREET, consistency=own), "room": replace(ROOM, consistency=replace(own, weight=3.0))}
    )
    assert_equal_to_plain(model, {"street": batch(4), "room": batch(3, unlabelled=1, seed=1)})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("distance", ["mse", "js"])
def test_pseudo_labels_give_the_plain_losses_and_gradients(distance: str, dtype: torch.dtype) -> None:
    model = network(
        dtype, {"street": replace(STREET, consistency=ConsistencySettings(distance=distance)), "room": ROOM}
    )
    assert_equal_to_plain(model, {"street": batch(4, pseudo_labels=True), "room": batch(3, seed=1)})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("progress", [0.0, 0.2, 0.9])
def test_annealed_bootstrapped_cross_entropy_gives_the_plain_losses_and_gradients(
    progress: float, dtype: torch.dtype
) -> None:
    model = network(dtype, {"street": replace(STREET, supervised=SupervisedSettings(loss="ab_ce"))})
    assert_equal_to_plain(model, {"street": batch(4)}, progress)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("norm", ["shared", "per_domain", "frozen"])
def test_pyramid_pooling_gives_the_plain_losses_and_gradients(norm: str, dtype: torch.dtype) -> None:
    model = network(dtype, {"street": STREET, "room": ROOM}, context="psp", norm=norm)
    assert_equal_to_plain(model, {"street": batch(4), "room": batch(3, seed=1)})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pixelshuffle_decoders_give_the_plain_losses_and_gradients(dtype: torch.dtype) -> None:
    assert_equal_to_plain(network(dtype, {"street": STREET}, decoder="pixelshuffle"), {"street": batch(4)})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_image_without_objects_gives_the_plain_losses_and_gradients(dtype: torch.dtype) -> None:
    """All of it is padding, so the context mask zeroes it; its pseudo-labels count for the other decoders."""
    own = batch(4, pseudo_labels=True)
    own.valid[1] = False
    assert_equal_to_plain(network(dtype, {"street": STREET}), {"street": own})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_head_that_two_domains_share_gets_the_plain_gradients_of_both(dtype: torch.dtype) -> None:
    model = network(dtype, {"street": STREET, "night": Task(STREET.things, head="street", weight=0.4)})
    assert_equal_to_plain(model, {"street": batch(4), "night": batch(4, seed=2)})


def test_with_norms_that_do_not_mix_images_two_passes_through_the_encoder_give_the_same() -> None:
    model = network(torch.float64, {"street": STREET, "room": ROOM}, norm="frozen")
    batches = {"street": batch(4), "room": batch(3, seed=1)}
    torch.manual_seed(5)
    one = PLAIN.step_losses(model, batches, 0.05)
    torch.manual_seed(5)
    two = PLAIN.step_losses(model, batches, 0.05, passes="two")
    torch.testing.assert_close(two, one, rtol=1e-10, atol=0)


def test_the_examples_hold_objects_and_what_surrounds_them() -> None:
    """Or the comparisons above would compare nothing."""
    for task, own in ((STREET, batch(4)), (ROOM, batch(3, seed=1))):
        model = network(torch.float64, {"a": task})
        target = model.target(model.encode({("a", "unlabelled"): own.unlabelled})["a", "unlabelled"], "a")
        objects = PLAIN.object_mask(target, own.valid, task.things, 8)
        assert 0.1 < objects.double().mean() < 0.9
        assert any(len(region) >= 4 for mask in objects for region in PLAIN.regions(mask))
        assert 0.1 < (target.amax(dim=1) > 0.5).double().mean() < 0.95
