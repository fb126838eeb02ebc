"""Labels that teach nothing are said, with what to do; good ones pass without a word."""

import pytest

from multidomain_cct.data.domain import LabelClass
from multidomain_cct.data.label_findings import pixel_findings, table_findings

ROAD, CAR = LabelClass("road", (1, 2, 3)), LabelClass("car", (4, 5, 6), thing=True)
TABLE = (ROAD, CAR)


def said(pixels: list[int], classes: tuple[LabelClass, ...] = TABLE, **values: dict[str, int]) -> str:
    """The findings about pixels by train id; the last of `pixels` are ignored ones."""
    counts = pixels[:-1] + [0] * (256 - len(pixels)) + pixels[-1:]
    return " ".join(pixel_findings(classes, counts, **({"unnamed": {}, "raw": {}} | values)))


def test_labels_that_teach_every_class_pass_without_a_word() -> None:
    assert said([60, 35, 5], unnamed={"9": 4}, raw={"0": 60, "1": 35, "9": 4, "255": 1}) == ""
    assert table_findings(TABLE) == []


def test_a_table_of_one_class_and_one_without_things_are_said() -> None:
    assert "one class" in " ".join(table_findings([CAR]))
    assert "thing: true" in " ".join(table_findings([ROAD, LabelClass("sky", (7, 8, 9))]))


def test_classes_without_a_pixel_are_named() -> None:
    assert 'no pixel of the class "car"' in said([100, 0, 0])
    assert "no pixel of any class" in said([0, 0, 100])


def test_values_that_no_class_names_are_said_from_five_percent_on() -> None:
    text = said([50, 44, 6], unnamed={"9": 1, "12": 5})
    assert "6.0% of the pixels are ignored" in text
    assert "12, 9" in text
    assert "ignore_ids" in text
    assert said([50, 45, 5], unnamed={"9": 5}) == ""


@pytest.mark.parametrize("raw", [{"1": 50, "2": 50}, {"0": 40, "1": 30, "2": 30}, {"1": 60, "255": 40}])
def test_ids_that_look_shifted_by_one_are_said(raw: dict[str, int]) -> None:
    unnamed = {value: count for value, count in raw.items() if value == "2"}
    assert "shifted by one" in said([50, 50, 0], unnamed=unnamed, raw=raw)


@pytest.mark.parametrize("raw", [{"0": 50, "1": 50}, {"0": 50, "1": 30, "2": 10, "7": 10}, {"#010101": 50}])
def test_other_ids_do_not_look_shifted(raw: dict[str, int]) -> None:
    unnamed = {value: count for value, count in raw.items() if value not in ("0", "1")}
    assert "shifted" not in said([50, 50, 0], unnamed=unnamed, raw=raw)


def test_ids_that_the_table_gives_do_not_look_shifted() -> None:
    classes = (LabelClass("road", (1, 2, 3), ids=(1,)), LabelClass("car", (4, 5, 6), ids=(2,)))
    assert said([50, 50, 0], classes, raw={"1": 50, "2": 50}) == ""


def test_masks_of_0_and_255_are_told_how_to_name_their_foreground() -> None:
    assert "ids: [255]" in said([60, 0, 40], raw={"0": 60, "255": 40})
    named = (LabelClass("road", (1, 2, 3), ids=(0,)), LabelClass("car", (4, 5, 6), ids=(255,)))
    assert said([60, 40, 0], named, raw={"0": 60, "255": 40}) == ""


def test_ids_in_three_equal_channels_are_recognised() -> None:
    assert "three equal channels" in said([0, 0, 100], unnamed={"#000000": 60, "#010101": 40}, raw={"#000000": 60})
    assert "three equal channels" not in said([50, 40, 10], unnamed={"#ff0000": 10})
