"""UniMatch's terms against a short float64 computation that shares the random draws."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from multidomain_cct.data.batches.loader import Batch
from multidomain_cct.methods.strong_view import strong_view
from multidomain_cct.methods.supervised import Supervised
from multidomain_cct.methods.unimatch import UniMatch, UniMatchSettings
from multidomain_cct.methods.views import draw_cutmix
from multidomain_cct.model.encoder import EncoderSettings
from multidomain_cct.model.network import Task

FROZEN = EncoderSettings(name="test_resnet", stride=8, context="fpn", width=32, norm="frozen")
TASKS = {"street": Task((False,) * 4), "room": Task((False,) * 3, weight=0.5)}


def network(tasks: dict[str, Task] | None = None, **settings: float) -> UniMatch:
    return UniMatch(FROZEN, tasks or TASKS, decoder="bilinear", settings=UniMatchSettings(**settings)).train()


def batch(num_classes: int, labelled: int = 2, unlabelled: int = 3, seed: int = 0) -> Batch:
    draw = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (labelled + unlabelled, 3, 32, 32), dtype=torch.uint8, generator=draw)
    masks = torch.randint(0, num_classes, (labelled, 32, 32), dtype=torch.uint8, generator=draw)
    valid = torch.rand(unlabelled, 32, 32, generator=draw) < 0.8
    return Batch(images[:labelled], masks, images[labelled:], valid)


def two_batches() -> dict[str, Batch]:
    return {"street": batch(4), "room": batch(3, unlabelled=2, seed=1)}


def softmax(logits: Tensor) -> np.ndarray:
    values = logits.detach().numpy()
    powers = np.exp(values - values.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def mixed(values: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """Values of the images, each with those of its neighbour where `inside` holds."""
    return np.stack([np.where(inside[number], values[number - 1], values[number]) for number in range(len(values))])


def agreement(logits: Tensor, ids: np.ndarray, confidence: np.ndarray, valid: np.ndarray, threshold: float) -> float:
    """Mean over images of the sum over confident valid pixels of -log p(id), over the number of all valid pixels."""
    log = -np.log(np.take_along_axis(softmax(logits), ids[:, None], axis=1)[:, 0])
    kept = (confidence >= threshold) & valid
    return float(np.mean([log[number][kept[number]].sum() / valid[number].sum() for number in range(len(ids))]))


@pytest.mark.parametrize("cutmix", [0.0, 1.0])
def test_the_terms_match_float64(cutmix: float) -> None:
    batches = two_batches()
    # The median confidence of an untrained network, so that about half of the pixels count.
    plain = network().double()
    confidences = [
        plain.target(plain.encoder(own.unlabelled, [(name, len(own.unlabelled))]), name).amax(dim=1)
        for name, own in batches.items()
    ]
    threshold = float(torch.cat([values.flatten() for values in confidences]).median())
    model = network(weight=0.7, confidence=threshold, cutmix=cutmix, dropout=0.3).double()
    torch.manual_seed(5)
    found = model(batches)
    torch.manual_seed(5)
    draws = {}
    for name, own in batches.items():
        for view in (0, 1):
            draws[name, view] = (
                draw_cutmix(own.unlabelled, probability=cutmix).inside.numpy(),
                strong_view(own.unlabelled).numpy(),
            )
            assert draws[name, view][0].any() == (cutmix > 0)
    for name, own in batches.items():
        main, valid, parts = model.head(name).main, own.valid.numpy(), [(name, len(own.unlabelled))]
        features = model.encoder(own.unlabelled, parts).detach()
        weak = softmax(main(features))
        ids, confidence = weak.argmax(axis=1), weak.max(axis=1)
        strong = []
        for view in (0, 1):
            inside, images = draws[name, view]
            logits = main(model.encoder(torch.from_numpy(mixed(images, inside[:, None])), parts))
            strong.append(
                agreement(logits, mixed(ids, inside), mixed(confidence, inside), mixed(valid, inside), threshold)
            )
        dropped = agreement(main(F.dropout2d(features, 0.3)), ids, confidence, valid, threshold)
        factor = TASKS[name].weight * 0.7 / 2
        assert found[f"{name}/strong"].item() == pytest.approx(factor * (strong[0] + strong[1]) / 2, rel=1e-9)
        assert found[f"{name}/feature"].item() == pytest.approx(factor * dropped, rel=1e-9)
        assert min(*strong, dropped) > 0


def test_the_more_pixels_are_confident_the_more_the_term_weighs() -> None:
    batches = {"street": batch(4)}
    terms = []
    for threshold in (0.0, 0.3, 0.35, 0.999999):
        model = network(confidence=threshold)
        torch.manual_seed(5)
        terms.append(model(batches)["street/strong"])
    assert terms[0] > terms[1] > terms[2] > terms[3] == 0
    terms[3].backward()  # 0, with a graph


def test_supervised_losses_are_those_of_every_method() -> None:
    batches = two_batches()
    plain = Supervised(FROZEN, TASKS, decoder="bilinear")(batches)
    found = network()(batches)
    assert list(found) == [
        "street/supervised",
        "room/supervised",
        "street/strong",
        "street/feature",
        "room/strong",
        "room/feature",
    ]
    for name, loss in plain.items():
        torch.testing.assert_close(found[name], loss)


def test_pseudo_labels_carry_no_gradient() -> None:
    """With the weak view's features kept apart, the strong term's gradient reaches the decoder through the strong views
    alone.
    """
    model, batches = network(confidence=0.0, cutmix=0.0).double(), {"street": batch(4)}
    torch.manual_seed(5)
    (found,) = torch.autograd.grad(model(batches)["street/strong"], model.head("street").main.classify.weight)
    torch.manual_seed(5)
    own, total = batches["street"], torch.zeros((), dtype=torch.float64)
    ids = model.target(model.encoder(own.unlabelled, [("street", 3)]), "street").argmax(dim=1)
    for _ in (0, 1):
        draw_cutmix(own.unlabelled, probability=0.0)
        pixels = F.cross_entropy(
            model.head("street").main(model.encoder(strong_view(own.unlabelled), [("street", 3)])),
            ids,
            reduction="none",
        )
        total = total + ((pixels * own.valid).sum(dim=(1, 2)) / own.valid.sum(dim=(1, 2))).mean() / 4
    (expected,) = torch.autograd.grad(total, model.head("street").main.classify.weight)
    torch.testing.assert_close(found, expected)


def test_all_views_of_all_domains_go_through_the_encoder_in_one_pass() -> None:
    model, sizes = network(), []
    model.encoder.backbone.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    model(two_batches())
    assert sizes == [2 + 2 + 3 * 3 + 3 * 2]


def test_a_domain_with_borrowed_labels_agrees_with_itself_through_the_lenders_head() -> None:
    model = network(TASKS | {"dusk": replace(TASKS["street"], head="street")}, confidence=0.0)
    losses = model({"dusk": batch(4, labelled=0)})
    assert list(losses) == ["dusk/strong", "dusk/feature"]
    torch.stack(list(losses.values())).sum().backward()
    assert all(parameter.grad is not None for parameter in model.head("street").parameters())


def test_a_step_without_unlabelled_images_is_supervised_only() -> None:
    assert list(network()({"street": batch(4, unlabelled=0)})) == ["street/supervised"]
