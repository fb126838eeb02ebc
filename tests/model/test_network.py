"""Equal crops go through the encoder together; weights, sizes and names."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from multidomain_cct.data.batches.loader import Batch
from multidomain_cct.data.batches.views import PAD
from multidomain_cct.errors import UserError
from multidomain_cct.model.encoder import EncoderSettings
from multidomain_cct.model.network import Segmenter, Task, labelled_images
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


@pytest.mark.parametrize("size", [(16, 16), (33, 70), (97, 64), (5, 200)])
@pytest.mark.parametrize("name", ["test_convnext", "test_maxvit"])
def test_backbones_with_a_coarse_unit_or_a_single_size_take_every_image(name: str, size: tuple[int, int]) -> None:
    task = replace(ROOM, crop=(64, 64), perturbations=())
    model = network(EncoderSettings(name=name, stride=8, context="fpn", width=32), room=task).eval()
    images = torch.randint(0, 256, (2, 3, *size), dtype=torch.uint8)
    logits = model.logits(images, "room")
    assert logits.shape == (2, 3, *size)
    assert logits.isfinite().all()


def test_windows_of_a_single_size_are_averaged_where_they_overlap() -> None:
    task = replace(ROOM, crop=(64, 64), perturbations=())
    model = network(EncoderSettings(name="test_maxvit", stride=8, context="fpn", width=32), room=task).eval()
    image = torch.randint(0, 256, (1, 3, 64, 80), dtype=torch.uint8)
    logits = model.logits(image, "room")
    left, right = (model.logits(image[..., start : start + 64], "room") for start in (0, 16))
    torch.testing.assert_close(logits[..., :16], left[..., :16])
    torch.testing.assert_close(logits[..., 16:64], (left[..., 16:] + right[..., :48]) / 2)
    torch.testing.assert_close(logits[..., 64:], right[..., 48:])


def test_an_image_is_padded_at_the_right_and_bottom_as_in_training() -> None:
    model = network().eval()
    image = torch.randint(0, 256, (1, 3, 40, 56), dtype=torch.uint8)
    image[..., 35:, :] = image[..., 50:] = torch.tensor(PAD, dtype=torch.uint8).view(1, 3, 1, 1)
    torch.testing.assert_close(model.logits(image[..., :35, :50], "room"), model.logits(image, "room")[..., :35, :50])
