"""Classifier, activation maps and pseudo-labels, on features and maps that one can compute by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from multidomain_cct.errors import UserError
from multidomain_cct.model.encoder import EncoderSettings
from multidomain_cct.weak.cams import (
    Classifier,
    PseudoLabelSettings,
    activation_maps,
    confident_labels,
    multilabel_loss,
    pseudo_labels,
)
from multidomain_cct.weak.crf import CrfSettings

TINY = EncoderSettings(name="test_resnet", stride=8, context="fpn", width=32)


def classifier(**domains: int) -> Classifier:
    return (
        Classifier(TINY, {name: [0.5] * count for name, count in (domains or {"fields": 3}).items()}, seed=1)
        .eval()
        .requires_grad_(False)
    )


def pictures(count: int = 2, height: int = 32, width: int = 48, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (count, 3, height, width), dtype=np.uint8))


def everywhere(images: Tensor) -> Tensor:
    return torch.ones(len(images), *images.shape[-2:], dtype=torch.bool)


def test_the_logit_of_an_image_is_the_mean_of_its_class_map_and_that_of_its_pooled_features() -> None:
    model, images = classifier(), pictures()
    logits = model({"fields": images}, {"fields": everywhere(images)})["fields"].double().numpy()
    features = model.encoder(images, [("fields", 2)]).double().numpy()
    weights = model.heads["fields"].maps.weight[:, :, 0, 0].double().numpy()
    assert np.allclose(logits, features.mean(axis=(2, 3)) @ weights.T, atol=1e-5)
    assert np.allclose(logits, np.einsum("kd,bdhw->bkhw", weights, features).mean(axis=(2, 3)), atol=1e-5)


def test_padding_is_left_out_of_the_average() -> None:
    model, images = classifier(), pictures(1)
    inside = everywhere(images)
    inside[:, 16:] = False
    features = model.encoder(images, [("fields", 1)]).double().numpy()[0, :, :2]
    weights = model.heads["fields"].maps.weight[:, :, 0, 0].double().numpy()
    assert np.allclose(
        model({"fields": images}, {"fields": inside})["fields"].numpy(), weights @ features.mean(axis=(1, 2)), atol=1e-5
    )


def test_each_domain_has_a_head_and_crops_may_differ() -> None:
    model = classifier(fields=3, shapes=2)
    images = {"fields": pictures(2), "shapes": pictures(1, 40, 40)}
    found = model(images, {name: everywhere(batch) for name, batch in images.items()})
    assert {name: logits.shape for name, logits in found.items()} == {"fields": (2, 3), "shapes": (1, 2)}
    alone = model({"shapes": images["shapes"]}, {"shapes": everywhere(images["shapes"])})["shapes"]
    assert torch.allclose(found["shapes"], alone, atol=1e-5)


def test_a_class_starts_from_the_log_odds_of_its_share() -> None:
    model, images = Classifier(TINY, {"fields": [0.9, 0.2, 1.0]}, seed=1).eval().requires_grad_(False), pictures()
    model.heads["fields"].maps.weight.zero_()
    wanted = [np.log(0.9 / 0.1), np.log(0.2 / 0.8), np.log(0.99 / 0.01)]
    assert model({"fields": images}, {"fields": everywhere(images)})["fields"].numpy() == pytest.approx(
        np.array([wanted] * 2), abs=1e-4
    )


def test_the_loss_is_the_binary_cross_entropy_in_float64() -> None:
    logits, targets = torch.tensor([[1.5, -2.0], [0.3, 4.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    probabilities = 1 / (1 + np.exp(-logits.double().numpy()))
    wanted = -np.where(targets.numpy() == 1, np.log(probabilities), np.log(1 - probabilities)).mean()
    assert float(multilabel_loss(logits, targets)) == pytest.approx(wanted, abs=1e-6)


def test_the_same_seed_builds_the_same_classifier_and_leaves_the_generator_alone() -> None:
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    first, second = classifier(), classifier()
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )


def test_activations_are_those_of_the_present_classes_with_one_as_their_largest() -> None:
    model, image = classifier(), pictures(1, 30, 45)[0]
    model.heads["fields"].maps.weight.copy_(torch.linspace(-1, 1, 96).view(3, 32, 1, 1).abs())
    activations, logits = activation_maps(model, image, "fields", present=[0, 2], scales=[1.0, 0.5])
    assert activations.shape == (2, 30, 45)
    assert logits.shape == (3,)
    assert float(activations.min()) >= 0
    assert activations.amax(dim=(1, 2)).tolist() == pytest.approx([1.0, 1.0])


def test_the_maps_of_a_mirrored_image_are_the_mirrored_maps() -> None:
    model, image = classifier(), pictures(1, 32, 48)[0]
    maps, _ = activation_maps(model, image, "fields", present=[0, 1, 2], scales=[1.0])
    mirrored, _ = activation_maps(model, image.flip(-1), "fields", present=[0, 1, 2], scales=[1.0])
    assert torch.allclose(maps, mirrored.flip(-1), atol=1e-4)


def test_a_class_that_is_nowhere_positive_stays_zero() -> None:
    model, image = classifier(), pictures(1)[0]
    model.heads["fields"].maps.weight.fill_(-1.0)
    activations, _ = activation_maps(model, image, "fields", present=[1], scales=[1.0])
    assert float(activations.max()) == 0


def test_an_image_without_classes_has_no_maps() -> None:
    activations, logits = activation_maps(classifier(), pictures(1)[0], "fields", present=[], scales=[1.0, 0.5])
    assert activations.shape == (0, 32, 48)
    assert logits.shape == (3,)


ACTIVATIONS = torch.tensor([[[0.9, 0.4, 0.2, 0.04, 0.0]], [[0.1, 0.5, 0.1, 0.01, 0.06]]])
"""Two classes on a row of five pixels."""


def test_sure_positions_are_labelled_and_the_others_are_255() -> None:
    found = confident_labels(ACTIVATIONS, [4, 7], PseudoLabelSettings(), background=0)
    assert found.tolist() == [[4, 7, 255, 0, 255]]


def test_without_a_background_class_low_positions_are_255() -> None:
    assert confident_labels(ACTIVATIONS, [4, 7], PseudoLabelSettings(), background=None).tolist() == [
        [4, 7, 255, 255, 255]
    ]


def test_the_thresholds_are_those_of_the_settings() -> None:
    settings = PseudoLabelSettings(foreground=0.95, background=0.15)
    assert confident_labels(ACTIVATIONS, [4, 7], settings, background=0).tolist() == [[255, 255, 255, 0, 0]]


def test_an_image_of_nothing_but_background_is_background() -> None:
    image = pictures(1, 6, 7)[0]
    assert (pseudo_labels(torch.zeros(0, 6, 7), image, [], PseudoLabelSettings(), background=2) == 2).all()
    assert (pseudo_labels(torch.zeros(0, 6, 7), image, [], PseudoLabelSettings(), background=None) == 255).all()


def test_without_iterations_the_random_field_changes_nothing() -> None:
    rng = np.random.default_rng(2)
    activations, image = torch.from_numpy(rng.random((3, 9, 8)) ** 2).float(), pictures(1, 9, 8)[0]
    settings = PseudoLabelSettings(crf=CrfSettings(iterations=0))
    expected = confident_labels(activations, [1, 2, 5], settings, background=0)
    assert torch.equal(pseudo_labels(activations, image, [1, 2, 5], settings, background=0), expected)


def test_the_random_field_fills_an_object_of_one_colour_up_to_its_border() -> None:
    """The map covers the middle of a red box on green ground; what lies between the thresholds is the rest of the box
    and a rim around it.
    """
    image = torch.zeros(3, 40, 40, dtype=torch.uint8)
    image[1] = 200
    image[:, 8:32, 8:32] = torch.tensor([220, 0, 0], dtype=torch.uint8)[:, None, None]
    activations = torch.zeros(1, 40, 40)
    activations[:, 7:33, 7:33] = 0.2
    activations[:, 10:30, 10:30] = 1.0
    found = pseudo_labels(activations, image, [3], PseudoLabelSettings(), background=0)
    assert (found[8:32, 8:32] == 3).all()
    outside = torch.ones(40, 40, dtype=torch.bool)
    outside[8:32, 8:32] = False
    assert (found[outside] == 0).all()


def test_pseudo_labels_hold_only_the_present_classes_background_and_255() -> None:
    rng = np.random.default_rng(4)
    activations = torch.from_numpy(rng.random((2, 24, 30))).float()
    found = pseudo_labels(activations, pictures(1, 24, 30)[0], [3, 6], PseudoLabelSettings(), background=1)
    assert found.dtype == torch.uint8
    assert set(found.unique().tolist()) <= {1, 3, 6, 255}


@pytest.mark.parametrize(
    ("settings", "key", "allowed"),
    [
        ({"steps": 0}, "steps is 0", "at least 1"),
        ({"batch": 0}, "batch is 0", "at least 1"),
        ({"lr": 0.0}, "lr is 0.0", "above 0"),
        ({"least_share": 1.0}, "least_share is 1.0", "below 1"),
        ({"scales": []}, "scales is []", "above 0"),
        ({"foreground": 0.01}, "foreground is 0.01", "at least 0.05"),
        ({"foreground": 1.0}, "foreground is 1.0", "below 1"),
        ({"background": 0.0}, "background is 0.0", "above 0"),
        ({"most_common": 0.0}, "most_common is 0.0", "above 0"),
        ({"confidence": 1.0}, "confidence is 1.0", "below 1"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, object], key: str, allowed: str) -> None:
    with pytest.raises(UserError) as error:
        PseudoLabelSettings(**settings)  # type: ignore[arg-type]
    assert str(error.value).startswith(f"pseudo_labels.{key}")
    assert allowed in str(error.value)
