"""One forward pass gives one step's supervised losses, and equal crops go through the encoder together."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from multidomain_cct.data.batches.loader import Batch
from multidomain_cct.data.batches.views import PAD
from multidomain_cct.errors import UserError
from multidomain_cct.model.decoders import build_decoder
from multidomain_cct.model.encoder import EncoderSettings
from multidomain_cct.model.losses import SupervisedSettings
from multidomain_cct.model.network import Segmenter, Task, labelled_images, supervised_loss
from multidomain_cct.model.perturbations import Dropout, FeatureDrop, FeatureNoise

TINY = EncoderSettings(name="test_resnet", stride=8, context="fpn", width=32)
FROZEN = EncoderSettings(name="test_resnet", stride=8, context="fpn", width=32, norm="frozen")
STREET = Task((False, True, True, False), perturbations=(FeatureNoise(), FeatureDrop(), Dropout()))
ROOM = Task((True, False, True), perturbations=(FeatureNoise(),), weight=0.5)


def network(encoder: EncoderSettings = TINY, decoder: str = "bilinear", seed: int = 0, **tasks: Task) -> Segmenter:
    return Segmenter(encoder, tasks or {"street": STREET, "room": ROOM}, decoder=decoder, seed=seed)


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


def learns(model: Segmenter, loss: Tensor) -> set[str]:
    """The parts of the network that get a gradient other than 0 from a loss."""
    model.zero_grad(set_to_none=True)
    loss.backward(retain_graph=True)  # type: ignore[no-untyped-call]
    found = {
        name for name, parameter in model.named_parameters() if parameter.grad is not None and parameter.grad.any()
    }
    return {".".join(name.split(".")[: 3 if name.startswith("heads") else 1]) for name in found}


# The supervised losses


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
    assert list(model.heads) == ["street"] and model.head("night") is model.head("street")
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
            loss = supervised_loss(decoder, leaf, masks, SupervisedSettings(), 1.0)
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


# Passes through the encoder


def passes(model: Segmenter, batches: dict[str, Batch]) -> list[int]:
    """Images in each forward pass of the backbone."""
    found: list[int] = []
    handle = model.encoder.backbone.register_forward_pre_hook(lambda module, inputs: found.append(len(inputs[0])))
    model.encode(labelled_images(batches))
    handle.remove()
    return found


@pytest.mark.parametrize("norm", ["shared", "per_domain", "frozen"])
def test_images_of_equal_crop_go_through_the_encoder_together(norm: str) -> None:
    model = network(EncoderSettings(name="test_resnet", stride=8, context="fpn", width=32, norm=norm))
    assert passes(model, {"street": batch(4, 5), "room": batch(3, 3)}) == [8]
    assert passes(model, {"street": batch(4, 0), "room": batch(3, 2)}) == [2]


def test_images_of_unequal_crop_go_through_it_by_size() -> None:
    batches = {"a": batch(4, 4), "b": batch(3, 4, side=64), "c": batch(4, 5)}
    assert passes(network(a=STREET, b=ROOM, c=STREET), batches) == [9, 4]


# Building


def test_a_supervised_run_starts_from_the_weights_of_the_cct_run() -> None:
    plain = network(street=Task(STREET.things), room=Task(ROOM.things, weight=0.5)).state_dict()
    full = network().state_dict()
    assert set(plain) == {name for name in full if ".auxiliaries." not in name}
    assert all(torch.equal(plain[name], full[name]) for name in plain)


def test_a_domains_head_starts_the_same_whichever_others_there_are() -> None:
    alone = network(room=ROOM).state_dict()
    beside = network().state_dict()
    assert all(torch.equal(tensor, beside[name]) for name, tensor in alone.items())


def test_decoders_of_a_domain_start_apart_and_seeds_differ() -> None:
    first, again, other = (network(seed=seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    weight = "heads.street.{}.classify.weight"
    parts = ["main", *(f"auxiliaries.{number}.decoder" for number in range(3))]
    decoders = [first[weight.format(part)] for part in parts]
    assert len({decoder.numpy().tobytes() for decoder in decoders}) == 4
    assert not torch.equal(first[weight.format("main")], other[weight.format("main")])


def test_building_leaves_the_callers_generator_alone() -> None:
    before = torch.random.get_rng_state()
    network()
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("name", ["items", "keys", "train", "training", "forward", "type"])
def test_a_domain_name_that_torch_reserves_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=f'domain.* "{name}".*[Rr]ename'):
        network(**{name: STREET})


# Logits


@pytest.mark.parametrize("decoder", ["bilinear", "pixelshuffle"])
@pytest.mark.parametrize("size", [(32, 64), (33, 50), (8, 8), (5, 3)])
def test_logits_come_for_images_of_any_size(decoder: str, size: tuple[int, int]) -> None:
    model = network(decoder=decoder).eval()
    images = torch.randint(0, 256, (2, 3, *size), dtype=torch.uint8)
    for name, classes in (("street", 4), ("room", 3)):
        assert model.logits(images, name).shape == (2, classes, *size)


def test_an_image_is_padded_at_the_right_and_bottom_as_in_training() -> None:
    model = network().eval()
    image = torch.randint(0, 256, (1, 3, 40, 56), dtype=torch.uint8)
    image[..., 35:, :] = image[..., 50:] = torch.tensor(PAD, dtype=torch.uint8).view(1, 3, 1, 1)
    torch.testing.assert_close(model.logits(image[..., :35, :50], "room"), model.logits(image, "room")[..., :35, :50])
