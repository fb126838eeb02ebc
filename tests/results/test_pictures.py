"""Pictures of train ids show each class in its colour and lose no id."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from multidomain_cct.data.domain import Domain
from multidomain_cct.files.printable import printable
from multidomain_cct.results.pictures import (
    IGNORED,
    RIGHT,
    WRONG,
    colored,
    error_map,
    indexed,
    legend,
    overlay,
    with_legend,
)

IDS = np.array([[0, 1, 2], [2, 255, 0]], dtype=np.uint8)


@pytest.fixture
def domain(tiny_domain: Callable[..., Domain]) -> Domain:
    return tiny_domain("fields", ("grass", "sky", "barn"))


def test_classes_have_their_colours_and_ignored_pixels_are_black(domain: Domain) -> None:
    pixels = np.asarray(colored(IDS, domain))
    assert pixels.shape == (2, 3, 3)
    assert tuple(pixels[0, 1]) == domain.classes[1].color
    assert tuple(pixels[1, 1]) == (0, 0, 0)


def test_an_indexed_png_keeps_the_ids_and_shows_the_colours(domain: Domain) -> None:
    file = io.BytesIO()
    indexed(IDS, domain).save(file, "PNG")
    with Image.open(file) as image:
        assert image.mode == "P"
        assert np.array_equal(np.asarray(image), IDS)
        assert np.array_equal(np.asarray(image.convert("RGB")), np.asarray(colored(IDS, domain)))


def test_every_id_survives_an_indexed_png(tiny_domain: Callable[..., Domain]) -> None:
    many = tiny_domain("many", tuple(f"class {number}" for number in range(255)))
    ids = np.arange(256, dtype=np.uint8).reshape(16, 16)
    file = io.BytesIO()
    indexed(ids, many).save(file, "PNG")
    with Image.open(file) as image:
        assert np.array_equal(np.asarray(image), ids)


def test_an_overlay_mixes_colour_and_image_by_its_opacity(domain: Domain) -> None:
    image = Image.new("RGB", (3, 2), (200, 100, 0))
    mixed = np.asarray(overlay(image, IDS, domain, 0.25), dtype=np.float64)
    expected = 0.25 * domain.palette[IDS] + 0.75 * np.asarray(image, dtype=np.float64)
    expected[1, 1] = (200, 100, 0)
    assert np.abs(mixed - expected).max() <= 1


def test_a_legend_has_a_swatch_for_each_class_that_is_present(domain: Domain) -> None:
    colors = {tuple(pixel) for pixel in np.asarray(legend(domain, [0, 2])).reshape(-1, 3).tolist()}
    assert {domain.classes[0].color, domain.classes[2].color} <= colors
    assert domain.classes[1].color not in colors


def test_a_legend_flows_into_as_many_columns_as_fit(domain: Domain) -> None:
    narrow, wide = legend(domain, [0, 1, 2], width=40), legend(domain, [0, 1, 2], width=800)
    assert wide.width == 800
    assert narrow.width < 150
    assert narrow.height > 2 * wide.height


def test_an_empty_legend_is_a_margin(domain: Domain) -> None:
    assert legend(domain, []).height < 20


def test_a_hostile_class_name_is_drawn_on_one_line_of_bounded_length(tiny_domain: Callable[..., Domain]) -> None:
    plain = legend(tiny_domain("plain", ("a",)), [0])
    hostile = legend(tiny_domain("hostile", ("line\nbreak\x07" * 100,)), [0])
    assert hostile.height == plain.height
    assert hostile.width < 600


def test_the_legend_stands_below_the_unscaled_image(domain: Domain) -> None:
    image = Image.new("RGB", (500, 40), (1, 2, 3))
    key = legend(domain, [0, 1], width=image.width)
    page = with_legend(image, key)
    assert page.size == (500, 40 + key.height)
    assert np.array_equal(np.asarray(page)[:40], np.asarray(image))


def test_an_error_map_tells_right_wrong_and_ignored_apart() -> None:
    truth = np.array([[0, 1, 255]], dtype=np.uint8)
    prediction = np.array([[0, 0, 1]], dtype=np.uint8)
    assert np.asarray(error_map(truth, prediction)).tolist() == [[list(RIGHT), list(WRONG), list(IGNORED)]]


def test_control_characters_are_written_out_and_letters_kept() -> None:
    assert printable("Straße\x1b[31m\n") == "Straße\\x1b[31m\\n"
