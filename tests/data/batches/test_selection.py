from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from multidomain_cct.data.batches.selection import AllBut, Only, Selection, labelled_subset
from multidomain_cct.data.shards.reader import Shards
from multidomain_cct.data.shards.writer import ShardWriter
from multidomain_cct.errors import UserError

KEYS = [f"image_{n:03d}" for n in range(64)]


@given(total=st.integers(1, 60), chosen=st.sets(st.integers(0, 59)))
def test_a_rule_and_its_complement_share_the_samples_out(total: int, chosen: set[int]) -> None:
    numbers = np.array(sorted(number for number in chosen if number < total), dtype=np.int64)
    only, rest = Only(0, numbers), AllBut(0, total, numbers)
    assert [only.at(position) for position in range(len(only))] == numbers.tolist()
    assert [rest.at(position) for position in range(len(rest))] == [
        number for number in range(total) if number not in chosen
    ]
    ends = np.arange(total + 1)
    assert (only.up_to(ends) + rest.up_to(ends)).tolist() == ends.tolist()


def test_a_thousand_million_samples_but_a_few_take_no_room() -> None:
    samples = Selection([AllBut(2, 10**9, np.array([0, 5, 10**9 - 1]))])
    assert len(samples) == 10**9 - 3
    assert [samples[position] for position in (0, 3, 4, len(samples) - 1)] == [(2, 1), (2, 4), (2, 6), (2, 10**9 - 2)]
    with pytest.raises(IndexError):
        samples[len(samples)]


def test_the_ends_of_shards_are_counted_in_selected_samples(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, "train") as writer:
        for number in range(7):
            writer.write(f"{number}", image=b"x", mask=None, meta=b"{}")
            if number in (2, 4):
                writer.publish()
    shards = Shards.open(tmp_path, "train")
    samples = Selection([AllBut(0, 7, np.array([1, 6])), Only(1, np.array([0, 3, 4]))])
    assert samples.shard_ends([shards, shards]).tolist() == [2, 4, 5, 6, 8, 8]
    assert list(samples) == [(0, 0), (0, 2), (0, 3), (0, 4), (0, 5), (1, 0), (1, 3), (1, 4)]


def test_labelled_subsets_nest() -> None:
    subsets = [set(labelled_subset(KEYS, str(n), seed=0, where="x")) for n in (1, 5, 20, 64)]
    assert [len(s) for s in subsets] == [1, 5, 20, 64]
    assert all(small < large for small, large in zip(subsets, subsets[1:], strict=False))


def test_a_subset_does_not_depend_on_the_listing_order() -> None:
    assert labelled_subset(KEYS, "7", seed=0, where="x") == labelled_subset(KEYS[::-1], "7", seed=0, where="x")
    assert labelled_subset(KEYS, "7", seed=0, where="x") != labelled_subset(KEYS, "7", seed=1, where="x")


def test_a_share_takes_that_part_of_the_images() -> None:
    assert labelled_subset(KEYS, "1/16", seed=0, where="x") == labelled_subset(KEYS, "4", seed=0, where="x")
    assert len(labelled_subset(KEYS, "all", seed=0, where="x")) == 64


def test_a_list_file_takes_its_keys(tmp_path: Path) -> None:
    path = tmp_path / "labelled.txt"
    path.write_text("image_003\n\nimage_001\n")
    assert labelled_subset(KEYS, str(path), seed=0, where="x") == ["image_001", "image_003"]
    path.write_text("image_999\n")
    with pytest.raises(UserError, match="lists the key 'image_999'"):
        labelled_subset(KEYS, str(path), seed=0, where="x")


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ("65", "asks for 65 labelled images; there are 64"),
        ("3/2", "at most 1"),
        ("many", "a number, a share such as 1/16"),
        ("1/0", "at most 1"),
    ],
)
def test_a_budget_that_cannot_be_met_is_refused(budget: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        labelled_subset(KEYS, budget, seed=0, where="domains.camvid.labelled")
    assert str(error.value).startswith("domains.camvid.labelled")
