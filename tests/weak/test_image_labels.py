"""Image-level labels are read from lists and masks, and lists that do not fit are refused by file, key and class."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from multidomain_cct.data.batches.loader import TrainingSet
from multidomain_cct.data.batches.streams import DataSettings, DomainSettings
from multidomain_cct.data.batches.views import Augment
from multidomain_cct.data.domain import Domain, LabelClass, Split
from multidomain_cct.data.shards.reader import Shards
from multidomain_cct.errors import UserError
from multidomain_cct.weak.image_labels import (
    background_class,
    classes_of_masks,
    classified,
    open_tagged,
    read_image_labels,
)

KEYS = ("a", "b", "street/c")


def street(*, things: tuple[bool, ...] = (False, True, True)) -> Domain:
    names = ("road", "car", "traffic light")
    classes = tuple(
        LabelClass(name, (10 * number, 0, 0), thing=thing)
        for number, (name, thing) in enumerate(zip(names, things, strict=True))
    )
    return Domain("street", "folder", {"train": Split()}, classes)


def read(tmp_path: Path, text: str, name: str = "labels.txt") -> dict[str, frozenset[int]]:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return read_image_labels(path, street(), KEYS)


def test_a_text_list_has_a_key_and_its_classes_on_each_line(tmp_path: Path) -> None:
    text = '# what the images show\na car road\n\nstreet/c "traffic light"   car # two of them\n'
    assert read(tmp_path, text) == {"a": {0, 1}, "street/c": {1, 2}}


def test_a_json_list_says_the_same(tmp_path: Path) -> None:
    assert read(tmp_path, json.dumps({"a": ["car", "road"], "street/c": ["traffic light", "car"]}), "labels.json") == {
        "a": {0, 1},
        "street/c": {1, 2},
    }


def test_keys_with_spaces_stand_in_quotes(tmp_path: Path) -> None:
    path = tmp_path / "labels.txt"
    path.write_text('"a photo" car\n', encoding="utf-8")
    assert read_image_labels(path, street(), ["a photo"]) == {"a photo": {1}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "a car\nq car\n",
            "labels.txt: line 2: the key 'q' is none of the 3 images in the training and unlabelled splits of street.",
        ),
        (
            "street/d car\n",
            "line 1: the key 'street/d' is none of the 3 images in the training and unlabelled splits of street. Did "
            'you mean "street/c"?',
        ),
        (
            "a caar\n",
            "line 1: the key 'a' has the class 'caar'. Known: road, car, traffic light. Write names with spaces in "
            'double quotes: "a name". Did you mean "car"?',
        ),
        ("a car\nb road\na road\n", "line 3: the key 'a' is listed twice. An image has one line with all its classes."),
        (
            "a car\nb # nothing\n",
            "line 2: the key 'b' has no class. Name the classes that it shows, or leave the image out.",
        ),
        (
            "# nothing\n",
            "labels.txt: no image is listed. Image-level labels are a text list (`key class class`) or JSON",
        ),
    ],
)
def test_a_text_list_that_does_not_fit_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        read(tmp_path, text)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert str(tmp_path / "labels.txt") in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": ["car"],\n "b": [}', "labels.json: line 2: this is not valid JSON"),
        ('["a"]', "labels.json: holds list; it is {key: [class, ...]}."),
        ('{"a": "car"}', "labels.json: the key 'a' has \"car\"; it has a list of class names."),
        ('{"a": {"car": 1}}', "labels.json: the key 'a' has"),
        ('{"a": [1]}', "labels.json: the key 'a' has [1]; it has a list of class names."),
        ('{"a": ["car"], "a": ["road"]}', "labels.json: the key 'a' is listed twice."),
        ('{"a": []}', "labels.json: the key 'a' has no class."),
        ('{"a": ["rod"]}', "labels.json: the key 'a' has the class 'rod'."),
        ("{}", "labels.json: no image is listed."),
    ],
)
def test_a_json_list_that_does_not_fit_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        read(tmp_path, text, "labels.json")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_list_that_is_not_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "labels.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="labels.txt: this is not text in UTF-8"):
        read_image_labels(tmp_path / "labels.txt", street(), KEYS)


def test_the_only_class_that_is_no_thing_is_the_background() -> None:
    assert background_class(street()) == 0
    assert classified(street()) == (1, 2)


@pytest.mark.parametrize("things", [(False, False, True), (True, True, True)])
def test_several_or_no_such_classes_are_all_classified(things: tuple[bool, ...]) -> None:
    assert background_class(street(things=things)) is None
    assert classified(street(things=things)) == (0, 1, 2)


def test_masks_tell_the_classes_that_have_the_least_share_of_pixels(
    two_domains: Path, tiny_domain: Callable[..., Domain]
) -> None:
    domain = tiny_domain("fields", ("grass", "sky", "barn"))
    shards = Shards.open(two_domains / "fields", "train")
    for least_share in (0.001, 0.2):
        shown = classes_of_masks(shards, domain, range(len(shards)), least_share=least_share)
        for number in range(len(shards)):
            ids = mask_of(shards, number)
            assert shown[shards.keys[number]] == {
                train_id for train_id in range(3) if (ids == train_id).mean() >= least_share
            }


def mask_of(shards: Shards, number: int) -> np.ndarray:
    import io

    from PIL import Image

    mask = shards.read(number).mask
    assert mask is not None
    return np.asarray(Image.open(io.BytesIO(mask)))


@pytest.fixture
def fields(tiny_domain: Callable[..., Domain]) -> Domain:
    return tiny_domain("fields", ("grass", "sky", "barn"))


def choose(**settings: object) -> DomainSettings:
    return DomainSettings(**{"labelled": "3", **settings})  # type: ignore[arg-type]


def test_with_masks_every_image_of_the_training_split_is_listed(two_domains: Path, fields: Domain) -> None:
    tagged = open_tagged(fields, choose(image_labels="masks"), DataSettings(shards=str(two_domains)), least_share=0.001)
    assert tagged.listed == tuple(tagged.sources[0].keys) == tuple(tagged.samples)


def test_images_of_the_labelled_budget_train_the_classifier_but_are_not_listed(
    two_domains: Path, fields: Domain, tmp_path: Path
) -> None:
    path = tmp_path / "labels.txt"
    path.write_text("unlabelled_002 grass sky\nunlabelled_004 barn\n", encoding="utf-8")
    tagged = open_tagged(
        fields,
        choose(image_labels=str(path), unlabelled_splits=["unlabelled"]),
        DataSettings(shards=str(two_domains)),
        least_share=0.001,
    )
    assert sorted(tagged.listed) == ["unlabelled_002", "unlabelled_004"]
    assert len(tagged.samples) == 3 + 2
    assert tagged.classes["unlabelled_002"] == {0, 1}
    source, number = tagged.samples["unlabelled_004"]
    assert tagged.sources[source].keys[number] == "unlabelled_004"


def test_the_background_is_not_among_the_classes_of_an_image(two_domains: Path, fields: Domain) -> None:
    from dataclasses import replace

    grass, sky, barn = fields.classes
    backed = replace(fields, classes=(replace(grass, thing=True), replace(sky, thing=True), barn))
    tagged = open_tagged(backed, choose(image_labels="masks"), DataSettings(shards=str(two_domains)), least_share=0.001)
    assert all(2 not in classes for classes in tagged.classes.values())
    assert any(classes for classes in tagged.classes.values())


def test_the_loader_reads_them_without_masks(two_domains: Path, fields: Domain) -> None:
    data, choice = DataSettings(shards=str(two_domains), crop=[32, 24]), choose(image_labels="masks")
    tagged = open_tagged(fields, choice, data, least_share=0.001)
    batch = TrainingSet([tagged.streams(data, choice, 4)], seed=0, augment=Augment())[0]
    assert isinstance(batch, dict)
    assert batch["fields"].unlabelled.shape == (4, 3, 24, 32)
    assert len(batch["fields"].images) == 0
    assert len(batch["fields"].keys) == 4
    assert set(batch["fields"].keys) <= set(tagged.classes)


def test_a_list_that_is_not_there_is_named(two_domains: Path, fields: Domain) -> None:
    choice = choose(image_labels="nowhere.txt")
    with pytest.raises(
        UserError, match="domains.fields.image_labels is 'nowhere.txt'; it is `masks`, or a text or JSON file"
    ):
        open_tagged(fields, choice, DataSettings(shards=str(two_domains)), least_share=0.001)


def test_masks_of_a_split_without_masks_are_refused(two_domains: Path, fields: Domain) -> None:
    choice = choose(image_labels="masks", labelled="none", train_split="unlabelled")
    with pytest.raises(UserError, match="domains.fields.image_labels is `masks`, .*'unlabelled' has none. Name a list"):
        open_tagged(fields, choice, DataSettings(shards=str(two_domains)), least_share=0.001)
