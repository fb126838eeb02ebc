"""Labels that teach nothing are said, with what to do; good ones pass without a word."""

from dataclasses import replace

import pytest

from multidomain_cct.data.domain import Domain, LabelClass, Split
from multidomain_cct.data.label_findings import pixel_findings, table_findings

ROAD, CAR = LabelClass("road", (1, 2, 3)), LabelClass("car", (4, 5, 6), thing=True)
STREET = Domain("street", "folder", {"train": Split("*.jpg", "*.png")}, (ROAD, CAR))


def said(*pixels: int, domain: Domain = STREET, **unnamed: int) -> str:
    """The findings about pixels by train id, the last ignored, and pixels by raw value without a class: v9=3."""
    counts = [*pixels[:-1], *[0] * (256 - len(pixels)), pixels[-1]]
    return " ".join(pixel_findings(domain, counts, {name[1:].replace("_", "#"): n for name, n in unnamed.items()}))


def test_labels_that_teach_every_class_pass_without_a_word() -> None:
    assert said(60, 35, 5, v9=4) == ""
    assert table_findings(STREET) == []


def test_a_table_of_one_class_and_one_without_things_are_said() -> None:
    assert "one class" in " ".join(table_findings(replace(STREET, classes=(CAR,))))
    assert "thing: true" in " ".join(table_findings(replace(STREET, classes=(ROAD, LabelClass("sky", (7, 8, 9))))))


def test_classes_without_a_pixel_are_named() -> None:
    assert 'no pixel of the class "car". Check ids or colors' in said(100, 0, 0)
    assert "begin at 1" not in said(100, 0, 0)
    assert "begin at 1" in said(0, 100, 0)
    assert "no pixel of any class" in said(0, 0, 100)


def test_values_that_no_class_names_are_said_above_five_percent() -> None:
    text = said(50, 44, 6, v9=1, v12=5)
    assert "6.0% of the pixels are ignored" in text
    assert "12, 9" in text
    assert "ignore_ids" in text
    assert said(50, 45, 5, v9=5) == ""
    # Values that the table ignores on purpose do not count.
    assert said(30, 30, 40) == ""


def test_an_id_just_above_the_table_looks_shifted() -> None:
    assert "shifted by one" in said(0, 50, 50, v2=50)
    assert "shifted by one" in said(30, 30, 40, v2=40)


@pytest.mark.parametrize("unnamed", [{"v7": 10}, {"v2": 5, "v7": 5}, {"v_020202": 10}])
def test_other_values_do_not_look_shifted(unnamed: dict[str, int]) -> None:
    assert "shifted" not in said(50, 40, 10, **unnamed)


def test_ids_that_the_table_gives_do_not_look_shifted() -> None:
    given = replace(STREET, classes=(replace(ROAD, ids=(1,)), replace(CAR, ids=(3,))))
    assert "shifted" not in said(50, 40, 10, domain=given, v2=10)


def test_masks_of_0_and_255_are_told_how_to_name_their_foreground() -> None:
    assert "ids: [255]" in said(60, 0, 40)
    named = replace(STREET, classes=(replace(ROAD, ids=(0,)), replace(CAR, ids=(255,))), ignore_ids=())
    assert said(60, 40, 0, domain=named) == ""
    assert "255" not in said(60, 0, 40, domain=replace(STREET, ignore_colors=((0, 0, 0),)))


def test_ids_in_three_equal_channels_are_recognised() -> None:
    assert "three equal channels" in said(0, 0, 100, v_000000=60, v_010101=40)
    for other in ("v_ff0000", "v_000000", "v_ffffff"):
        assert "three equal channels" not in said(50, 40, 10, **{other: 10})
