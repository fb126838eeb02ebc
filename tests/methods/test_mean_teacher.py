"""The teacher is a running average of the model, learns from nothing else, and is what predicts."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from multidomain_cct.data.batches.loader import Batch
from multidomain_cct.methods.mean_teacher import MeanTeacher, MeanTeacherSettings
from multidomain_cct.methods.strong_view import strong_view
from multidomain_cct.methods.supervised import Supervised
from multidomain_cct.methods.views import draw_cutmix
from multidomain_cct.model.encoder import EncoderSettings
from multidomain_cct.model.losses import ConsistencySettings
from multidomain_cct.model.network import Segmenter, Task

SHARED = EncoderSettings(name="test_resnet", stride=8, context="fpn", width=32)
FROZEN = replace(SHARED, norm="frozen")
MSE = ConsistencySettings(weight=1.5, ramp="linear", ramp_fraction=0.5)
TASKS = {
    "street": Task((False,) * 4, consistency=MSE),
    "room": Task((False,) * 3, weight=0.5, consistency=replace(MSE, weight=2.0)),
}


def network(encoder: EncoderSettings = FROZEN, tasks: dict[str, Task] | None = None, **settings: float) -> MeanTeacher:
    return MeanTeacher(encoder, tasks or TASKS, decoder="bilinear", settings=MeanTeacherSettings(**settings)).train()


def batch(num_classes: int, labelled: int = 2, unlabelled: int = 3, seed: int = 0) -> Batch:
    draw = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (labelled + unlabelled, 3, 32, 32), dtype=torch.uint8, generator=draw)
    masks = torch.randint(0, num_classes, (labelled, 32, 32), dtype=torch.uint8, generator=draw)
    valid = torch.rand(unlabelled, 32, 32, generator=draw) < 0.8
    return Batch(images[:labelled], masks, images[labelled:], valid)


def two_batches() -> dict[str, Batch]:
    return {"street": batch(4), "room": batch(3, unlabelled=2, seed=1)}


def moved(model: MeanTeacher) -> MeanTeacher:
    """The model with weights unlike its teacher's, as in the middle of a run."""
    model.after_step()
    with torch.no_grad():
        for parameter in (*model.encoder.parameters(), *model.heads.parameters()):
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def optimise(model: MeanTeacher, batches: dict[str, Batch]) -> None:
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    torch.stack(list(model(batches).values())).sum().backward()
    optimiser.step()
    model.after_step()


def softmax(logits: Tensor) -> np.ndarray:
    values = logits.detach().numpy()
    powers = np.exp(values - values.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def mixed(values: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """Values of the images, each with those of its neighbour where `inside` holds."""
    return np.stack([np.where(inside[number], values[number - 1], values[number]) for number in range(len(values))])


@pytest.mark.parametrize("confidence", [0.0, 0.35])
def test_the_loss_is_the_distance_from_the_teachers_weak_view(confidence: float) -> None:
    tasks = {
        name: replace(task, consistency=replace(task.consistency, confidence=confidence))
        for name, task in TASKS.items()
    }
    model, batches = moved(network(tasks=tasks).double()), two_batches()
    torch.manual_seed(5)
    found = model(batches, progress=0.125)
    torch.manual_seed(5)
    for name, own in batches.items():
        inside, task = draw_cutmix(own.unlabelled, probability=0.5).inside.numpy(), tasks[name]
        assert inside.any() or name == "room"
        strong = torch.from_numpy(mixed(strong_view(own.unlabelled).numpy(), inside[:, None]))
        parts = [(name, len(strong))]
        student = softmax(model.head(name).main(model.encoder(strong, parts)))
        teacher = mixed(
            softmax(model.teacher.heads.get_submodule(name).main(model.teacher.encoder(own.unlabelled, parts))),
            inside[:, None],
        )
        counted = mixed(own.valid.numpy(), inside) & (teacher.max(axis=1) >= confidence)
        assert 0.05 < counted.mean() < 0.9
        squares = ((student - teacher) ** 2).sum(axis=1)
        distance = np.mean([squares[number][counted[number]].mean() for number in range(len(strong))])
        # A linear ramp over half the run is at a quarter after an eighth of it.
        expected = task.weight * task.consistency.weight * 0.25 * distance
        assert found[f"{name}/consistency"].item() == pytest.approx(expected, rel=1e-9)


def test_supervised_losses_are_those_of_every_method() -> None:
    model, batches = network(), two_batches()
    plain = Supervised(FROZEN, TASKS, decoder="bilinear")(batches)
    found = model(batches)
    assert set(plain) == {"street/supervised", "room/supervised"}
    assert len(found) == 4
    for name, loss in plain.items():
        torch.testing.assert_close(found[name], loss)


def test_distance_and_weight_unit_are_those_of_consistency() -> None:
    losses = []
    for unit, weight in (("pixel", 2.0), ("authors", 8.0)):
        tasks = {
            "street": replace(
                TASKS["street"], consistency=ConsistencySettings(weight=weight, weight_unit=unit, distance="kl")
            )
        }
        model = network(tasks=tasks)
        torch.manual_seed(5)
        losses.append(model({"street": batch(4)})["street/consistency"].item())
    assert losses[0] == pytest.approx(losses[1])
    assert losses[0] > 0


def test_the_teacher_is_the_running_average_of_the_model_and_its_statistics() -> None:
    model, batches = network(SHARED, decay=0.6), two_batches()
    average = {name: tensor.double() for name, tensor in model.teacher.state_dict().items()}
    # In the first steps the average is a plain mean, so that the random start is soon forgotten; then the decay holds.
    for decay in (1 / 2, 0.6, 0.6):
        optimise(model, batches)
        own = model.state_dict()
        for name in average:
            average[name] = decay * average[name] + (1 - decay) * own[name].double()
        for name, tensor in model.teacher.state_dict().items():
            if name.endswith("num_batches_tracked"):
                assert tensor == own[name] > 0
            else:
                torch.testing.assert_close(tensor.double(), average[name], rtol=1e-5, atol=1e-6)
    assert any(name.endswith("running_var") for name in average)


def test_the_teacher_is_in_evaluation_mode_and_learns_nothing() -> None:
    model = network(SHARED)
    assert not any(module.training for module in model.teacher.modules())
    assert model.encoder.training
    before = copy.deepcopy(model.teacher.state_dict())
    torch.stack(list(model(two_batches()).values())).sum().backward()
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in model.teacher.parameters())
    assert all(parameter.grad is not None for parameter in (*model.encoder.parameters(), *model.heads.parameters()))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.teacher.state_dict().items())


def test_what_predicts_is_the_teacher() -> None:
    model, images = network().eval(), batch(4).unlabelled
    before = model.logits(images, "street")
    moved(model).eval()
    torch.testing.assert_close(model.logits(images, "street"), before)
    own = Segmenter.logits(model, images, "street")
    assert not torch.allclose(own, before)
    model.updates.fill_(0)
    model.load_state_dict(model.state_dict())
    torch.testing.assert_close(model.eval().logits(images, "street"), own)


def test_a_run_that_starts_from_given_weights_gives_them_to_its_teacher() -> None:
    model = network()
    given = Supervised(FROZEN, TASKS, decoder="bilinear", seed=7)
    model.load_state_dict(given.state_dict(), strict=False)
    for name, tensor in given.state_dict().items():
        assert torch.equal(model.teacher.state_dict()[name], tensor), name


def test_a_domain_with_borrowed_labels_is_taught_by_the_lenders_teacher() -> None:
    model = network(tasks=TASKS | {"dusk": Task((False,) * 4, head="street", consistency=MSE)})
    losses = model({"dusk": batch(4, labelled=0)})
    assert list(losses) == ["dusk/consistency"]
    assert set(model.teacher.heads.keys()) == {"street", "room"}
    images = batch(4).images
    assert torch.equal(model.eval().logits(images, "dusk"), model.logits(images, "street"))


def test_a_step_without_unlabelled_images_is_supervised_only() -> None:
    assert list(network()({"street": batch(4, unlabelled=0)})) == ["street/supervised"]
