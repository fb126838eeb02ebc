from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from multidomain_cct.data.batches.order import Stream, batch_positions, permutation, scatter
from multidomain_cct.files.seeds import seed_from


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
