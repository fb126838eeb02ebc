"""Entropies across label spaces against a short numpy computation, and what moves the class embeddings."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from multidomain_cct.data.batches.loader import Batch
from multidomain_cct.methods.supervised import Supervised
from multidomain_cct.methods.usss import Usss, UsssSettings
from multidomain_cct.model.encoder import EncoderSettings
from multidomain_cct.model.losses import ConsistencySettings
from multidomain_cct.model.network import Task

FROZEN = EncoderSettings(name="test_resnet", stride=8, context="fpn", width=32, norm="frozen")
NO_RAMP = ConsistencySettings(ramp="none")
TASKS = {
    "street": Task((False,) * 4, consistency=NO_RAMP),
    "room": Task((False,) * 3, weight=0.5, consistency=NO_RAMP),
    "sea": Task((False,) * 2, consistency=NO_RAMP),
}


def network(tasks: dict[str, Task] | None = None, seed: int = 0, **settings: float) -> Usss:
    return Usss(
        FROZEN, tasks or TASKS, decoder="bilinear", seed=seed, settings=UsssSettings(**({"channels": 7} | settings))
    ).train()  # type: ignore[arg-type]


def batch(num_classes: int, labelled: int = 2, unlabelled: int = 2, seed: int = 0) -> Batch:
    """Masks of one class for each 8x8 square, with a square of ignored pixels, and a valid area that ends at the sixth
    of eight squares.
    """
    draw = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (labelled + unlabelled, 3, 64, 64), dtype=torch.uint8, generator=draw)
    squares = torch.randint(0, num_classes, (labelled, 8, 8), dtype=torch.uint8, generator=draw)
    squares[:, :3, :3] = 255
    valid = torch.zeros(unlabelled, 64, 64, dtype=torch.bool)
    valid[:, :48, :48] = True
    return Batch(
        images[:labelled], squares.repeat_interleave(8, dim=1).repeat_interleave(8, dim=2), images[labelled:], valid
    )


def unit(values: np.ndarray, axis: int) -> np.ndarray:
    return values / np.linalg.norm(values, axis=axis, keepdims=True)


def embedded(model: Usss, images: torch.Tensor, name: str) -> np.ndarray:
    """(B, h, w, E) embeddings of unit length."""
    features = model.encoder(images, [(name, len(images))]).detach().numpy()
    weight = model.embedding.weight.detach().numpy()[:, :, 0, 0]
    return unit(np.einsum("bdhw,ed->bhwe", features, weight), axis=3)


def tables(model: Usss) -> dict[str, np.ndarray]:
    return {name: model.get_buffer(f"classes_{name}").numpy().copy() for name in model.heads}


def remembered(table: np.ndarray, vectors: np.ndarray, masks: torch.Tensor, momentum: float) -> np.ndarray:
    """The class embeddings after labelled images have been seen."""
    ids, table = masks[:, 4::8, 4::8].numpy(), table.copy()
    for train_id in range(len(table)):
        if (ids == train_id).any():
            table[train_id] = unit(
                momentum * table[train_id] + (1 - momentum) * unit(vectors[ids == train_id].sum(axis=0), 0), 0
            )
    return table


def entropy(vectors: np.ndarray, table: np.ndarray, valid: np.ndarray, temperature: float) -> float:
    scores = vectors @ table.T / temperature
    powers = np.exp(scores - scores.max(axis=3, keepdims=True))
    p = powers / powers.sum(axis=3, keepdims=True)
    pixels = -(p * np.log(p)).sum(axis=3)
    return float(np.mean([pixels[number][valid[number]].mean() for number in range(len(pixels))]))


def test_the_terms_match_numpy() -> None:
    model = network(across=0.3, within=0.2, temperature=0.5, momentum=0.8).double()
    batches = {"street": batch(4), "room": batch(3, seed=1), "sea": batch(2, seed=2)}
    before = tables(model)
    found = model(batches)
    expected = {
        name: remembered(before[name], embedded(model, own.images, name), own.masks, momentum=0.8)
        for name, own in batches.items()
    }  # all labelled images are remembered before any entropy is taken
    for name, own in batches.items():
        np.testing.assert_allclose(model.get_buffer(f"classes_{name}").numpy(), expected[name], rtol=1e-9)
        vectors, valid = embedded(model, own.unlabelled, name), own.valid[:, 4::8, 4::8].numpy()
        entropies = {space: entropy(vectors, table, valid, 0.5) for space, table in expected.items()}
        across = np.mean([value for space, value in entropies.items() if space != name])
        assert found[f"{name}/within"].item() == pytest.approx(TASKS[name].weight * 0.2 * entropies[name], rel=1e-9)
        assert found[f"{name}/across"].item() == pytest.approx(TASKS[name].weight * 0.3 * across, rel=1e-9)


def test_equal_similarities_have_the_entropy_of_an_even_choice() -> None:
    model = network(across=1.0, within=1.0)
    for name in model.heads:
        model.get_buffer(f"classes_{name}").copy_(torch.nn.functional.normalize(torch.ones(1, 7)))
    found = model({"street": batch(4, labelled=0)})
    assert found["street/within"].item() == pytest.approx(np.log(4))
    assert found["street/across"].item() == pytest.approx((np.log(3) + np.log(2)) / 2)


def test_a_sharp_similarity_has_hardly_any_entropy() -> None:
    model = network(within=1.0, temperature=0.001)
    assert 0 <= model({"street": batch(4, labelled=0)})["street/within"] < 0.1


def test_padding_does_not_count() -> None:
    model, own = network(), batch(4, labelled=0)
    everything = Batch(own.images, own.masks, own.unlabelled, torch.ones_like(own.valid))
    assert model({"street": own})["street/within"] != model({"street": everything})["street/within"]
    none = Batch(own.images, own.masks, own.unlabelled, torch.zeros_like(own.valid))
    assert model({"street": none})["street/within"] == 0


def test_class_embeddings_move_toward_the_mean_of_their_labelled_positions() -> None:
    model, own = network(momentum=0.5), batch(4)
    own = replace(own, masks=torch.where(own.masks == 3, torch.tensor(255, dtype=torch.uint8), own.masks))
    vectors, ids = embedded(model, own.images, "street"), own.masks[:, 4::8, 4::8].numpy()
    before = tables(model)
    similarity = []
    for _ in range(4):
        table = tables(model)["street"]
        similarity.append(
            [float(table[train_id] @ unit(vectors[ids == train_id].sum(axis=0), 0)) for train_id in range(3)]
        )
        model({"street": own})
    assert (np.diff(similarity, axis=0) > 0).all()
    assert min(similarity[-1]) > 0.9
    after = tables(model)
    np.testing.assert_array_equal(after["street"][3], before["street"][3])  # a class that does not occur stays
    np.testing.assert_array_equal(after["room"], before["room"])
    np.testing.assert_allclose(np.linalg.norm(after["street"], axis=1), 1, rtol=1e-5)


def test_class_embeddings_carry_no_gradient() -> None:
    model = network()
    losses = model({"street": batch(4), "room": batch(3, seed=1)})
    assert not any(buffer.requires_grad for buffer in model.buffers())
    assert not [name for name, _ in model.named_parameters() if name.startswith("classes_")]
    (losses["street/within"] + losses["street/across"]).backward()
    learns = {
        name.split(".")[0]
        for name, parameter in model.named_parameters()
        if parameter.grad is not None and parameter.grad.any()
    }
    assert learns == {"encoder", "embedding"}


def test_supervised_losses_are_those_of_every_method() -> None:
    batches = {"street": batch(4), "room": batch(3, seed=1)}
    plain = Supervised(FROZEN, TASKS, decoder="bilinear")(batches)
    found = network()(batches)
    for name, loss in plain.items():
        torch.testing.assert_close(found[name], loss)


def test_a_step_may_see_one_domain_and_compare_it_with_all() -> None:
    losses = network()({"room": batch(3)})
    assert list(losses) == ["room/supervised", "room/within", "room/across"]
    assert all(loss.isfinite() and loss > 0 for loss in losses.values())


def test_the_ramp_is_that_of_consistency() -> None:
    tasks = {
        name: replace(task, consistency=ConsistencySettings(ramp="linear", ramp_fraction=1.0))
        for name, task in TASKS.items()
    }
    half, whole = (network(tasks)({"street": batch(4)}, progress=progress) for progress in (0.5, 1.0))
    for term in ("street/within", "street/across"):
        torch.testing.assert_close(half[term], whole[term] / 2)


def test_domains_that_share_labels_are_one_label_space() -> None:
    tasks = TASKS | {"dusk": replace(TASKS["street"], head="street")}
    model, alone = network(tasks, across=1.0), network(across=1.0)
    own = batch(4, labelled=0)
    found, expected = model({"dusk": own}), alone({"street": own})
    for term in ("within", "across"):
        torch.testing.assert_close(found[f"dusk/{term}"], expected[f"street/{term}"])


def test_the_embedding_starts_from_the_seed_and_leaves_the_callers_generator_alone() -> None:
    state = torch.random.get_rng_state()
    first, again, other = (network(seed=seed).state_dict() for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), state)
    for name in ("embedding.weight", "classes_street"):
        assert torch.equal(first[name], again[name])
        assert not torch.equal(first[name], other[name])


def test_a_step_without_unlabelled_images_is_supervised_only() -> None:
    assert list(network()({"street": batch(4, unlabelled=0)})) == ["street/supervised"]
