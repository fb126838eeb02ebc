from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from multidomain_cct.data.batches.order import Stream, batch_positions, permutation, scatter
from multidomain_cct.files.seeds import seed_from


def test_orders_are_those_of_earlier_versions() -> None:
    """A run that goes on with a later version sees the images that it would have seen."""
    assert permutation(10, 1).tolist() == [2, 5, 9, 4, 1, 8, 6, 3, 0, 7]
    assert permutation(17, 2**63 - 1).tolist() == [13, 11, 15, 10, 16, 12, 2, 8, 7, 1, 0, 6, 14, 9, 3, 5, 4]
    placed = [scatter(number, 10**12, 5) for number in (0, 1, 10**12 - 1)]
    assert placed == [673549788668, 323607205347, 405685953869]
    whole = Stream("camvid/labelled", 5, 3)
    assert [whole.at(position)[1] for position in range(10)] == [0, 1, 2, 4, 3, 0, 2, 3, 1, 4]
    windows = Stream("camvid/unlabelled", 9, 3, 2, np.cumsum([2, 0, 3, 1, 3]))
    assert [windows.at(position) for position in range(18)] == [
        *((0, sample) for sample in (5, 2, 3, 4, 6, 7, 1, 0, 8)),
        *((1, sample) for sample in (7, 8, 2, 4, 6, 3, 5, 0, 1)),
    ]


@given(size=st.integers(1, 3000), seed=st.integers(0, 2**63 - 1))
def test_a_permutation_is_one_to_one_for_every_size(size: int, seed: int) -> None:
    order = permutation(size, seed)
    assert sorted(order.tolist()) == list(range(size))
    assert all(scatter(number, size, seed) == order[number] for number in range(0, size, 97))


@given(size=st.integers(2**40, 2**60), seed=st.integers(0, 2**63 - 1))
def test_numbers_of_a_set_too_large_to_list_go_to_places_of_their_own(size: int, seed: int) -> None:
    numbers = [*range(30), *range(size - 30, size)]
    placed = {scatter(number, size, seed) for number in numbers}
    assert len(placed) == len(numbers)
    assert 0 <= min(placed)
    assert max(placed) < size


def test_the_orders_of_a_few_samples_come_equally_often() -> None:
    draws = 20 * 120
    counts = Counter(tuple(permutation(5, seed_from(draw, "even")).tolist()) for draw in range(draws))
    chi_squared = sum((count - 20) ** 2 / 20 for count in counts.values())
    # 119 degrees of freedom: a thousandth of even shuffles lies above 173.
    assert len(counts) == 120
    assert chi_squared < 173


@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=8).filter(any),
    window=st.integers(1, 9),
    seed=st.integers(0, 99),
    epoch=st.integers(0, 3),
)
def test_a_window_holds_whole_shards_and_an_epoch_holds_every_sample_once(
    sizes: list[int], window: int, seed: int, epoch: int
) -> None:
    total = sum(sizes)
    stream = Stream("camvid/unlabelled", total, seed, window, np.cumsum(sizes))
    seen = [stream.at(epoch * total + offset)[1] for offset in range(total)]
    assert sorted(seen) == list(range(total))
    shards = np.searchsorted(np.cumsum(sizes), seen, side="right").tolist()
    # Shards enter in some order; one that has been left for those of the next window does not come back.
    for first in range(total):
        open_later = set(shards[first:]) & set(shards[: first + 1])
        assert len(open_later) <= window


@pytest.mark.parametrize("shard_ends", [None, np.array([2, 4]), np.array([2, 6])])
def test_a_window_needs_the_ends_of_the_shards(shard_ends: np.ndarray | None) -> None:
    with pytest.raises(AssertionError):
        Stream("camvid/unlabelled", 5, 0, 1, shard_ends)


def test_windows_are_remembered_for_two_epochs_at_most() -> None:
    stream = Stream("camvid/unlabelled", 4, 0, 1, np.array([2, 4]))
    kept = []
    for epoch in range(4):
        stream.at(4 * epoch)
        kept.append(sorted(stream._plans))
    assert kept == [[0], [0, 1], [1, 2], [2, 3]]


@given(samples=st.integers(1, 60), seed=st.integers(0, 5), epoch=st.integers(0, 4))
def test_every_sample_stands_once_in_each_epoch(samples: int, seed: int, epoch: int) -> None:
    stream = Stream("camvid/labelled", samples, seed)
    seen = [stream.at(epoch * samples + offset) for offset in range(samples)]
    assert {e for e, _ in seen} == {epoch}
    assert sorted(sample for _, sample in seen) == list(range(samples))


def test_epochs_seeds_and_streams_have_orders_of_their_own() -> None:
    def order(name: str, seed: int, epoch: int) -> list[int]:
        return [Stream(name, 50, seed).at(epoch * 50 + offset)[1] for offset in range(50)]

    orders = [order("a", 0, 0), order("a", 0, 1), order("a", 1, 0), order("b", 0, 0)]
    assert len({tuple(o) for o in orders}) == 4
    assert order("a", 0, 0) == order("a", 0, 0)


@given(turn=st.integers(0, 20), share=st.integers(1, 6), parts=st.sampled_from([1, 2, 3, 4]))
def test_parts_of_a_global_batch_are_the_batch_in_order(turn: int, share: int, parts: int) -> None:
    batch = share * parts
    joined = [p for part in range(parts) for p in batch_positions(turn, batch, part=part, parts=parts)]
    assert joined == list(range(turn * batch, (turn + 1) * batch))
