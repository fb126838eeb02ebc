"""On a CUDA card a step is the formula, waits for nothing, and gives the same bytes twice; `--device cpu` rehearses."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from multidomain_cct.data.batches.loader import Batch, scored_images
from multidomain_cct.data.shards.reader import Shards
from multidomain_cct.evaluation.scoring import score
from multidomain_cct.methods.cct import CCT
from multidomain_cct.methods.cct_strong import CCTStrong, CCTStrongSettings
from multidomain_cct.methods.supervised import Supervised
from multidomain_cct.model.encoder import EncoderSettings
from multidomain_cct.model.network import Task
from multidomain_cct.model.perturbations import Perturbations
from multidomain_cct.results.trained_run import TrainedRun
from multidomain_cct.training.loop import RunFailed, train
from multidomain_cct.training.machine import set_tf32
from multidomain_cct.training.recipe import Recipe

pytestmark = pytest.mark.gpu
CASES = [(method, decoder) for method in ("cct", "cct_strong") for decoder in ("pixelshuffle", "bilinear")]


class SameDraws(TorchDispatchMode):
    """Whatever is random is drawn on the CPU in 32 bits, so that every device and precision sees the same."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        tensors = [each for each in args if isinstance(each, torch.Tensor)]
        device = kwargs.get("device") or (tensors[0].device if tensors else torch.device("cpu"))

        def plain(value: Any) -> Any:
            if isinstance(value, torch.Tensor):
                return value.detach().cpu().float() if value.is_floating_point() else value.detach().cpu()
            return torch.float32 if isinstance(value, torch.dtype) and value.is_floating_point else value

        drawn = func(
            *tree_map(plain, args), **{**tree_map(plain, kwargs), **({"device": "cpu"} if "device" in kwargs else {})}
        )
        if func._schema.name.endswith("_"):
            return args[0].copy_(drawn)
        wanted = kwargs.get("dtype") or (tensors[0].dtype if tensors else None)

        def back(value: Any) -> Any:
            floating = isinstance(value, torch.Tensor) and value.is_floating_point() and wanted is not None
            return value.to(device, wanted if floating else value.dtype) if isinstance(value, torch.Tensor) else value

        return tree_map(back, drawn)


def network(method: str, decoder: str, perturbations: Perturbations | None = None) -> Supervised:
    """All seven perturbations; targets and gates of cct_strong without thresholds, which rounding would cross."""
    mix = tuple((perturbations or Perturbations()).each())
    tasks = {"street": Task((False, True, True), perturbations=mix, class_pixels=(5, 3, 1))}
    encoder = EncoderSettings("test_resnet", stride=8, context="fpn", width=32)
    torch.manual_seed(0)
    if method == "cct":
        return CCT(encoder, tasks, decoder=decoder)
    settings = CCTStrongSettings(confidence=0.0, target="soft", thresholds="fixed")
    return CCTStrong(encoder, tasks, decoder=decoder, settings=settings)


def batch(device: torch.device) -> dict[str, Batch]:
    torch.manual_seed(1)
    blocks = torch.randint(0, 256, (2, 2, 3, 4, 4), dtype=torch.uint8)
    images = blocks.repeat_interleave(16, 3).repeat_interleave(16, 4)
    masks = torch.randint(0, 3, (2, 64, 64), dtype=torch.uint8)
    return {"street": Batch(images[0], masks, images[1], torch.ones(2, 64, 64, dtype=torch.bool)).to(device)}


def losses_and_gradient(
    model: Supervised, device: torch.device, precision: torch.dtype | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(terms,) and all gradients in one row, in float64 on the CPU."""
    torch.manual_seed(2)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == torch.float16 and device.type == "cuda")
    autocast = nullcontext() if precision is None else torch.autocast(device.type, dtype=precision)
    with SameDraws(), autocast:
        losses = torch.stack(list(model(batch(device), 1.0).values()))
    scaler.scale(losses.sum()).backward()
    scale = scaler.get_scale()
    gradients = [
        parameter.grad.flatten().double().cpu() for parameter in model.parameters() if parameter.grad is not None
    ]
    return losses.detach().double().cpu(), torch.cat(gradients) / scale


@contextmanager
def without_tf32() -> Iterator[None]:
    set_tf32(False)
    yield
    set_tf32(True)


@pytest.mark.parametrize(("method", "decoder"), CASES)
def test_a_step_in_32_bits_is_the_one_in_64_bits(device: torch.device, method: str, decoder: str) -> None:
    model = network(method, decoder)
    expected, slope = losses_and_gradient(copy.deepcopy(model).double(), torch.device("cpu"))
    with without_tf32():
        found, gradient = losses_and_gradient(model.to(device), device)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
    assert (gradient - slope).norm() < 1e-3 * slope.norm()


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("method", "decoder"), CASES)
def test_a_step_in_16_bits_is_near_it(device: torch.device, method: str, decoder: str, precision: torch.dtype) -> None:
    if precision == torch.float16 and device.type == "cpu":
        precision = torch.bfloat16  # which is what a CPU trains in
    model = network(method, decoder)
    expected, slope = losses_and_gradient(copy.deepcopy(model).double(), torch.device("cpu"))
    found, gradient = losses_and_gradient(model.to(device), device, precision)
    torch.testing.assert_close(found.sum(), expected.sum(), rtol=0.05, atol=0)
    assert torch.nn.functional.cosine_similarity(gradient, slope, dim=0) > 0.9


@pytest.mark.parametrize("method", ["cct", "cct_strong"])
def test_the_host_waits_for_nothing_between_the_first_forward_pass_and_the_gradients(
    device: torch.device, method: str
) -> None:
    kinds = {kind: {"count": 0} for kind in ("object_mask", "context_mask", "guided_cutout")}
    model = network(method, "pixelshuffle", without(kinds)).to(device)
    batches = batch(device)
    for checked in (False, True):
        if checked and device.type == "cuda":
            torch.cuda.set_sync_debug_mode("error")
        try:
            torch.stack(list(model(batches, 1.0).values())).sum().backward()
        finally:
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def without(kinds: dict[str, dict[str, int]]) -> Perturbations:
    """Those that outline objects count them first, which the host must know (docs/gpu.md)."""
    usual = Perturbations()
    return type(usual)(**{name: type(getattr(usual, name))(**settings) for name, settings in kinds.items()})


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_an_interrupted_run_ends_with_the_same_bytes(
    tiny_recipe: Callable[..., Recipe],
    two_domains: Path,
    device: torch.device,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    precision: str,
) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    changes = {"method": "cct_strong", "training__precision": precision, "training__save_every": 1, "resume": "auto"}
    changes["domains"] = {"fields": {"labelled": "4", "unlabelled_splits": ["unlabelled"], "val_split": ""}}
    changes["optimiser"] = {"name": "adamw", "lr": 1e-3}
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        whole = tiny_recipe(**changes, training__steps=2, name="whole")
        train(whole, [two_domains / "domains"])
        halves = tiny_recipe(**changes, training__steps=2, name="halves")
        train(halves, [two_domains / "domains"])
        shutil.rmtree(halves.folder / "checkpoints" / "step-00000002")
        train(halves, [two_domains / "domains"])
    finally:
        torch.use_deterministic_algorithms(False)
    for name in ("model.safetensors", "optimiser.safetensors"):
        one, other = (run.folder / "checkpoints" / "step-00000002" / name for run in (whole, halves))
        assert one.read_bytes() == other.read_bytes()


def test_batches_and_scored_images_wait_in_pinned_memory(
    tiny_run: Path, device: torch.device, tiny_recipe: Callable[..., Recipe]
) -> None:
    run, pin = TrainedRun.load(tiny_run, device=device), device.type == "cuda"
    domain = run.domains["fields"]
    shards = Shards.open(Path(run.recipe.data.shards) / "fields", "val")
    for item in scored_images(shards, domain, range(2), workers=1, pin_memory=pin):
        assert item.image.is_pinned() == pin
        assert item.image.to(device, non_blocking=True).device.type == device.type


def test_scores_and_predictions_are_those_of_the_cpu(tiny_run: Path, device: torch.device) -> None:
    with without_tf32():
        results, ids = [], []
        for where in (torch.device("cpu"), device):
            run = TrainedRun.load(tiny_run, device=where)
            domain = run.domains["fields"]
            shards = Shards.open(Path(run.recipe.data.shards) / "fields", "val")
            results.append(score(run.model, shards, domain, "val", run.recipe.evaluation).confusion)
            image = (torch.rand(3, 90, 120, generator=torch.Generator().manual_seed(0)) * 255).to(torch.uint8)
            ids.append(run.predict(image, "fields").ids)
    assert abs(results[0] - results[1]).sum() <= 2e-4 * results[0].sum()
    assert (ids[0] == ids[1]).mean() >= 0.9999


def test_too_little_memory_is_one_line_and_leaves_a_checkpoint(
    tiny_recipe: Callable[..., Recipe], two_domains: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny_recipe(training__save_every=1, training__steps=3, resume="auto")
    whole, calls = Supervised.supervised_losses, []

    def hungry(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            torch.empty(2**60, dtype=torch.uint8, device=device)
        return whole(*arguments, **options)

    monkeypatch.setattr(Supervised, "supervised_losses", hungry)
    with pytest.raises(RunFailed, match="memory.*step-00000001 is safe") as failed:
        train(recipe, [two_domains / "domains"])
    assert "\n" not in str(failed.value)
