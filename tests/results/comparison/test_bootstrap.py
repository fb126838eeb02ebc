"""An interval says how a difference of two mIoUs depends on the images that are scored."""

from __future__ import annotations

import numpy as np
import pytest

from multidomain_cct.results.comparison.bootstrap import paired_interval


def counts(right: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """(n, 3, C): what is wrong is predicted as the next class."""
    return np.stack([right, truth, right + np.roll(truth - right, 1, axis=1)], axis=1)


def drawn(seed: int, share: float, images: int = 40) -> np.ndarray:
    truth = np.random.default_rng(7).integers(100, 200, (images, 3))
    wanted = np.random.default_rng(seed).normal(share, 0.1, (images, 3)).clip(0, 1)
    return counts((truth * wanted).astype(np.int64), truth)


def miou(each: np.ndarray) -> float:
    right, truth, predicted = each.sum(0)
    return float((right / (truth + predicted - right)).mean())


def test_the_interval_is_that_of_a_bootstrap_written_out() -> None:
    first, second = drawn(0, 0.6), drawn(1, 0.63)
    interval = paired_interval([first], [second])
    assert interval is not None
    draw = np.random.default_rng(5)
    differences = []
    for _ in range(2000):
        images = draw.integers(0, 40, 40)
        differences.append(miou(second[images]) - miou(first[images]))
    # Two sets of 2000 draws.
    assert interval.low == pytest.approx(np.quantile(differences, 0.025), abs=0.004)
    assert interval.high == pytest.approx(np.quantile(differences, 0.975), abs=0.004)
    assert interval.probability == pytest.approx(np.mean(np.array(differences) > 0), abs=0.03)


def test_equal_runs_differ_by_nothing_and_a_better_one_is_surely_better() -> None:
    same = paired_interval([drawn(0, 0.6)], [drawn(0, 0.6)])
    better = paired_interval([drawn(0, 0.4)], [drawn(1, 0.8)])
    assert same is not None
    assert (same.low, same.high, same.probability) == (0, 0, 0)
    assert better is not None
    assert better.low > 0.2
    assert better.probability == 1


def test_seeds_are_averaged_over_the_same_images() -> None:
    firsts, seconds = [drawn(0, 0.6), drawn(2, 0.6)], [drawn(1, 0.63), drawn(3, 0.63)]
    both = paired_interval(firsts, seconds)
    one = paired_interval(firsts[:1], seconds[:1])
    assert both is not None
    assert one is not None
    assert both.high - both.low < one.high - one.low


def test_a_class_that_no_image_shows_leaves_the_mean_alone() -> None:
    first, second = drawn(0, 0.6), drawn(1, 0.7)
    more = [np.concatenate([each, np.zeros((40, 3, 1), dtype=np.int64)], axis=2) for each in (first, second)]
    assert paired_interval(more[:1], more[1:]) == paired_interval([first], [second])


def test_other_images_have_no_interval() -> None:
    assert paired_interval([drawn(0, 0.6)], [drawn(0, 0.6, images=39)]) is None
    assert paired_interval([drawn(0, 0.6)], [drawn(0, 0.6)[::-1]]) is None
