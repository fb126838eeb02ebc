"""Labelled images: losses, views, class weights, and a running average of the weights."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from multidomain_cct.data.batches.loader import Batch
from multidomain_cct.errors import UserError
from multidomain_cct.methods.supervised import Supervised, class_weights, pixel_loss, supervised_loss
from multidomain_cct.model.decoders import build_decoder
from multidomain_cct.model.encoder import EncoderSettings
from multidomain_cct.model.losses import SupervisedSettings
from multidomain_cct.model.network import Segmenter, Task
from multidomain_cct.model.perturbations import Dropout, FeatureDrop, FeatureNoise

TINY = EncoderSettings(name="test_resnet", stride=8, context="fpn", width=32)
FROZEN = EncoderSettings(name="test_resnet", stride=8, context="fpn", width=32, norm="frozen")
STREET = Task((False, True, True, False), perturbations=(FeatureNoise(), FeatureDrop(), Dropout()))
ROOM = Task((True, False, True), perturbations=(FeatureNoise(),), weight=0.5)


def network(
    encoder: EncoderSettings = TINY, decoder: str = "bilinear", ema: float | None = None, **tasks: Task
) -> Supervised:
    return Supervised(encoder, tasks or {"street": STREET, "room": ROOM}, decoder=decoder, ema=ema)


def batch(num_classes: int, labelled: int = 2, side: int = 32, seed: int = 0) -> Batch:
    draw = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (labelled, 3, side, side), dtype=torch.uint8, generator=draw)
    masks = torch.randint(0, num_classes, (labelled, side, side), dtype=torch.uint8, generator=draw)
    masks[:, :2] = 255
    return Batch(
        images, masks, torch.empty(0, 3, side, side, dtype=torch.uint8), torch.empty(0, side, side, dtype=torch.bool)
    )


def two_batches() -> dict[str, Batch]:
    return {"street": batch(4), "room": batch(3, seed=1)}


def learns(model: Supervised, loss: Tensor) -> set[str]:
    """The parts of the network that get a gradient other than 0 from a loss."""
    model.zero_grad(set_to_none=True)
    loss.backward(retain_graph=True)  # type: ignore[no-untyped-call]
    found = {
        name for name, parameter in model.named_parameters() if parameter.grad is not None and parameter.grad.any()
    }
    return {".".join(name.split(".")[: 3 if name.startswith("heads") else 1]) for name in found}


@pytest.mark.parametrize("loss", ["ce", "ab_ce"])
def test_each_domains_supervised_loss_is_a_mean_over_its_images_with_its_weight(loss: str) -> None:
    room = replace(ROOM, supervised=SupervisedSettings(loss=loss))
    model = network(FROZEN, street=STREET, room=room).double()
    batches = two_batches()
    losses = model(batches, progress=0.0)
    assert list(losses) == ["street/supervised", "room/supervised"]
    for name, weight, bootstrapped in (("street", 1.0, False), ("room", 0.5, loss == "ab_ce")):
        own = batches[name]
        logits = model.head(name).main(model.encoder(own.images, [(name, 2)]))
        pixels = F.cross_entropy(logits, own.masks.long(), ignore_index=255, reduction="none")
        counted = own.masks != 255
        if bootstrapped:
            threshold = 1 / 3  # that of the start
            counted &= (-pixels).exp() < threshold
            assert 0 < counted.sum() < (own.masks != 255).sum()
        expected = weight * (pixels.where(counted, 0).sum(dim=(1, 2)) / counted.sum(dim=(1, 2))).mean()
        torch.testing.assert_close(losses[f"{name}/supervised"], expected, rtol=1e-9, atol=0)


def test_a_supervised_loss_teaches_the_encoder_and_the_domains_main_decoder() -> None:
    model = network()
    losses = model(two_batches())
    for name in ("street", "room"):
        assert learns(model, losses[f"{name}/supervised"]) == {"encoder", f"heads.{name}.main"}


def test_a_domain_that_borrows_a_head_teaches_it_with_its_own_weight() -> None:
    model = network(FROZEN, street=STREET, night=Task(STREET.things, head="street", weight=0.25))
    assert list(model.heads) == ["street"]
    assert model.head("night") is model.head("street")
    own = batch(4)
    losses = model({"street": own, "night": own})
    torch.testing.assert_close(losses["night/supervised"], 0.25 * losses["street/supervised"])
    assert learns(model, losses["night/supervised"]) == {"encoder", "heads.street.main"}


def test_a_step_without_labelled_images_has_no_losses() -> None:
    assert network()({"street": batch(4, labelled=0)}) == {}


def test_in_16_bits_of_small_range_no_sum_over_pixels_overflows() -> None:
    torch.manual_seed(0)
    decoder, features = build_decoder("pixelshuffle", 16, 3, 8), 300 * torch.rand(2, 16, 4, 4)
    masks = torch.randint(0, 3, (2, 32, 32), dtype=torch.uint8)

    def gradients(half: bool) -> tuple[Tensor, ...]:
        leaf = features.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.float16, enabled=half):
            loss = supervised_loss(decoder, leaf, masks, Task((False,) * 3), 1.0)
        return torch.autograd.grad(loss, [leaf, *decoder.parameters()])

    for rounded, exact in zip(gradients(True), gradients(False), strict=True):
        assert (rounded - exact).norm() < 0.02 * exact.norm()


def test_the_target_is_the_main_decoders_prediction_in_32_bits_without_a_graph() -> None:
    model = network()
    features = model.encode({("room", "labelled"): batch(3).images})["room", "labelled"]
    target = model.target(features, "room")
    torch.testing.assert_close(target, model.head("room").main(features).softmax(dim=1).detach())
    assert not target.requires_grad
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model.target(features, "room").dtype == torch.float32


def with_settings(**settings: object) -> Task:
    return Task((False, True, False), class_pixels=(900, 90, 10), supervised=SupervisedSettings(**settings))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["balanced", "effective"])
def test_class_weights_are_one_on_average_over_the_labelled_pixels(kind: str) -> None:
    task = with_settings(class_weights=kind)
    weights = class_weights(task)
    assert weights is not None
    pixels = np.array(task.class_pixels)
    np.testing.assert_allclose((weights.numpy() * pixels).sum() / pixels.sum(), 1, rtol=1e-6)
    effective = 1000 * (1 - np.exp(-pixels / 1000)) if kind == "effective" else pixels
    expected = np.minimum(effective[0] / effective, 20)
    np.testing.assert_allclose(weights.numpy() / weights.numpy()[0], expected, rtol=1e-5)


def test_a_class_without_pixels_has_no_weight_and_no_counts_mean_no_weights() -> None:
    balanced = SupervisedSettings(class_weights="balanced")
    weights = class_weights(Task((False,) * 3, class_pixels=(50, 0, 50), supervised=balanced))
    assert weights is not None
    assert weights.tolist() == [1, 0, 1]
    assert class_weights(Task((False,) * 3, supervised=balanced)) is None
    assert class_weights(with_settings()) is None


def test_weights_and_adjustment_give_the_weighted_loss_of_shifted_logits() -> None:
    task = with_settings(class_weights="balanced", logit_adjustment=0.5)
    logits, masks = torch.randn(2, 3, 4, 4, dtype=torch.float64), torch.randint(0, 3, (2, 4, 4), dtype=torch.uint8)
    masks[0, 0] = 255
    value = pixel_loss(task, logits.device)
    shifted = logits.numpy() + 0.5 * np.log(np.array([0.9, 0.09, 0.01]))[:, None, None]
    log = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    ids = np.where(masks == 255, 0, masks)
    weights = class_weights(task)
    assert weights is not None
    picked = -np.take_along_axis(log, ids[:, None], axis=1)[:, 0] * weights.numpy()[ids] * (masks.numpy() != 255)
    # Class weights are kept in 32 bits.
    np.testing.assert_allclose(value(logits.float(), masks).numpy(), picked, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("settings", [{"class_weights": "balanced"}, {"logit_adjustment": 1.0}])
def test_balance_goes_with_cross_entropy_only(settings: dict[str, object]) -> None:
    with pytest.raises(UserError, match=r"supervised\.loss=ce"):
        SupervisedSettings(loss="ab_ce", **settings)  # type: ignore[arg-type]


def test_without_settings_labelled_images_stay_as_they_are_and_nothing_is_drawn() -> None:
    state = torch.random.get_rng_state()
    batches = two_batches()
    seen = network().with_labelled_views(batches)
    assert torch.equal(torch.random.get_rng_state(), state)
    for name, own in batches.items():
        assert torch.equal(seen[name].images, own.images)
        assert torch.equal(seen[name].masks, own.masks)


def test_labelled_cutmix_mixes_images_and_masks_alike() -> None:
    own = batch(4, labelled=3)
    # Images that hold their mask's ids, so that each pixel shows which mask it belongs to.
    own = replace(own, images=own.masks.unsqueeze(1).repeat(1, 3, 1, 1))
    model = network(street=replace(STREET, supervised=SupervisedSettings(cutmix=1.0)))
    seen = model.with_labelled_views({"street": own})["street"]
    assert torch.equal(seen.images[:, 0], seen.masks)
    changed = (seen.masks != own.masks).float().mean()
    # Half of the pixels come from another image, where one id of four is the same.
    assert 0.25 < changed < 0.5


def test_colour_changes_the_chosen_share_of_images_and_no_mask() -> None:
    own = batch(4, labelled=60, side=16)
    model = network(street=replace(STREET, supervised=SupervisedSettings(colour=0.5)))
    torch.manual_seed(0)
    seen = model.with_labelled_views({"street": own})["street"]
    changed = (seen.images != own.images).flatten(1).any(dim=1).sum()
    # Of the half that is chosen, one in ten stays the same: no colour (0.2) and no blur (0.5) is drawn.
    assert 15 < changed < 40
    assert torch.equal(seen.masks, own.masks)


def test_a_running_average_predicts_in_place_of_the_weights_that_are_trained() -> None:
    model = network(FROZEN, ema=0.5).eval()
    images = batch(4).images
    before = Segmenter.logits(model, images, "street")
    model.after_step()
    with torch.no_grad():
        for parameter in (*model.encoder.parameters(), *model.heads.parameters()):
            parameter.add_(0.05 * torch.randn_like(parameter))
    student = Segmenter.logits(model, images, "street")
    torch.testing.assert_close(model.logits(images, "street"), before)
    with model.as_student():
        torch.testing.assert_close(model.logits(images, "street"), student)
    assert not torch.allclose(student, before)
    for _ in range(40):
        model.after_step()
    torch.testing.assert_close(model.logits(images, "street"), student, rtol=1e-3, atol=1e-4)


def test_without_a_running_average_there_is_no_teacher() -> None:
    model = network()
    model.after_step()
    assert model.teacher is None
    assert not [name for name in model.state_dict() if name.startswith("teacher") or name == "updates"]
