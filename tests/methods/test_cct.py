"""CCT adds a consistency loss, and one on pseudo-labels, to the supervised one; each part of the network learns from
its own losses.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multidomain_cct.data.batches.loader import Batch
from multidomain_cct.methods.cct import CCT
from multidomain_cct.model.auxiliary import AuxiliaryDecoder
from multidomain_cct.model.decoders import DecoderGroup
from multidomain_cct.model.encoder import EncoderSettings
from multidomain_cct.model.losses import ConsistencySettings
from multidomain_cct.model.network import Task
from multidomain_cct.model.object_masks import ObjectMasks, objects_of
from multidomain_cct.model.perturbations import (
    AdversarialNoise,
    ContextMask,
    Dropout,
    FeatureDrop,
    FeatureNoise,
    GuidedCutout,
    ObjectMask,
    Perturbation,
)

MIX: tuple[Perturbation, ...] = (FeatureNoise(), FeatureDrop(), Dropout(), ObjectMask())
TINY = EncoderSettings(name="test_resnet", stride=8, context="fpn", width=32)
FROZEN = EncoderSettings(name="test_resnet", stride=8, context="fpn", width=32, norm="frozen")
LINEAR = ConsistencySettings(weight=1.5, ramp="linear", ramp_fraction=0.4)
STREET = Task((False, True, True, False), perturbations=MIX, weight=1.0, consistency=LINEAR)
ROOM = Task((True, False, True), perturbations=MIX[:1], weight=0.5, consistency=replace(LINEAR, weight=2.0))


def network(encoder: EncoderSettings = TINY, decoder: str = "bilinear", seed: int = 0, **tasks: Task) -> CCT:
    return CCT(encoder, tasks or {"street": STREET, "room": ROOM}, decoder=decoder, seed=seed)


def batch(num_classes: int, labelled: int = 2, unlabelled: int = 2, side: int = 32, seed: int = 0) -> Batch:
    draw = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (labelled + unlabelled, 3, side, side), dtype=torch.uint8, generator=draw)
    masks = torch.randint(0, num_classes, (labelled, side, side), dtype=torch.uint8, generator=draw)
    masks[:, :2] = 255
    valid = torch.rand(unlabelled, side, side, generator=draw) < 0.9
    return Batch(images[:labelled], masks, images[labelled:], valid)


def two_batches() -> dict[str, Batch]:
    return {"street": batch(4), "room": batch(3, seed=1)}


def seeded_forward(model: CCT, batches: dict[str, Batch], progress: float = 1.0) -> dict[str, Tensor]:
    torch.manual_seed(5)  # of the perturbations
    losses: dict[str, Tensor] = model(batches, progress)
    return losses


def learns(model: CCT, loss: Tensor) -> set[str]:
    """The parts of the network that get a gradient other than 0 from a loss."""
    model.zero_grad(set_to_none=True)
    loss.backward(retain_graph=True)  # type: ignore[no-untyped-call]
    found = {
        name for name, parameter in model.named_parameters() if parameter.grad is not None and parameter.grad.any()
    }
    return {".".join(name.split(".")[: 3 if name.startswith("heads") else 1]) for name in found}


# The losses of a step


def test_the_terms_are_named_by_domain_and_are_scalars() -> None:
    losses = seeded_forward(network(), two_batches())
    assert list(losses) == ["street/supervised", "room/supervised", "street/consistency", "room/consistency"]
    assert all(loss.shape == () and loss.isfinite() and loss > 0 for loss in losses.values())


def objects_in(target: Tensor, own: Batch, task: Task) -> ObjectMasks:
    return ObjectMasks(objects_of(target[:, :, 4::8, 4::8], own.valid, task.things, 8))


def prediction(auxiliary: nn.Module, z: Tensor, objects: ObjectMasks) -> Tensor:
    """(U, C, H, W) logits of perturbed features."""
    assert isinstance(auxiliary, AuxiliaryDecoder)
    logits: Tensor = auxiliary.decoder(auxiliary.perturbation(z, objects, DecoderGroup.of([auxiliary.decoder]))[0])
    return logits


def test_the_terms_are_those_of_the_papers_equations_with_their_weights() -> None:
    model = network(FROZEN).double()
    batches = {"street": batch(4), "room": batch(3, unlabelled=1, seed=1)}
    found = seeded_forward(model, batches, progress=0.1)
    torch.manual_seed(5)
    for name, settings in (("street", STREET), ("room", ROOM)):
        own, head = batches[name], model.heads[name]
        z = model.encoder(own.images, [(name, 2)])
        pixels = F.cross_entropy(head.main(z), own.masks.long(), ignore_index=255, reduction="none")  # type: ignore[union-attr, operator]
        supervised = (pixels.sum(dim=(1, 2)) / (own.masks != 255).sum(dim=(1, 2))).mean()
        torch.testing.assert_close(found[f"{name}/supervised"], settings.weight * supervised)
        z = model.encoder(own.unlabelled, [(name, len(own.unlabelled))]).detach()
        target = head.main(z).softmax(dim=1)  # type: ignore[union-attr, operator]
        objects = objects_in(target, own, settings)
        distances = []
        for auxiliary in head.auxiliaries:  # type: ignore[union-attr]
            squares = (prediction(auxiliary, z, objects).softmax(dim=1) - target).square().sum(dim=1) * own.valid
            distances.append((squares.sum(dim=(1, 2)) / own.valid.sum(dim=(1, 2))).mean())
        expected = settings.weight * settings.consistency.weight * 0.25 * torch.stack(distances).mean()
        torch.testing.assert_close(
            found[f"{name}/consistency"], expected.detach(), check_stride=False, rtol=1e-9, atol=0
        )


def test_the_ramp_scales_the_consistency_terms_only() -> None:
    model = network()
    whole, half = (seeded_forward(copy.deepcopy(model), two_batches(), progress) for progress in (1.0, 0.2))
    for name in whole:
        torch.testing.assert_close(half[name], whole[name] * (0.5 if name.endswith("consistency") else 1.0))


def predicted(model: CCT, own: Batch, name: str) -> tuple[Tensor, Tensor]:
    """Features of the unlabelled images and the main decoder's probabilities, with norms that do not mix images."""
    z = model.encoder(own.unlabelled, [(name, len(own.unlabelled))]).detach()
    return z, model.head(name).main(z).softmax(dim=1).detach()


def test_pixels_that_the_main_decoder_predicts_without_confidence_do_not_count() -> None:
    own = batch(4)
    plain = network(FROZEN, street=replace(STREET, perturbations=(ObjectMask(),))).double()
    z, target = predicted(plain, own, "street")
    threshold = target.amax(dim=1).median().item()
    model = network(
        FROZEN,
        street=replace(
            STREET, perturbations=(ObjectMask(),), consistency=ConsistencySettings(weight=1.0, confidence=threshold)
        ),
    ).double()
    found = seeded_forward(model, {"street": own})["street/consistency"]
    logits = prediction(model.head("street").auxiliaries[0], z, objects_in(target, own, STREET))
    counted = own.valid & (target.amax(dim=1) >= threshold)
    squares = (logits.softmax(dim=1) - target).square().sum(dim=1).where(counted, 0)
    torch.testing.assert_close(
        found, (squares.sum(dim=(1, 2)) / counted.sum(dim=(1, 2))).mean().detach(), check_stride=False
    )
    nobody = network(FROZEN, street=replace(STREET, consistency=ConsistencySettings(confidence=0.999))).double()
    losses = seeded_forward(nobody, {"street": own})
    assert losses["street/consistency"] == 0
    assert learns(nobody, losses["street/consistency"]) == set()


def test_the_same_weight_in_the_authors_unit_is_a_share_of_it() -> None:
    tasks = {
        unit: replace(STREET, consistency=ConsistencySettings(weight=6.0, weight_unit=unit))
        for unit in ("pixel", "authors")
    }
    found = {
        unit: seeded_forward(network(FROZEN, street=task), {"street": batch(4)})["street/consistency"]
        for unit, task in tasks.items()
    }
    torch.testing.assert_close(found["pixel"], 4 * found["authors"])


@pytest.mark.parametrize("distance", ["mse", "kl", "js"])
def test_the_distance_is_the_one_that_was_chosen(distance: str) -> None:
    own = batch(4)
    task = replace(
        STREET, perturbations=(ObjectMask(),), consistency=ConsistencySettings(weight=1.0, distance=distance)
    )
    model = network(FROZEN, street=task).double()
    z, p = predicted(model, own, "street")
    logits = prediction(model.head("street").auxiliaries[0], z, objects_in(p, own, STREET))
    q = logits.softmax(dim=1).detach()
    mixture = (p + q) / 2
    pixels = {
        "mse": (p - q).square(),
        "kl": p * (p / q).log(),
        "js": (p * (p / mixture).log() + q * (q / mixture).log()) / 2,
    }[distance].sum(dim=1)
    expected = (pixels.where(own.valid, 0).sum(dim=(1, 2)) / own.valid.sum(dim=(1, 2))).mean()
    torch.testing.assert_close(
        seeded_forward(model, {"street": own})["street/consistency"].detach(),
        expected,
        check_stride=False,
        rtol=1e-9,
        atol=0,
    )


def test_pseudo_labels_give_a_term_of_their_own_under_the_same_ramp() -> None:
    own = batch(4)
    labels = torch.randint(
        0, 4, own.valid.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(3)
    ).masked_fill(~own.valid, 255)
    own = replace(own, pseudo_labels=labels)
    task = replace(
        STREET, weight=0.5, perturbations=(ObjectMask(), ContextMask()), consistency=replace(LINEAR, weak_weight=0.4)
    )
    model = network(FROZEN, street=task).double()
    losses = seeded_forward(model, {"street": own}, progress=0.1)
    assert list(losses) == ["street/supervised", "street/consistency", "street/weak"]
    z, target = predicted(model, own, "street")
    objects = objects_in(target, own, STREET)
    predictions = [prediction(auxiliary, z, objects) for auxiliary in model.head("street").auxiliaries]
    entropies = [F.cross_entropy(logits, labels.long(), ignore_index=255, reduction="none") for logits in predictions]
    means = [(pixels.sum(dim=(1, 2)) / (labels != 255).sum(dim=(1, 2))).mean() for pixels in entropies]
    expected = 0.5 * 0.4 * 0.25 * torch.stack(means).mean()
    torch.testing.assert_close(losses["street/weak"], expected, check_stride=False, rtol=1e-9, atol=0)
    assert learns(model, losses["street/weak"]) == {"encoder", "heads.street.auxiliaries"}


def test_images_that_the_context_mask_erases_contribute_0_to_both_losses() -> None:
    own = replace(batch(4), pseudo_labels=torch.ones(2, 32, 32, dtype=torch.uint8))
    model = network(FROZEN, street=replace(STREET, things=(False,) * 4, perturbations=(ContextMask(),)))
    losses = seeded_forward(model, {"street": own})
    assert losses["street/consistency"] == losses["street/weak"] == 0
    assert learns(model, losses["street/consistency"] + losses["street/weak"]) == set()


def test_a_domain_that_borrows_a_head_is_consistent_under_its_own_settings() -> None:
    night = Task(STREET.things, head="street", weight=0.5, consistency=replace(LINEAR, weight=3.0))
    model = network(FROZEN, street=STREET, night=night)
    own = batch(4)
    alone = [seeded_forward(model, {name: own})[f"{name}/consistency"] for name in ("street", "night")]
    torch.testing.assert_close(alone[1], alone[0])  # half of twice the weight
    assert learns(model, alone[1]) == {"encoder", "heads.street.auxiliaries"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_all_seven_perturbations_train_inside_autocast(dtype: torch.dtype) -> None:
    seven = (
        FeatureNoise(),
        FeatureDrop(),
        Dropout(),
        ObjectMask(),
        ContextMask(),
        GuidedCutout(min_area=1),
        AdversarialNoise(),
    )
    model = network(street=replace(STREET, perturbations=seven))
    with torch.autocast("cpu", dtype=dtype):
        losses = seeded_forward(model, {"street": batch(4, side=64)})
    torch.stack(list(losses.values())).sum().backward()  # type: ignore[no-untyped-call]
    assert all(loss.dtype == torch.float32 and loss.isfinite() for loss in losses.values())
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


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
    batches = {
        name: Batch(images[:2], halves.to(torch.uint8).expand(2, 32, 32), images[2:], torch.ones(2, 32, 32).bool())
        for name in ("street", "room")
    }
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
    model = network(street=STREET, room=Task(ROOM.things))
    losses = seeded_forward(model, two_batches())
    assert list(losses) == ["street/supervised", "room/supervised", "street/consistency"]
    assert len(model.heads["room"].auxiliaries) == 0  # type: ignore[arg-type]


def test_a_step_without_unlabelled_images_is_supervised_only() -> None:
    losses = seeded_forward(network(), {"street": batch(4, unlabelled=0), "room": batch(3)})
    assert list(losses) == ["street/supervised", "room/supervised", "room/consistency"]


def test_with_weight_0_the_consistency_term_is_0_and_teaches_nothing() -> None:
    model = network(street=replace(STREET, consistency=ConsistencySettings(weight=0.0)))
    losses = seeded_forward(model, {"street": batch(4)})
    assert losses["street/consistency"] == 0
    assert learns(model, losses["street/consistency"]) == set()


# Passes through the encoder


def count_passes(model: CCT, batches: dict[str, Batch]) -> list[int]:
    """Images in each forward pass of the backbone."""
    passes: list[int] = []
    handle = model.encoder.backbone.register_forward_pre_hook(lambda module, inputs: passes.append(len(inputs[0])))
    seeded_forward(model, batches)
    handle.remove()
    return passes


@pytest.mark.parametrize("norm", ["shared", "per_domain", "frozen"])
def test_images_of_equal_crop_go_through_the_encoder_together(norm: str) -> None:
    model = network(EncoderSettings(name="test_resnet", stride=8, context="fpn", width=32, norm=norm))
    assert count_passes(model, {"street": batch(4, 2, 3), "room": batch(3, 2, 1)}) == [8]
    assert count_passes(model, {"street": batch(4, 2, 0), "room": batch(3, 2, 0)}) == [4]


def test_images_of_unequal_crop_go_through_it_by_size() -> None:
    tasks = {"a": STREET, "b": ROOM, "c": STREET}
    batches = {"a": batch(4), "b": batch(3, side=64), "c": batch(4, labelled=3)}
    assert count_passes(network(**tasks), batches) == [9, 4]


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
