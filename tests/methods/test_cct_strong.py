"""A teacher predicts the weak view; main and auxiliary decoders learn it on a strong, mixed view."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from multidomain_cct.data.batches.loader import Batch
from multidomain_cct.errors import UserError
from multidomain_cct.methods.cct_strong import CCTStrong, CCTStrongSettings
from multidomain_cct.methods.strong_view import strong_view
from multidomain_cct.methods.supervised import Supervised
from multidomain_cct.methods.views import draw_half_boxes
from multidomain_cct.model.encoder import EncoderSettings
from multidomain_cct.model.losses import ConsistencySettings
from multidomain_cct.model.network import Task
from multidomain_cct.model.perturbations import Dropout, FeatureDrop, FeatureNoise, Perturbation

FROZEN = EncoderSettings(name="test_resnet", stride=8, context="fpn", width=32, norm="frozen")
MSE = ConsistencySettings(weight=1.5, ramp="none")
PLAIN = CCTStrongSettings(thresholds="fixed", alignment=0.0, confidence=0.37)
TASKS = {
    "street": Task((False,) * 4, perturbations=(Dropout(), Dropout()), consistency=MSE),
    "room": Task((False,) * 3, weight=0.5, consistency=replace(MSE, weight=0.0)),
}


def network(settings: CCTStrongSettings = PLAIN, **tasks: Task) -> CCTStrong:
    return CCTStrong(FROZEN, tasks or TASKS, decoder="bilinear", settings=settings).train()


def batch(num_classes: int, labelled: int = 2, unlabelled: int = 3, seed: int = 0) -> Batch:
    draw = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (labelled + unlabelled, 3, 32, 32), dtype=torch.uint8, generator=draw)
    masks = torch.randint(0, num_classes, (labelled, 32, 32), dtype=torch.uint8, generator=draw)
    valid = torch.rand(unlabelled, 32, 32, generator=draw) < 0.8
    return Batch(images[:labelled], masks, images[labelled:], valid)


def two_batches() -> dict[str, Batch]:
    return {"street": batch(4), "room": batch(3, unlabelled=2, seed=1)}


def unlike_its_teacher(model: CCTStrong) -> CCTStrong:
    model.after_step()
    with torch.no_grad():
        for parameter in (*model.encoder.parameters(), *model.heads.parameters()):
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def mean_over_valid(pixels: Tensor, valid: Tensor) -> Tensor:
    return (pixels.where(valid, 0).sum(dim=(1, 2)) / valid.sum(dim=(1, 2)).clamp(min=1)).mean()


@pytest.mark.parametrize("gate", ["image", "pixel"])
@pytest.mark.parametrize("target", ["hard", "soft"])
def test_the_main_decoder_learns_the_teachers_prediction_on_the_mixed_strong_view(gate: str, target: str) -> None:
    model = unlike_its_teacher(network(replace(PLAIN, gate=gate, target=target, weight=0.7)))
    batches = two_batches()
    torch.manual_seed(3)
    losses = model(batches, progress=1.0)
    torch.manual_seed(3)
    for name, own in batches.items():
        probabilities = model.logits(own.unlabelled, name).softmax(dim=1).detach()
        confident = own.valid & (probabilities.amax(dim=1) >= 0.37)
        mix = draw_half_boxes(own.unlabelled, 1.0)
        strong, mixed, gated, valid = (
            mix(part) for part in (strong_view(own.unlabelled), probabilities, confident, own.valid)
        )
        logits = model.head(name).main(model.encoder(strong, [(name, len(strong))]))
        log = logits.log_softmax(dim=1)
        pixels = (
            -(mixed * log).sum(dim=1)
            if target == "soft"
            else -log.gather(1, mixed.argmax(dim=1, keepdim=True)).squeeze(1)
        )
        share = gated.sum(dim=(1, 2)) / valid.sum(dim=(1, 2))
        assert 0 < share.min()
        assert share.min() < 1
        weights = share.view(-1, 1, 1) if gate == "image" else gated
        expected = 0.7 * TASKS[name].weight * mean_over_valid(pixels * weights, valid)
        torch.testing.assert_close(losses[f"{name}/strong"], expected, rtol=1e-4, atol=1e-6)
    assert list(losses) == [
        "street/supervised",
        "room/supervised",
        "street/strong",
        "street/consistency",
        "room/strong",
    ]


def test_auxiliary_decoders_see_perturbed_strong_features_and_learn_the_same_target() -> None:
    class Same(Perturbation):
        def __call__(self, features: Tensor, objects: object, group: object) -> Tensor:
            return features[None].expand(len(group), *features.shape)  # type: ignore[arg-type]

    model = unlike_its_teacher(network(street=replace(TASKS["street"], perturbations=(Same(), Same()))))
    own = batch(4)
    torch.manual_seed(3)
    losses = model({"street": own}, progress=1.0)
    torch.manual_seed(3)
    target = model.logits(own.unlabelled, "street").softmax(dim=1).detach()
    mix = draw_half_boxes(own.unlabelled, 1.0)
    features = model.encoder(mix(strong_view(own.unlabelled)), [("street", 3)])
    distances = [
        (auxiliary.decoder(features).softmax(dim=1) - mix(target)).square().sum(dim=1)  # type: ignore[operator]
        for auxiliary in model.head("street").auxiliaries
    ]
    expected = 1.5 * torch.stack([mean_over_valid(each, mix(own.valid)) for each in distances]).mean()
    torch.testing.assert_close(losses["street/consistency"], expected, rtol=1e-4, atol=1e-6)


def test_no_gradient_reaches_the_teacher_and_each_decoder_learns_from_its_own_loss() -> None:
    model = unlike_its_teacher(network())
    losses = model({"street": batch(4, labelled=0)}, progress=1.0)
    losses["street/consistency"].backward(retain_graph=True)  # type: ignore[no-untyped-call]
    assert all(parameter.grad is None for parameter in model.head("street").main.parameters())
    assert all(parameter.grad is not None for parameter in model.head("street").auxiliaries.parameters())
    losses["street/strong"].backward()  # type: ignore[no-untyped-call]
    assert all(parameter.grad is not None for parameter in model.head("street").main.parameters())
    assert model.teacher is not None
    assert all(parameter.grad is None for parameter in model.teacher.parameters())


def test_supervised_losses_are_those_of_every_method() -> None:
    batches = two_batches()
    plain = Supervised(FROZEN, TASKS, decoder="bilinear")(batches)
    losses = network()(batches)
    for name in batches:
        torch.testing.assert_close(losses[f"{name}/supervised"], plain[f"{name}/supervised"])


def test_running_means_follow_what_was_counted_over_all_micro_batches_once_per_step() -> None:
    model, own = network(), batch(4)
    probabilities = model.logits(own.unlabelled, "street").softmax(dim=1).detach()
    for _ in range(2):
        model({"street": own}, progress=1.0)
    model.after_step()
    statistics = model.statistics["street"]
    valid, ids = own.valid, probabilities.argmax(dim=1)
    # The first step keeps half of the uniform start.
    mean = (probabilities * valid.unsqueeze(1)).sum(dim=(0, 2, 3)) / valid.sum()
    torch.testing.assert_close(statistics.probability, 0.5 * (0.25 + mean), rtol=1e-4, atol=1e-5)
    shares = torch.stack([(valid & (ids == label)).sum() for label in range(4)]) / valid.sum()
    torch.testing.assert_close(statistics.predicted, 0.5 * (0.25 + shares), rtol=1e-4, atol=1e-5)
    assert statistics.pending.count_nonzero() == 0
    before = statistics.probability.clone()
    model.after_step()
    torch.testing.assert_close(statistics.probability, before)


def set_statistics(model: CCTStrong, **values: list[float]) -> None:
    for name, value in values.items():
        model.statistics["street"].get_buffer(name).copy_(torch.tensor(value))


def test_alignment_draws_class_shares_toward_the_labelled_ones() -> None:
    task = replace(TASKS["street"], class_pixels=(70, 10, 10, 10))
    model = network(replace(PLAIN, alignment=0.5), street=task)
    set_statistics(model, probability=[0.4, 0.4, 0.1, 0.1])
    probabilities = torch.rand(2, 4, 3, 3).softmax(dim=1)
    ratio = np.array([0.7 / 0.4, 0.1 / 0.4, 1, 1]) ** 0.5
    expected = probabilities.double().numpy() * ratio[:, None, None]
    expected /= expected.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(model._aligned("street", probabilities).numpy(), expected, rtol=1e-5)
    unknown = network(replace(PLAIN, alignment=0.5))
    assert unknown._aligned("street", probabilities) is probabilities


def test_a_hard_class_has_a_lower_threshold() -> None:
    model = network(replace(PLAIN, thresholds="class", confidence=0.9))
    set_statistics(model, confidence=[0.8, 0.4, 0.6, 0.8])
    torch.testing.assert_close(model._thresholds("street"), torch.tensor([0.9, 0.45, 0.675, 0.9]))


def test_a_class_with_labels_and_hardly_any_target_vanishes() -> None:
    model = network(street=replace(TASKS["street"], class_pixels=(80, 10, 10, 0)))
    set_statistics(model, predicted=[0.94, 0.055, 0.005, 0.0], gated=[0.47, 0.055, 0.0, 0.0])
    health = model.class_health("street")
    assert [each.vanishes for each in health] == [False, False, True, False]
    assert [round(each.kept, 3) for each in health] == [0.5, 1.0, 0.0, 0.0]


@pytest.mark.parametrize("mix", ["cutmix", "classmix", "none"])
def test_images_and_targets_are_mixed_alike(mix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = network(replace(PLAIN, mix=mix))
    monkeypatch.setattr("multidomain_cct.methods.cct_strong.strong_view", lambda images: images)
    own = batch(4, unlabelled=4)
    view = model._strong_view("street", own)
    alone = model.logits(own.unlabelled, "street").softmax(dim=1)
    changed = (view.images != own.unlabelled).any(dim=1)
    assert changed.any() == (mix != "none")
    for number in range(4):
        before = (number - 1) % 4
        expected = torch.where(changed[number], alone[before], alone[number])
        torch.testing.assert_close(view.target[number], expected, rtol=1e-4, atol=1e-5)


def test_a_domain_has_its_own_settings() -> None:
    other = replace(PLAIN, weight=0.0)
    model = network(street=replace(TASKS["street"], settings=other), room=TASKS["room"])
    losses = model(two_batches())
    assert losses["street/strong"] == 0
    assert losses["room/strong"] > 0


def test_pasted_pixels_come_with_their_image_and_their_label() -> None:
    model = network(replace(PLAIN, mix="none", paste=1.0), street=replace(TASKS["street"], class_pixels=(97, 1, 1, 1)))
    own = replace(batch(4), masks=torch.randint(0, 2, (2, 32, 32), dtype=torch.uint8))
    view = model._strong_view("street", own)
    for number in range(3):
        certain = view.target[number].amax(dim=0) == 1
        label = int(view.target[number].argmax(dim=0)[certain].unique())
        donor = next(each for each in range(2) if torch.equal(own.masks[each] == label, certain))
        assert torch.equal(view.images[number][:, certain], own.images[donor][:, certain])
        assert view.gate[number][certain].all()
        assert view.valid[number][certain].all()


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("decay", 1.0),
        ("decay", -0.1),
        ("weight", -1.0),
        ("mix", "cutout"),
        ("mix_probability", 1.5),
        ("paste", -0.5),
        ("target", "sharp"),
        ("confidence", 1.0),
        ("gate", "row"),
        ("thresholds", "flex"),
        ("alignment", 2.0),
    ],
)
def test_a_setting_outside_its_range_is_refused_by_name(setting: str, value: object) -> None:
    with pytest.raises(UserError, match=rf"cct_strong\.{setting} is"):
        CCTStrongSettings(**{setting: value})  # type: ignore[arg-type]


def test_a_student_with_wide_perturbations_learns_without_nan() -> None:
    task = replace(TASKS["street"], perturbations=(FeatureNoise(), FeatureDrop(), Dropout()))
    model = network(street=task)
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    own, values = batch(4), []
    for _ in range(5):
        total = torch.stack(list(model({"street": own}, progress=1.0).values())).sum()
        optimiser.zero_grad()
        total.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        model.after_step()
        values.append(float(total.detach()))
    assert np.isfinite(values).all()
