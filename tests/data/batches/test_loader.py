"""What a step sees depends on the step number and on nothing else, and holds exactly what the recipe asked for."""

from __future__ import annotations

import io
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from multidomain_cct.data.batches import loader
from multidomain_cct.data.batches.loader import Batch, TrainingSet, scored_images, steps
from multidomain_cct.data.batches.streams import DataSettings, DomainSettings, DomainStreams, open_streams
from multidomain_cct.data.batches.views import PAD, Augment
from multidomain_cct.data.domain import IGNORE, Domain, LabelClass, Split
from multidomain_cct.data.shards.reader import Shards
from multidomain_cct.data.shards.writer import ShardWriter
from multidomain_cct.errors import UserError

# torch warns of more workers than cores; on a machine of one core these tests still want two.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")

SIZE = (24, 16)
"""Of the stored images, (width, height)."""
CLASSES = (LabelClass("ground", (0, 0, 0)), LabelClass("thing", (255, 255, 255)))
STILL = Augment(scale=[1.0, 1.0], flip=0.0)
NOT_A_MASK = b"not a mask"


def domain(name: str) -> Domain:
    return Domain(
        name,
        "folder",
        {"train": Split("*.jpg", "*.png"), "more": Split("*.jpg"), "val": Split("*.jpg", "*.png")},
        CLASSES,
    )


def jpeg(seed: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (SIZE[1], SIZE[0], 3), dtype=np.uint8)).save(
        buffer, "JPEG"
    )
    return buffer.getvalue()


def png(ids: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(ids.astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def random_ids(seed: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2, (size[1], size[0]))


def write(root: Path, name: str, split: str, masks: Sequence[bytes | None]) -> Path:
    """Shards of the domain's split with one noise image per mask, keys <split>_0, <split>_1 ..."""
    with ShardWriter(root / name, split) as writer:
        for number, mask in enumerate(masks):
            writer.write(f"{split}_{number}", image=jpeg(number), mask=mask, meta=b"{}")
    return writer.finished[0]


def good_masks(count: int) -> list[bytes | None]:
    return [png(random_ids(number)) for number in range(count)]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight domains d0 ... d7 with 6 + n training images; d0 has 4 further images without masks."""
    root = tmp_path_factory.mktemp("shards")
    for number in range(8):
        write(root, f"d{number}", "train", good_masks(6 + number))
    write(root, "d0", "more", [None] * 4)
    return root


def data_settings(root: Path, **changes: object) -> DataSettings:
    return replace(DataSettings(shards=str(root), labelled_batch=8, unlabelled_batch=8, crop=[16, 16]), **changes)  # type: ignore[arg-type]


def streams(
    root: Path, names: Sequence[str] = ("d0", "d1"), chosen: DomainSettings | None = None, **changes: object
) -> list[DomainStreams]:
    return [
        open_streams(domain(name), chosen or DomainSettings(labelled="3"), data_settings(root, **changes))
        for name in names
    ]


def training_set(parts: Sequence[DomainStreams], **options: object) -> TrainingSet:
    return TrainingSet(parts, **{"seed": 5, "augment": Augment(), **options})  # type: ignore[arg-type]


def run(data: TrainingSet, start: int, stop: int, workers: int = 0) -> list[dict[str, Batch]]:
    return list(steps(data, start, stop, workers=workers))


def labelled_keys(batch: Batch) -> tuple[str, ...]:
    return batch.keys[: len(batch.images)]


def unlabelled_keys(batch: Batch) -> tuple[str, ...]:
    return batch.keys[len(batch.images) :]


def joined(batches: Sequence[Batch]) -> Batch:
    tensors = [
        torch.cat([getattr(batch, name) for batch in batches]) for name in ("images", "masks", "unlabelled", "valid")
    ]
    pseudo_labels = [batch.pseudo_labels for batch in batches if batch.pseudo_labels is not None]
    keys = [key for batch in batches for key in labelled_keys(batch)] + [
        key for batch in batches for key in unlabelled_keys(batch)
    ]
    return Batch(*tensors, keys=tuple(keys), pseudo_labels=torch.cat(pseudo_labels) if pseudo_labels else None)


def assert_equal(first: dict[str, Batch], second: dict[str, Batch]) -> None:
    assert list(first) == list(second)
    for name in first:
        assert first[name].keys == second[name].keys
        for field in ("images", "masks", "unlabelled", "valid"):
            assert torch.equal(getattr(first[name], field), getattr(second[name], field)), (name, field)
        one, other = first[name].pseudo_labels, second[name].pseudo_labels
        assert (one is None and other is None) or (one is not None and other is not None and torch.equal(one, other)), (
            name
        )


# The order


@settings(max_examples=12, deadline=None)
@given(
    workers=st.sampled_from([0, 2]),
    world=st.sampled_from([1, 2, 4]),
    accumulation=st.sampled_from([1, 2]),
    schedule=st.sampled_from(["together", "alternate"]),
    seed=st.integers(0, 3),
)
def test_ranks_and_micro_batches_together_see_the_same_step(
    shards: Path, workers: int, world: int, accumulation: int, schedule: str, seed: int
) -> None:
    parts = streams(shards)
    start, stop = 2, 4
    reference = run(training_set(parts, schedule=schedule, seed=seed), start, stop)
    ranks = [
        run(
            training_set(parts, schedule=schedule, seed=seed, rank=rank, world=world, accumulation=accumulation),
            start,
            stop,
            workers if rank == 0 else 0,
        )
        for rank in range(world)
    ]
    assert all(len(micro_batches) == (stop - start) * accumulation for micro_batches in ranks)
    for step, expected in enumerate(reference):
        shares = [ranks[rank][step * accumulation + micro] for micro in range(accumulation) for rank in range(world)]
        assert_equal({name: joined([share[name] for share in shares]) for name in shares[0]}, expected)


@settings(max_examples=10, deadline=None)
@given(
    start=st.integers(0, 7),
    workers=st.sampled_from([0, 2]),
    schedule=st.sampled_from(["together", "alternate"]),
    accumulation=st.sampled_from([1, 2]),
)
def test_starting_at_a_step_gives_what_a_run_from_the_beginning_gives_there(
    shards: Path, start: int, workers: int, schedule: str, accumulation: int
) -> None:
    data = training_set(streams(shards), schedule=schedule, accumulation=accumulation)
    whole = run(data, 0, 8)
    resumed = run(data, start, 8, workers)
    assert len(resumed) == (8 - start) * accumulation
    for before, after in zip(whole[start * accumulation :], resumed, strict=True):
        assert_equal(before, after)


def test_seeds_give_other_orders_and_other_views(shards: Path) -> None:
    parts = streams(shards, ["d0"], labelled_batch=2, unlabelled_batch=3)
    (first,), (second,) = (run(training_set(parts, seed=seed), 0, 1) for seed in (0, 1))
    assert first["d0"].keys != second["d0"].keys


def test_each_epoch_shows_a_sample_in_another_view_and_labelled_apart_from_unlabelled(shards: Path) -> None:
    parts = streams(
        shards, ["d0"], DomainSettings(labelled="1", unlabelled="all"), labelled_batch=4, unlabelled_batch=6
    )
    (batch,) = (step["d0"] for step in run(training_set(parts), 0, 1))
    key = batch.keys[0]
    assert labelled_keys(batch) == (key,) * 4
    views = [*batch.images, batch.unlabelled[unlabelled_keys(batch).index(key)]]
    assert len({view.numpy().tobytes() for view in views}) == 5


@pytest.mark.parametrize("count", [1, 2, 3, 8])
@pytest.mark.parametrize("schedule", ["together", "alternate"])
def test_any_number_of_domains_show_every_labelled_and_unlabelled_sample_once_per_epoch(
    shards: Path, count: int, schedule: str
) -> None:
    names = [f"d{number}" for number in range(count)]
    parts = streams(shards, names, labelled_batch=1, unlabelled_batch=1)
    # 3 labelled and 3 + n unlabelled images: as many turns as make whole epochs of both for the largest domain.
    turns = 3 * (2 + count)
    batches = run(training_set(parts, schedule=schedule), 0, turns * (count if schedule == "alternate" else 1))
    for number, name in enumerate(names):
        if schedule == "together":
            assert all(list(step) == names for step in batches)
        else:
            assert all((list(step) == [name]) == (position % count == number) for position, step in enumerate(batches))
        own = [step[name] for step in batches if name in step]
        labelled, rest = (
            [key for b in own for key in labelled_keys(b)],
            [key for b in own for key in unlabelled_keys(b)],
        )
        assert len(labelled) == len(rest) == turns
        for keys, samples in ((labelled, 3), (rest, 3 + number)):
            assert all(len(set(keys[at : at + samples])) == samples for at in range(0, turns - samples + 1, samples))
        assert set(labelled).isdisjoint(rest)
        assert len(set(labelled) | set(rest)) == 6 + number


def test_a_domain_sees_the_same_in_its_turns_as_in_steps_together(shards: Path) -> None:
    parts = streams(shards)
    together, alternate = (training_set(parts, schedule=schedule) for schedule in ("together", "alternate"))
    for own, both in zip(run(alternate, 0, 8)[1::2], run(together, 0, 4), strict=True):
        assert_equal(own, {"d1": both["d1"]})


def test_a_domain_sees_the_same_whichever_others_there_are(shards: Path) -> None:
    alone, beside = (run(training_set(streams(shards, names)), 0, 2) for names in (["d1"], ["d0", "d1", "d2"]))
    for first, second in zip(alone, beside, strict=True):
        assert_equal(first, {"d1": second["d1"]})


# What a batch holds


def test_views_are_the_stored_pixels_with_their_own_ids(shards: Path) -> None:
    parts = streams(shards, ["d0"], crop=list(SIZE), labelled_batch=3, unlabelled_batch=3)
    (batch,) = (step["d0"] for step in run(training_set(parts, augment=STILL), 0, 1))
    for position, key in enumerate(batch.keys):
        number = int(key.split("_")[1])
        pixels = np.asarray(Image.open(io.BytesIO(jpeg(number)))).transpose(2, 0, 1)
        view = batch.images[position] if position < 3 else batch.unlabelled[position - 3]
        assert np.array_equal(view, pixels)
        if position < 3:
            assert np.array_equal(batch.masks[position], random_ids(number))
    assert batch.valid.all()
    assert batch.valid.dtype == torch.bool
    assert batch.images.dtype == batch.masks.dtype == batch.unlabelled.dtype == torch.uint8


def test_padding_has_no_class_and_is_not_valid(shards: Path) -> None:
    parts = streams(shards, ["d0"], crop=[32, 20], labelled_batch=2, unlabelled_batch=2)
    (batch,) = (step["d0"] for step in run(training_set(parts, augment=STILL), 0, 1))
    inside = torch.zeros(20, 32, dtype=torch.bool)
    inside[: SIZE[1], : SIZE[0]] = True
    assert all(torch.equal(mask != IGNORE, inside) for mask in batch.masks)
    assert all(torch.equal(valid, inside) for valid in batch.valid)
    assert all(
        torch.equal(view[:, ~inside].T.unique(dim=0), torch.tensor([PAD], dtype=torch.uint8))
        for view in (*batch.images, *batch.unlabelled)
    )


def test_crop_and_batch_sizes_are_the_domains_own_where_given(shards: Path) -> None:
    data = data_settings(shards)
    own = DomainSettings(labelled="3", labelled_batch=2, unlabelled_batch=4, crop=[24, 8])
    parts = [open_streams(domain("d0"), own, data), open_streams(domain("d1"), DomainSettings(labelled="3"), data)]
    (step,) = run(training_set(parts), 0, 1)
    assert step["d0"].images.shape == (2, 3, 8, 24)
    assert step["d0"].masks.shape == (2, 8, 24)
    assert step["d0"].valid.shape == (4, 8, 24)
    assert step["d1"].images.shape == step["d1"].unlabelled.shape == (8, 3, 16, 16)


def test_fewer_samples_than_a_batch_come_again_in_the_same_batch(shards: Path) -> None:
    (batch,) = (step["d0"] for step in run(training_set(streams(shards, ["d0"], DomainSettings(labelled="2"))), 0, 1))
    assert sorted(Counter(labelled_keys(batch)).values()) == [4, 4]
    assert len(set(unlabelled_keys(batch))) == 4
    assert len(unlabelled_keys(batch)) == 8


# Budgets


@pytest.mark.parametrize(("unlabelled", "count"), [("rest", 3), ("all", 6), ("none", 0)])
def test_the_unlabelled_images_are_the_rest_all_or_none(shards: Path, unlabelled: str, count: int) -> None:
    (parts,) = streams(shards, ["d0"], DomainSettings(labelled="3", unlabelled=unlabelled))
    assert len(parts.unlabelled) == count
    assert len(parts.labelled) == 3
    (batch,) = (step["d0"] for step in run(training_set([parts]), 0, 1))
    assert len(batch.unlabelled) == len(batch.valid) == len(unlabelled_keys(batch)) == (8 if count else 0)
    assert batch.unlabelled.shape[1:] == (3, 16, 16)


def test_further_splits_add_unlabelled_images(shards: Path) -> None:
    (parts,) = streams(shards, ["d0"], DomainSettings(labelled="3", unlabelled_splits=["more"]), unlabelled_batch=7)
    (batch,) = (step["d0"] for step in run(training_set([parts], augment=STILL), 0, 1))
    keys = Counter(key.split("_")[0] for key in unlabelled_keys(batch))
    assert keys == {"train": 3, "more": 4}


def test_masks_of_unlabelled_images_are_never_read(tmp_path: Path) -> None:
    masks = good_masks(6)
    masks[3:] = [NOT_A_MASK, NOT_A_MASK, png(np.full((4, 4), 99))]
    write(tmp_path, "d0", "train", masks)
    further = write(tmp_path, "d0", "more", [NOT_A_MASK] * 2)
    content = further.read_bytes()
    further.write_bytes(content.replace(NOT_A_MASK, b"other text"))  # not even its checksum is looked at
    chosen = tmp_path / "labelled.txt"
    chosen.write_text("train_0\ntrain_1\ntrain_2\n")
    asked = DomainSettings(labelled=str(chosen), unlabelled_splits=["more"])
    (batch,) = (step["d0"] for step in run(training_set(streams(tmp_path, ["d0"], asked, unlabelled_batch=5)), 0, 1))
    assert {key for key in unlabelled_keys(batch)} == {"train_3", "train_4", "train_5", "more_0", "more_1"}
    chosen.write_text("train_3\n")  # with its label asked for, it is noticed
    with pytest.raises(UserError, match="key 'train_3': the mask cannot be read"):
        run(training_set(streams(tmp_path, ["d0"], DomainSettings(labelled=str(chosen), unlabelled="none"))), 0, 1)


# Pseudo-labels


@pytest.mark.parametrize("augment", [STILL, Augment()])
def test_pseudo_labels_follow_their_image_and_are_255_elsewhere(tmp_path: Path, augment: Augment) -> None:
    # Where an image is white its pseudo-label is 1: both have to take the same view.
    with ShardWriter(tmp_path / "d0", "train") as writer:
        for number in range(4):
            writer.write(
                f"train_{number}",
                image=jpeg(number),
                mask=png(random_ids(0)) if number == 0 else NOT_A_MASK,
                meta=b"{}",
            )
    halves = np.repeat([[0, 1]], SIZE[0] // 2, axis=1).repeat(SIZE[1], axis=0)
    buffer = io.BytesIO()
    Image.fromarray((halves * 255).astype(np.uint8)).convert("RGB").save(buffer, "JPEG")
    with ShardWriter(tmp_path / "d0", "train_weak") as writer:
        writer.write("train_0", image=jpeg(0), mask=NOT_A_MASK, meta=b"{}")
        writer.write("train_1", image=buffer.getvalue(), mask=png(halves), meta=b"{}")
        writer.write("train_2", image=jpeg(2), mask=None, meta=b"{}")
    (tmp_path / "labelled.txt").write_text("train_0\n")
    asked = DomainSettings(labelled=str(tmp_path / "labelled.txt"), weak_split="train_weak")
    parts = streams(tmp_path, ["d0"], asked, labelled_batch=1, unlabelled_batch=6, crop=[32, 16])
    seen = set()
    # The masks of train_2 and train_3 in the training split would be noticed if they were opened.
    for step in run(training_set(parts, augment=augment), 0, 3):
        batch = step["d0"]
        assert batch.pseudo_labels is not None
        assert batch.pseudo_labels.dtype == torch.uint8
        assert batch.pseudo_labels.shape == batch.valid.shape
        for key, image, ids, valid in zip(
            unlabelled_keys(batch), batch.unlabelled, batch.pseudo_labels, batch.valid, strict=True
        ):
            seen.add(key)
            if key == "train_1":
                assert torch.equal(ids != IGNORE, valid)
                assert ((image[0] > 128) == (ids == 1))[valid].float().mean() > 0.85
            else:
                assert (ids == IGNORE).all()
    assert seen == {"train_1", "train_2", "train_3"}


def test_batches_of_domains_without_pseudo_labels_have_none(shards: Path) -> None:
    (step,) = run(training_set(streams(shards)), 0, 1)
    assert all(batch.pseudo_labels is None for batch in step.values())


def test_a_batch_of_a_domain_without_labelled_images_keeps_its_shapes(shards: Path) -> None:
    (batch,) = (
        step["d0"] for step in run(training_set(streams(shards, ["d0"], DomainSettings(labelled="none"))), 0, 1)
    )
    assert batch.images.shape == (0, 3, 16, 16)
    assert batch.masks.shape == (0, 16, 16)
    assert len(batch.unlabelled) == len(batch.keys) == 8


# What is refused


# training/check.py says it to people, before a TrainingSet is made.


def test_a_set_without_any_image_is_refused() -> None:
    with pytest.raises(ValueError, match="no stream has images"):
        training_set([])


@pytest.mark.parametrize(("key", "world", "accumulation"), [("labelled_batch", 4, 1), ("unlabelled_batch", 2, 3)])
def test_a_batch_that_does_not_divide_is_refused(shards: Path, key: str, world: int, accumulation: int) -> None:
    sizes = {"labelled_batch": 12, "unlabelled_batch": 12} | {key: 10}
    with pytest.raises(ValueError, match=f"d1: {world * accumulation} parts do not divide {key}"):
        training_set(streams(shards, ["d1"], **sizes), world=world, accumulation=accumulation)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("mask", "message"),
    [
        pytest.param(
            png(np.full((SIZE[1], SIZE[0]), 2)),
            "the mask holds the train id 2, but d0 has the classes 0 to 1 and 255 for ignore.",
            id="train id",
        ),
        pytest.param(png(random_ids(0, (8, 8))), "the mask is 8x8 but the image is 24x16.", id="size"),
    ],
)
def test_an_unusable_sample_stops_the_run_with_one_line_that_names_shard_and_key(
    tmp_path: Path, workers: int, mask: bytes, message: str
) -> None:
    path = write(tmp_path, "d0", "train", [*good_masks(2), mask, *good_masks(1)])
    data = training_set(streams(tmp_path, ["d0"], DomainSettings(labelled="all", unlabelled="none"), labelled_batch=1))
    with pytest.raises(UserError) as caught:
        run(data, 0, 4, workers)
    text = str(caught.value)
    assert text.startswith(f"{path}: key 'train_2': {message}")
    assert "\n" not in text
    assert "Traceback" not in text
    assert "Error" not in text


def test_steps_before_an_unusable_sample_are_seen(tmp_path: Path) -> None:
    write(tmp_path, "d0", "train", [png(np.full((SIZE[1], SIZE[0]), 2)), *good_masks(3)])
    data = training_set(streams(tmp_path, ["d0"], DomainSettings(labelled="all", unlabelled="none"), labelled_batch=1))
    seen = []
    with pytest.raises(UserError):
        for step in steps(data, 0, 4, workers=2):
            seen.append(step["d0"].keys[0])
    reached = 0
    while True:
        try:
            (step,) = run(data, reached, reached + 1)
        except UserError:
            break
        assert seen[reached] == step["d0"].keys[0]
        reached += 1
    assert len(seen) == reached > 0


# Scoring


@pytest.mark.parametrize("workers", [0, 2])
def test_scored_images_are_whole_each_once_with_masks_at_their_own_size(tmp_path: Path, workers: int) -> None:
    large = (SIZE[0] * 2, SIZE[1] * 2)
    write(tmp_path, "d0", "val", [png(random_ids(number, large)) for number in range(5)])
    shards = Shards.open(tmp_path / "d0", "val")
    scored = list(scored_images(shards, domain("d0"), range(5), workers=workers))
    assert [item.key for item in scored] == list(shards.keys) == [f"val_{number}" for number in range(5)]
    for number, item in enumerate(scored):
        assert np.array_equal(item.image, np.asarray(Image.open(io.BytesIO(jpeg(number)))).transpose(2, 0, 1))
        assert np.array_equal(item.mask, random_ids(number, large))
    shares = [
        [item.key for item in scored_images(shards, domain("d0"), range(rank, 5, 2), workers=0)] for rank in (0, 1)
    ]
    assert sorted(shares[0] + shares[1]) == list(shards.keys)


def test_scoring_an_image_without_a_mask_names_it(tmp_path: Path) -> None:
    path = write(tmp_path, "d0", "val", [*good_masks(1), None])
    with pytest.raises(UserError) as caught:
        list(scored_images(Shards.open(tmp_path / "d0", "val"), domain("d0"), range(2), workers=0))
    assert str(caught.value) == f"{path}: key 'val_1' has no mask. Only labelled splits can be scored."


def test_batches_move_as_a_whole(shards: Path) -> None:
    (batch,) = (step["d0"] for step in run(training_set(streams(shards, ["d0"])), 0, 1))
    assert_equal({"d0": batch.to(torch.device("cpu"))}, {"d0": batch})
    moved = replace(batch, pseudo_labels=torch.zeros_like(batch.masks)).to(torch.device("meta"))
    assert moved.valid.is_meta
    assert moved.pseudo_labels is not None
    assert moved.pseudo_labels.is_meta
    assert moved.keys == batch.keys


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_keep_their_memory_layout(shards: Path, workers: int) -> None:
    (batch,) = (step["d0"] for step in run(training_set(streams(shards, ["d0"])), 0, 1, workers))
    for images in (batch.images, batch.unlabelled):
        assert images.is_contiguous(memory_format=torch.channels_last)
    assert batch.masks.is_contiguous()


@pytest.mark.parametrize("workers", [0, 1])
def test_for_a_gpu_every_tensor_is_pinned(shards: Path, workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # A machine without a GPU cannot pin: DataLoader is made to believe in one, and pinning makes a copy.
    for name, answer in {
        "is_available": True,
        "current_accelerator": torch.device("cuda"),
        "current_device_index": 0,
        "set_device_index": None,
    }.items():
        monkeypatch.setattr(torch.accelerator, name, lambda *ignored, answer=answer: answer)
    pinned: list[int] = []

    def pin(tensor: torch.Tensor) -> torch.Tensor:
        copy = tensor.clone()
        pinned.append(copy.data_ptr())
        return copy

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    data = training_set(streams(shards))
    loaded = list(steps(data, 0, 2, workers=workers, pin_memory=True))
    for got, expected in zip(loaded, run(data, 0, 2), strict=True):
        assert_equal(got, expected)
        for batch in got.values():
            tensors = [value for value in vars(batch).values() if isinstance(value, torch.Tensor)]
            assert {tensor.data_ptr() for tensor in tensors} <= set(pinned)


def test_with_a_gpu_an_unusable_sample_is_still_one_line(tmp_path: Path) -> None:
    from torch.utils.data._utils.pin_memory import pin_memory

    write(tmp_path, "d0", "train", [NOT_A_MASK])
    data = training_set(streams(tmp_path, ["d0"], DomainSettings(labelled="all", unlabelled="none")))
    refused = data[0]
    assert pin_memory(refused) is refused


@pytest.mark.parametrize("workers", [0, 2])
def test_loading_draws_nothing_from_the_callers_generator(shards: Path, workers: int) -> None:
    before = torch.random.get_rng_state()
    run(training_set(streams(shards, ["d0"])), 0, 2, workers)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.skipif(sys.version_info >= (3, 12), reason="Python 3.12 does not wait for a lock in a forked process")
@pytest.mark.parametrize("several", [False, True])
def test_in_a_run_of_several_processes_gloo_is_given_time_before_workers_are_forked(
    several: bool, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[float] = []
    monkeypatch.setattr("multidomain_cct.data.batches.loader.time.sleep", waited.append)
    if several:
        torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        run(training_set(streams(shards, ["d0"])), 0, 1, workers=1)
    finally:
        if several:
            torch.distributed.destroy_process_group()
    assert (loader._QUIET_SECONDS in waited) == several
