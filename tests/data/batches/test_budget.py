from pathlib import Path

import pytest

from multidomain_cct.data.batches.budget import labelled_subset
from multidomain_cct.errors import UserError

KEYS = [f"image_{n:03d}" for n in range(64)]


def test_labelled_subsets_nest() -> None:
    subsets = [set(labelled_subset(KEYS, str(n), seed=0, where="x")) for n in (1, 5, 20, 64)]
    assert [len(s) for s in subsets] == [1, 5, 20, 64]
    assert all(small < large for small, large in zip(subsets, subsets[1:], strict=False))


def test_a_subset_does_not_hang_on_the_listing_order() -> None:
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
