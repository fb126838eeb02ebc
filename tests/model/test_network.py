"""One forward pass gives one step's losses, and each part of the network learns from the terms that are its own."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from multidomain_cct.data.augment import PAD
from multidomain_cct.data.loader import Batch
from multidomain_cct.model.encoder import EncoderSettings
from multidomain_cct.model.network import CCT, HeadSettings
from multidomain_cct.model.perturbations import Dropout, FeatureDrop, FeatureNoise, Perturbation

MIX: tuple[Perturbation, ...] = (FeatureNoise(), FeatureDrop(), Dropout())
TINY = EncoderSettings(name="test_resnet", stride=8, context="fpn", width=32)
FROZEN = EncoderSettings(name="test_resnet", stride=8, context="fpn", width=32, norm="frozen")
STREET = HeadSettings(4, MIX, weight=1.0, consistency_weight=1.5)
ROOM = HeadSettings(3, MIX[:1], weight=0.5, consistency_weight=2.0)


def network(encoder: EncoderSettings = TINY, decoder: str = "bilinear", seed: int = 0, **heads: HeadSettings) -> CCT:
    return CCT(encoder, heads or {"street": STREET, "room": ROOM}, decoder=decoder, seed=seed)


def batch(num_classes: int, labelled: int = 2, unlabelled: int = 2, side: int = 32, seed: int = 0) -> Batch:
    draw = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (labelled + unlabelled, 3, side, side), dtype=torch.uint8, generator=draw)
    masks = torch.randint(0, num_classes, (labelled, side, side), dtype=torch.uint8, generator=draw)
    masks[:, :2] = 255
    valid = torch.rand(unlabelled, side, side, generator=draw) < 0.9
    return Batch(images[:labelled], masks, images[labelled:], valid)


def two_batches() -> dict[str, Batch]:
    return {"street": batch(4), "room": batch(3, seed=1)}


def seeded_forward(model: CCT, batches: dict[str, Batch], ramp: float = 1.0) -> dict[str, Tensor]:
    torch.manual_seed(5)  # of the perturbations
    losses: dict[str, Tensor] = model(batches, ramp)
    return losses


def learns(model: CCT, loss: Tensor) -> set[str]:
    """The parts of the network that get a gradient other than 0 from a loss."""
    model.zero_grad(set_to_none=True)
    loss.backward(retain_graph=True)  # type: ignore[no-untyped-call]
    found = {name for name, parameter in model.named_parameters() if parameter.grad is not None and parameter.grad.any()}
    return {".".join(name.split(".")[: 3 if name.startswith("heads") else 1]) for name in found}


# The losses of a step


def test_the_terms_are_named_by_domain_and_are_scalars() -> None:
    losses = seeded_forward(network(), two_batches())
    assert list(losses) == ["street/supervised", "street/consistency", "room/supervised", "room/consistency"]
    assert all(loss.shape == () and loss.isfinite() and loss > 0 for loss in losses.values())


def test_the_terms_are_those_of_the_papers_equations_with_their_weights() -> None:
    model = network(FROZEN).double()
    batches = {"street": batch(4), "room": batch(3, unlabelled=1, seed=1)}
    found = seeded_forward(model, batches, ramp=0.25)
    torch.manual_seed(5)
    for name, settings in (("street", STREET), ("room", ROOM)):
        own, head = batches[name], model.heads[name]
        z = model.encoder(own.images, [(name, 2)])
        pixels = F.cross_entropy(head.main(z), own.masks.long(), ignore_index=255, reduction="none")  # type: ignore[union-attr, operator]
        supervised = (pixels.sum(dim=(1, 2)) / (own.masks != 255).sum(dim=(1, 2))).mean()
        torch.testing.assert_close(found[f"{name}/supervised"], settings.weight * supervised)
        z = model.encoder(own.unlabelled, [(name, len(own.unlabelled))]).detach()
        target = head.main(z).softmax(dim=1)  # type: ignore[union-attr, operator]
        distances = []
        for auxiliary in head.auxiliaries:  # type: ignore[union-attr]
            squares = (auxiliary(z).softmax(dim=1) - target).square().sum(dim=1) * own.valid
            distances.append((squares.sum(dim=(1, 2)) / own.valid.sum(dim=(1, 2))).mean())
        expected = settings.weight * settings.consistency_weight * 0.25 * torch.stack(distances).mean()
        torch.testing.assert_close(found[f"{name}/consistency"], expected.detach(), check_stride=False, rtol=1e-9, atol=0)


def test_the_ramp_scales_the_consistency_terms_only() -> None:
    model = network()
    whole, half = (seeded_forward(copy.deepcopy(model), two_batches(), ramp) for ramp in (1.0, 0.5))
    for name in whole:
        torch.testing.assert_close(half[name], whole[name] * (0.5 if name.endswith("consistency") else 1.0))


# Who learns from what


@pytest.mark.parametrize("decoder", ["bilinear", "pixelshuffle"])
def test_each_part_learns_from_its_own_terms(decoder: str) -> None:
    model = network(decoder=decoder)
    losses = seeded_forward(model, two_batches())
    for name in ("street", "room"):
        assert learns(model, losses[f"{name}/supervised"]) == {"encoder", f"heads.{name}.main"}
        assert learns(model, losses[f"{name}/consistency"]) == {"encoder", f"heads.{name}.auxiliaries"}


def test_the_gradient_of_the_sum_is_the_sum_of_the_terms_gradients() -> None:
    model = network().double()
    losses = seeded_forward(model, two_batches())
    parts: dict[str, Tensor] = {}
    for loss in losses.values():
        model.zero_grad()
        loss.backward(retain_graph=True)  # type: ignore[no-untyped-call]
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                parts[name] = parts.get(name, torch.zeros_like(parameter)) + parameter.grad
    model.zero_grad()
    torch.stack(list(losses.values())).sum().backward()
    assert set(parts) == {name for name, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, parts[name], rtol=1e-9, atol=1e-12)


def test_a_domain_that_a_step_does_not_see_gets_no_gradient() -> None:
    model = network()
    losses = seeded_forward(model, {"room": batch(3)})
    assert list(losses) == ["room/supervised", "room/consistency"]
    torch.stack(list(losses.values())).sum().backward()
    assert all(parameter.grad is None for parameter in model.heads["street"].parameters())


def test_a_few_steps_lower_the_loss() -> None:
    model = network()
    halves = torch.arange(32).expand(32, 32) // 16  # dark on the left, light on the right
    images = (torch.randint(0, 100, (4, 3, 32, 32)) + 150 * halves).to(torch.uint8)
    batches = {name: Batch(images[:2], halves.to(torch.uint8).expand(2, 32, 32), images[2:], torch.ones(2, 32, 32).bool()) for name in ("street", "room")}
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    totals = []
    for _ in range(8):
        loss = torch.stack(list(model(batches).values())).sum()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        totals.append(loss.item())
    assert totals[-1] < 0.5 * totals[0]


# Supervision only


def test_a_domain_without_perturbations_is_supervised_only() -> None:
    model = network(street=STREET, room=HeadSettings(3))
    losses = seeded_forward(model, two_batches())
    assert list(losses) == ["street/supervised", "street/consistency", "room/supervised"]
    assert len(model.heads["room"].auxiliaries) == 0  # type: ignore[arg-type]


def test_a_step_without_unlabelled_images_is_supervised_only() -> None:
    losses = seeded_forward(network(), {"street": batch(4, unlabelled=0), "room": batch(3)})
    assert list(losses) == ["street/supervised", "room/supervised", "room/consistency"]


def test_with_weight_0_the_consistency_term_is_0_and_teaches_nothing() -> None:
    model = network(street=HeadSettings(4, MIX, consistency_weight=0.0))
    losses = seeded_forward(model, {"street": batch(4)})
    assert losses["street/consistency"] == 0
    assert learns(model, losses["street/consistency"]) == set()


# Passes through the encoder


def count_passes(model: CCT, batches: dict[str, Batch]) -> list[int]:
    """Images in each forward pass of the trunk."""
    passes: list[int] = []
    handle = model.encoder.trunk.register_forward_pre_hook(lambda module, inputs: passes.append(len(inputs[0])))
    seeded_forward(model, batches)
    handle.remove()
    return passes


@pytest.mark.parametrize("norm", ["shared", "per_domain", "frozen"])
def test_images_of_equal_crop_go_through_the_encoder_together(norm: str) -> None:
    model = network(EncoderSettings(name="test_resnet", stride=8, context="fpn", width=32, norm=norm))
    assert count_passes(model, {"street": batch(4, 2, 3), "room": batch(3, 2, 1)}) == [8]
    assert count_passes(model, {"street": batch(4, 2, 0), "room": batch(3, 2, 0)}) == [4]


def test_images_of_unequal_crop_go_through_it_by_size() -> None:
    heads = {"a": STREET, "b": ROOM, "c": STREET}
    batches = {"a": batch(4), "b": batch(3, side=64), "c": batch(4, labelled=3)}
    assert count_passes(network(**heads), batches) == [9, 4]


def test_features_return_to_the_images_they_are_of() -> None:
    # With frozen norms an image's features do not depend on its neighbours.
    model = network(FROZEN)
    batches = {"street": batch(4, 2, 3), "room": batch(3, 1, 2, seed=1)}
    together = seeded_forward(model, batches)
    for name, own in batches.items():
        alone = model({name: own})
        torch.testing.assert_close(together[f"{name}/supervised"], alone[f"{name}/supervised"])
    unequal = seeded_forward(model, {"street": batches["street"], "room": batch(3, side=64)})
    torch.testing.assert_close(unequal["street/supervised"], together["street/supervised"])


def test_with_batch_norm_training_and_evaluation_agree_once_the_statistics_have_settled() -> None:
    model = network()
    dark, light = batch(4), batch(3, seed=1)
    batches = {"street": Batch(dark.images // 4, dark.masks, dark.unlabelled // 4, dark.valid), "room": light}
    with torch.no_grad():
        for _ in range(80):
            model(batches)
        training = model(batches)
        evaluation = model.eval()(batches)
    for name in ("street", "room"):
        assert abs(training[f"{name}/supervised"] - evaluation[f"{name}/supervised"]) < 0.05


# Building


def test_a_supervised_run_starts_from_the_weights_of_the_cct_run() -> None:
    plain = network(street=HeadSettings(4), room=HeadSettings(3)).state_dict()
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
    decoders = [first[weight.format(part)] for part in ("main", "auxiliaries.0.decoder", "auxiliaries.1.decoder", "auxiliaries.2.decoder")]
    assert len({decoder.numpy().tobytes() for decoder in decoders}) == 4
    assert not torch.equal(first[weight.format("main")], other[weight.format("main")])


def test_building_leaves_the_callers_generator_alone() -> None:
    before = torch.random.get_rng_state()
    network()
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("name", ["items", "keys", "train", "training", "forward", "type"])
def test_a_domain_name_that_torch_reserves_is_refused(name: str) -> None:
    with pytest.raises(ValueError) as caught:
        network(**{name: STREET})
    assert str(caught.value) == f'a domain is named "{name}", which torch reserves for modules. Rename the domain and its YAML file.'


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
