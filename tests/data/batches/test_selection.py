from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from multidomain_cct.data.batches.selection import Selection
from multidomain_cct.data.shards.reader import Shards
from multidomain_cct.data.shards.writer import ShardWriter

KEYS = [f"image_{n:03d}" for n in range(64)]


@given(total=st.integers(1, 60), chosen=st.sets(st.integers(0, 59)))
def test_a_selection_and_its_complement_share_the_samples_out(total: int, chosen: set[int]) -> None:
    numbers = sorted(number for number in chosen if number < total)
    only = Selection.of(3, numbers)
    rest = Selection.all_but(3, total, only)
    assert list(only) == [(3, number) for number in numbers]
    assert list(rest) == [(3, number) for number in range(total) if number not in chosen]
    assert list(Selection.all_but(3, total, rest)) == list(only)


def test_a_thousand_million_samples_but_a_few_take_no_room() -> None:
    samples = Selection.all_but(2, 10**9, Selection.of(2, [0, 5, 10**9 - 1]))
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
    samples = Selection.all_but(0, 7, Selection.of(0, [1, 6])) + Selection.of(1, [0, 3, 4])
    assert samples.shard_ends([shards, shards]).tolist() == [2, 4, 5, 6, 8, 8]
    assert list(samples) == [(0, 0), (0, 2), (0, 3), (0, 4), (0, 5), (1, 0), (1, 3), (1, 4)]
