from pathlib import Path

import pytest

from multidomain_cct.data.batches.budget import labelled_subset
from multidomain_cct.data.shards.keys import escape_key
from multidomain_cct.errors import UserError

KEYS = [f"image_{n:03d}" for n in range(64)]


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


FOTOS = [escape_key(name) for name in ("Tag 1/Foto ü 0", "Tag 1/Foto ü 1", "Tag 2/Foto ü 0", "img26_jpg.rf.98d", "a,b")]


def listed(folder: Path, *lines: str, keys: list[str] = FOTOS, origins: tuple[str, ...] = ()) -> list[str]:
    (folder / "list.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return labelled_subset(keys, str(folder / "list.txt"), seed=0, where="x", origins=lambda: origins)


def test_a_list_takes_the_images_that_it_names(tmp_path: Path) -> None:
    assert listed(tmp_path, "image_003", "", "image_001", "image_003", keys=KEYS) == ["image_001", "image_003"]


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("Tag 1/Foto ü 0", "Tag 1/Foto ü 0"),
        (FOTOS[0], "Tag 1/Foto ü 0"),
        ("Tag 1/Foto ü 0.png", "Tag 1/Foto ü 0"),
        ("./img/train/Tag 2/Foto ü 0.PNG", "Tag 2/Foto ü 0"),
        ("img\\train\\Tag 2\\Foto ü 0.png", "Tag 2/Foto ü 0"),
        ("img/train/Tag 1/Foto ü 0.png mask/train/Tag 1/Foto ü 0.png", "Tag 1/Foto ü 0"),
        ("img/train/Tag 1/Foto ü 0.jpg\tmask/train/Tag 1/Foto ü 0_mask.npy", "Tag 1/Foto ü 0"),
        ("Foto ü 1", "Tag 1/Foto ü 1"),
        ("img26_jpg.rf.98d.jpg", "img26_jpg.rf.98d"),
        ("img26_jpg.rf.98d", "img26_jpg.rf.98d"),
        ("img26_jpg.rf.98d img26_mask.rf.98d", "img26_jpg.rf.98d"),
        ("a,b", "a,b"),
        ("a,b.jpg,mask/a,b.png", "a,b"),
    ],
)
def test_a_line_is_a_key_or_a_file_name_or_a_path_or_the_paths_of_image_and_mask(
    tmp_path: Path, line: str, name: str
) -> None:
    assert listed(tmp_path, line) == [escape_key(name)]


def test_a_line_may_name_the_raw_file_where_keys_have_other_names(tmp_path: Path) -> None:
    files = ("leftImg8bit/train/ulm/ulm_0_leftImg8bit.png", "leftImg8bit/train/ulm/ulm_1_leftImg8bit.png")
    for line in (files[1], f"/data/{files[1]} gtFine/train/ulm/ulm_1_gtFine_labelIds.png", "ulm_1_leftImg8bit.png"):
        assert listed(tmp_path, line, keys=["ulm_0", "ulm_1"], origins=files) == ["ulm_1"]


@pytest.mark.parametrize(
    ("line", "remedy"),
    [
        ("image_999", 'Did you mean "image_0'),
        ("Tag 3/Foto ü 1", 'Did you mean "Tag 1/Foto ü 1"'),
        ("Foto ü 0", 'Did you mean "Tag'),
        ("zzz.png", "One is 'Tag 1/Foto ü 0'"),
    ],
)
def test_an_unknown_line_is_answered_with_the_nearest_name(tmp_path: Path, line: str, remedy: str) -> None:
    with pytest.raises(UserError, match="list.txt") as error:
        listed(tmp_path, line, keys=[*KEYS, *FOTOS] if line.startswith("image") else FOTOS)
    assert repr(line) in str(error.value)
    assert remedy in str(error.value)


def test_a_list_with_a_byte_order_mark_is_read_and_another_encoding_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    path.write_text("Foto ü 1\n", encoding="utf-8-sig")
    assert labelled_subset(FOTOS, str(path), seed=0, where="x") == [FOTOS[1]]
    for encoding in ("latin-1", "utf-16", "utf-16-le"):
        path.write_text("Foto ü 1\n", encoding=encoding)
        with pytest.raises(UserError, match=r"list.txt is not text in UTF-8. Save it as UTF-8"):
            labelled_subset(FOTOS, str(path), seed=0, where="x")


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
