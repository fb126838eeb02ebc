"""A domain is one YAML file: what it says is what one gets, and what it says wrongly is named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from multidomain_cct.data.domain import IGNORE, Domain, LabelClass, Split
from multidomain_cct.data.specification import domain_folders, find_domain, known_domains, read_domain
from multidomain_cct.errors import UserError

SHIPPED = Path(__file__).parents[2] / "domains"

STREET = """\
name: street
title: A street
licence: MIT
source: https://example.org
layout: folder
splits:
  train: {images: images/*.jpg, masks: masks/*.png}
  extra: {images: more/*.jpg}
size: [64, 48]
unknown: error
ignore_ids: [0, 255]
ignore_colors: [[0, 0, 0]]
classes:
  - {name: road, color: [128, 64, 128], ids: [7, 300], colors: [[128, 64, 128], [1, 2, 3]]}
  - {name: car, color: [0, 0, 142], ids: [26], thing: true}
"""


def write(folder: Path, text: str = STREET, name: str = "street.yaml") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_a_specification_is_read_as_written(tmp_path: Path) -> None:
    domain = read_domain(write(tmp_path))
    assert domain == Domain(
        name="street",
        layout="folder",
        splits={"train": Split("images/*.jpg", "masks/*.png"), "extra": Split("more/*.jpg")},
        classes=(
            LabelClass("road", (128, 64, 128), ids=(7, 300), colors=((128, 64, 128), (1, 2, 3))),
            LabelClass("car", (0, 0, 142), ids=(26,), thing=True),
        ),
        title="A street",
        licence="MIT",
        source="https://example.org",
        size=(64, 48),
        unknown="error",
        ignore_ids=(0, 255),
        ignore_colors=((0, 0, 0),),
    )


def test_optional_fields_have_defaults(tmp_path: Path) -> None:
    text = "layout: voc\nsplits: [train, val]\nclasses:\n  - {name: a, color: [1, 2, 3]}\n"
    domain = read_domain(write(tmp_path, text))
    assert domain.name == "street"
    assert (domain.size, domain.unknown, domain.ignore_ids, domain.score_at_full_size) == (
        None,
        "ignore",
        (IGNORE,),
        ("val", "test"),
    )
    assert list(domain.splits) == ["train", "val"]
    assert not domain.classes[0].thing


@pytest.mark.parametrize("path", sorted(SHIPPED.glob("*.yaml")), ids=lambda path: path.stem)
def test_writing_and_reading_back_gives_an_equal_domain(path: Path, tmp_path: Path) -> None:
    domain = read_domain(path)
    assert read_domain(write(tmp_path, domain.to_yaml(), path.name)) == domain


def test_a_class_without_raw_ids_differs_from_one_whose_id_is_its_position(tmp_path: Path) -> None:
    text = STREET.replace("ids: [26]", "ids: []")
    domain = read_domain(write(tmp_path, text))
    assert domain.classes[1].ids == ()
    assert read_domain(write(tmp_path / "again", domain.to_yaml())) == domain


@pytest.mark.parametrize(
    ("name", "count", "things"),
    [("cityscapes", 19, 11), ("camvid", 11, 5), ("sun_rgbd", 37, 34), ("sun_rgbd_13", 13, 10), ("pascal_voc", 21, 20)],
)
def test_every_published_data_set_has_its_classes(name: str, count: int, things: int) -> None:
    domain = find_domain(name, [SHIPPED])
    assert domain.num_classes == count
    assert sum(label.thing for label in domain.classes) == things
    assert domain.title
    assert domain.licence
    assert domain.source


def test_raw_ids_become_train_ids() -> None:
    train, known = find_domain("cityscapes", [SHIPPED]).id_lookup
    assert train.dtype == np.uint8
    assert train.shape == known.shape == (65536,)
    # cityscapesscripts/helpers/labels.py
    official = {
        7: 0,
        8: 1,
        11: 2,
        12: 3,
        13: 4,
        17: 5,
        19: 6,
        20: 7,
        21: 8,
        22: 9,
        23: 10,
        24: 11,
        25: 12,
        26: 13,
        27: 14,
        28: 15,
        31: 16,
        32: 17,
        33: 18,
    }
    assert {raw: int(train[raw]) for raw in range(65536) if train[raw] != IGNORE} == official
    # The 34 raw ids and the ignore value itself are no surprise; everything else is.
    assert set(np.flatnonzero(known)) == {*range(34), 255}


def test_ids_default_to_the_position_in_the_table(tmp_path: Path) -> None:
    text = (
        STREET.replace("ids: [7, 300], ", "")
        .replace("ids: [26], ", "")
        .replace("ignore_ids: [0, 255]", "ignore_ids: [9]")
    )
    train, known = read_domain(write(tmp_path, text)).id_lookup
    assert train[:3].tolist() == [0, 1, IGNORE]
    assert np.flatnonzero(known).tolist() == [0, 1, 9]


def test_raw_colours_become_train_ids() -> None:
    domain = find_domain("camvid", [SHIPPED])
    codes, train = domain.color_lookup
    assert len(codes) == 32
    assert (np.diff(codes) > 0).all()
    lookup = dict(zip(codes.tolist(), train.tolist(), strict=True))
    assert lookup[128 << 16 | 0 << 8 | 192] == 3  # LaneMkgsDriv is road
    assert lookup[64 << 16 | 192 << 8 | 0] == 1  # Wall is building
    assert lookup[0] == IGNORE


def test_sun_rgbd_13_groups_the_37_classes_as_scenenet_does() -> None:
    fine, coarse = find_domain("sun_rgbd", [SHIPPED]), find_domain("sun_rgbd_13", [SHIPPED])
    train, known = coarse.id_lookup
    # METHOD.md section 5, ids 1..37 to 1..13.
    expected = [
        12,
        5,
        6,
        1,
        4,
        9,
        10,
        12,
        13,
        6,
        8,
        6,
        13,
        10,
        6,
        13,
        6,
        7,
        7,
        5,
        7,
        3,
        2,
        6,
        11,
        7,
        7,
        7,
        7,
        7,
        7,
        6,
        7,
        7,
        7,
        7,
        7,
    ]
    assert (train[1:38] + 1).tolist() == expected
    assert known[:38].all()
    assert [label.ids for label in fine.classes] == [(raw,) for raw in range(1, 38)]


def test_palette_shows_each_class_in_its_colour_and_the_rest_black() -> None:
    domain = find_domain("pascal_voc", [SHIPPED])
    assert domain.palette.shape == (256, 3)
    assert domain.palette.dtype == np.uint8
    # The VOC colormap, bit by bit.
    for raw_id in range(21):
        expected = [sum((raw_id >> (3 * bit + channel) & 1) << (7 - bit) for bit in range(3)) for channel in range(3)]
        assert domain.palette[raw_id].tolist() == expected
    assert not domain.palette[21:].any()


def test_pascal_voc_has_the_ids_and_the_border_colour_of_its_authors() -> None:
    domain = find_domain("pascal_voc", [SHIPPED])
    # VOC2012 development kit, section 3.4.1, and VOCinit.m.
    names = (
        "background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person "
        "pottedplant sheep sofa train tvmonitor"
    )
    assert [label.name for label in domain.classes] == names.split()
    train, known = domain.id_lookup
    assert train[:21].tolist() == list(range(21))
    assert train[255] == IGNORE
    assert known[255]
    codes, ids = domain.color_lookup
    assert ids[codes.tolist().index(224 << 16 | 224 << 8 | 192)] == IGNORE


def test_class_fingerprint_follows_names_and_order_only(tmp_path: Path) -> None:
    domain = read_domain(write(tmp_path))
    recoloured = read_domain(write(tmp_path, STREET.replace("color: [0, 0, 142]", "color: [9, 9, 9]")))
    renamed = read_domain(write(tmp_path, STREET.replace("name: car", "name: bus")))
    assert domain.class_fingerprint == recoloured.class_fingerprint != renamed.class_fingerprint


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("ids: [26]", "ids: [7]", 'raw id 7 belongs to both "road" and "car"; it can only be one.'),
        ("ids: [7, 300]", "ids: [7, 7]", "raw id 7 belongs to both"),
        ("ids: [26], ", "", "classes[1] (car) has no ids but other classes do. Give every class its ids, or none."),
        ("ids: [26]", "ids: [255]", 'raw id 255 belongs to both "car" and ignore_ids'),
        ("ids: [26]", "ids: [70000]", "classes[1].ids holds 70000; a raw id is an integer from 0 to 65535."),
        ("ids: [26]", "ids: [true]", "classes[1].ids holds True"),
        ("ids: [26]", "ids: 2.5", "classes[1].ids is 2.5; it is a list"),
        (
            "color: [0, 0, 142]",
            "color: [0, 0, 256]",
            "classes[1].color is [0, 0, 256]; a colour is three integers from 0 to 255.",
        ),
        (
            "color: [0, 0, 142]",
            "color: [102, 102]",
            "classes[1].color is [102, 102]; a colour is three integers from 0 to 255.",
        ),
        ("color: [0, 0, 142]", "color: [1, 2, 3]", 'raw color [1, 2, 3] belongs to both "road" and "car"'),
        ("color: [0, 0, 142]", "color: [0, 0, 0]", 'raw color [0, 0, 0] belongs to both "car" and ignore_colors'),
        ("color: [0, 0, 142], ", "", "a row needs at least name and color"),
        ("name: car", "name:", "a row needs at least name and color"),
        ("name: car", "name: road", 'classes[1].name "road" is also the name of classes[0]'),
        ("thing: true", "thing: 1", "classes[1].thing is 1; it is true (countable object) or false (stuff)."),
        (
            "thing: true",
            "think: true",
            "classes[1]: the key is 'think'; it is one of name, color, ids, colors, names, thing. Did you mean",
        ),
        ("licence: MIT", "license: MIT", "the key is 'license'; it is one of name, layout,"),
        ("licence: MIT", "title: again", "line 3: the key 'title' appears twice; keep one."),
        ("licence: MIT", 'licence: "\\e[31mred"', "licence is '\\\\x1b[31mred'; it holds control characters"),
        ("title: A street", 'title: "a\\u202eb"', "title is 'a\\\\u202eb'; it holds control characters"),
        ("name: car", 'name: "car\\x07"', "classes[1].name is 'car\\\\x07'; it holds control characters"),
        ("licence: MIT", "? [a]\n: b", "line 3: the key ['a'] is not a word"),
        ("name: street", "name: avenue", 'name is "avenue", but the file is named street.yaml'),
        ("name: street", "name: 1st", "name is '1st'; a name starts with a letter"),
        (
            "layout: folder",
            "layout: folders",
            "layout is 'folders'; it is one of folder, cityscapes, camvid, sun_rgbd, voc, toy. Did you mean",
        ),
        ("layout: folder\n", "", "layout is missing"),
        ("images: more/*.jpg", "masks: more/*.png", "splits.extra.images is missing"),
        ("images: more/*.jpg", "images: [more, most]", "splits.extra.images is ['more', 'most']; it is one glob"),
        (
            "images: more/*.jpg",
            "image: more/*.jpg",
            "splits.extra: the key is 'image'; it is one of images, masks. Did you mean \"images\"?",
        ),
        ("extra: {images: more/*.jpg}", "1st: {images: more/*.jpg}", "splits has the name '1st'"),
        ("extra: {images: more/*.jpg}", "extra: more/*.jpg", "splits.extra is 'more/*.jpg'; it is a mapping"),
        ("size: [64, 48]", "size: 64", "size is 64; it is `original` or [width, height] in pixels."),
        ("unknown: error", "unknown: fail", "unknown is 'fail'; it is one of ignore, error."),
        ("ignore_ids: [0, 255]", "ignore_ids: 255", "ignore_ids is 255; it is a list"),
        ("ignore_colors: [[0, 0, 0]]", "ignore_colors: [0, 0, 0]", "ignore_colors is 0; a colour is three integers"),
        ("unknown: error", "score_at_full_size: val", "score_at_full_size is 'val'; it is a list"),
        ("title: A street", "title: [A street", "this is not valid YAML"),
        (
            "title: A street",
            "title: !!python/name:os.system",
            "this is not valid YAML: could not determine a constructor",
        ),
    ],
)
def test_what_cannot_be_used_is_named_in_one_line_with_its_file(
    tmp_path: Path, old: str, new: str, message: str
) -> None:
    assert STREET.count(old) == 1
    path = write(tmp_path, STREET.replace(old, new))
    with pytest.raises(UserError) as caught:
        read_domain(path)
    assert message in str(caught.value)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "- a\n", "classes\n"])
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(UserError, match="a mapping of keys to values is expected"):
        read_domain(write(tmp_path, text))


def test_a_title_of_several_lines_becomes_one(tmp_path: Path) -> None:
    text = STREET.replace("title: A street", "title: |\n  Eine Straße\n  写真 in سنا")
    assert read_domain(write(tmp_path, text)).title == "Eine Straße 写真 in سنا"


def test_classes_may_share_a_color_unless_the_table_speaks_of_masks_of_colours(tmp_path: Path) -> None:
    text = STREET.replace("color: [0, 0, 142]", "color: [128, 64, 128]")
    with pytest.raises(UserError, match='belongs to both "road" and "car"'):
        read_domain(write(tmp_path, text))
    text = text.replace(", colors: [[128, 64, 128], [1, 2, 3]]", "").replace("ignore_colors: [[0, 0, 0]]\n", "")
    assert [label.color for label in read_domain(write(tmp_path, text)).classes] == [(128, 64, 128)] * 2


def test_more_classes_than_a_mask_can_hold_are_refused(tmp_path: Path) -> None:
    rows = "".join(f"  - {{name: c{i}, color: [{i % 256}, {i // 256}, 1]}}\n" for i in range(256))
    with pytest.raises(UserError, match="classes has 256 rows; masks have 8 bits, so at most 255 classes fit"):
        read_domain(write(tmp_path, f"layout: toy\nsplits: [train]\nclasses:\n{rows}"))


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="street.yaml: there is no such file"):
        read_domain(tmp_path / "street.yaml")


def test_dropping_a_file_beside_the_recipes_adds_a_domain(tmp_path: Path) -> None:
    write(tmp_path / "domains")
    folders = domain_folders(recipe=tmp_path / "recipes" / "mine.yaml")
    assert find_domain("street", folders).title == "A street"
    assert {"street", "cityscapes", "camvid"} <= set(known_domains(folders))


def test_a_folder_that_is_named_comes_before_the_others(tmp_path: Path) -> None:
    write(tmp_path / "mine", STREET.replace("A street", "Mine"))
    write(tmp_path / "domains")
    assert (
        find_domain("street", domain_folders(extra=[tmp_path / "mine"], recipe=tmp_path / "recipe.yaml")).title
        == "Mine"
    )


def test_a_folder_that_is_named_and_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^--domains: .*mine: there is no such folder\.$"):
        domain_folders(extra=[tmp_path / "mine"])


def test_an_unknown_domain_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(
        UserError,
        match=r'recipes/cs_sun.yaml names the domain "citscapes". Known: .*camvid, .*cityscapes, .*Did you mean '
        r'"cityscapes"\?',
    ):
        find_domain("citscapes", [SHIPPED], named_by="recipes/cs_sun.yaml")


def test_of_many_known_domains_the_first_are_named(tmp_path: Path) -> None:
    for number in range(500):
        write(tmp_path, "", f"d{number:04d}.yaml")
    with pytest.raises(UserError, match=r'Known: d0000, .*and 480 more. Did you mean "d0499"\?') as caught:
        find_domain("d499", [tmp_path])
    assert len(str(caught.value)) < 400


# Borrowed label spaces


BORROWER = (
    "layout: folder\nlabels_of: street\nsplits:\n  train: {images: dusk/*.jpg}\n  val: {images: val/*.jpg, masks: "
    "val/*.png}\n"
)


@pytest.fixture
def lent(tmp_path: Path) -> Path:
    """A folder with the domain `street`, and `dusk` that borrows its labels."""
    write(tmp_path)
    write(tmp_path, BORROWER, "dusk.yaml")
    return tmp_path


def test_a_domain_may_have_the_classes_of_another_and_its_own_files(lent: Path) -> None:
    street, dusk = (find_domain(name, [lent]) for name in ("street", "dusk"))
    assert dusk.labels_of == "street"
    assert dusk.classes == street.classes
    assert dusk.class_fingerprint == street.class_fingerprint
    assert (dusk.ignore_ids, dusk.ignore_colors) == (street.ignore_ids, street.ignore_colors)
    assert dusk.splits == {"train": Split("dusk/*.jpg"), "val": Split("val/*.jpg", "val/*.png")}
    assert dusk.size is None
    for own, lenders in zip(
        (*dusk.id_lookup, *dusk.color_lookup), (*street.id_lookup, *street.color_lookup), strict=True
    ):
        assert np.array_equal(own, lenders)


def test_a_borrower_may_have_further_raw_values_without_a_class(lent: Path) -> None:
    write(lent, BORROWER + "ignore_ids: [9]\nignore_colors: [[7, 7, 7]]\n", "dusk.yaml")
    dusk = find_domain("dusk", [lent])
    assert dusk.ignore_ids == (0, 9, 255)
    assert dusk.ignore_colors == ((0, 0, 0), (7, 7, 7))


def test_a_borrower_is_written_with_its_classes_and_read_back_alone(lent: Path, tmp_path: Path) -> None:
    dusk = find_domain("dusk", [lent])
    assert read_domain(write(tmp_path / "run", dusk.to_yaml(), "dusk.yaml")) == dusk
    # The classes are the lender's, so they may stand in the file.
    write(lent, dusk.to_yaml(), "dusk.yaml")
    assert find_domain("dusk", [lent]) == dusk


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("street", "dusk", 'labels_of is "dusk"; it is the name of another domain. Known: night, street.'),
        (
            "street",
            "streat",
            'labels_of is "streat"; it is the name of another domain. Known: night, street. Did you mean "street"?',
        ),
        (
            "labels_of: street",
            "labels_of: night",
            'labels_of is "night", which borrows its labels itself. Name "street".',
        ),
        (
            "splits:",
            "classes: [{name: sea, color: [1, 2, 3]}]\nsplits:",
            "but its classes are others. Leave `classes` out, or leave labels_of out.",
        ),
        ("splits:", "ignore_ids: [7]\nsplits:", 'raw id 7 belongs to both "road" and ignore_ids; it can only be one.'),
        (
            "labels_of: street\n",
            "",
            "classes is missing. A domain needs name, layout, splits and classes (or labels_of)",
        ),
    ],
)
def test_labels_that_cannot_be_borrowed_are_named_in_one_line_with_their_file(
    lent: Path, old: str, new: str, message: str
) -> None:
    write(lent, BORROWER, "night.yaml")
    path = write(lent, BORROWER.replace(old, new, 1), "dusk.yaml")
    with pytest.raises(UserError) as caught:
        find_domain("dusk", [lent])
    assert message in str(caught.value)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("classes:", "background: raod\nclasses:", "background is 'raod'; it is one of road"),
        ("classes:", "ignore_names: [road]\nclasses:", 'raw name road belongs to both "road" and ignore_names'),
        ("classes:", "ignore_names: road\nclasses:", "ignore_names is 'road'; it is a list"),
    ],
)
def test_names_of_annotations_that_cannot_be_used_are_refused(tmp_path: Path, old: str, new: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        read_domain(write(tmp_path, STREET.replace(old, new)))
    assert message in str(caught.value)


def test_a_list_names_the_masks_itself(tmp_path: Path) -> None:
    text = "layout: folder\nsplits: {train: {images: a.txt, masks: '*.png'}}\nclasses: [{name: a, color: [0, 0, 0]}]"
    with pytest.raises(UserError, match="masks is given, but the list a.txt names the masks. Remove one"):
        read_domain(write(tmp_path, text))


def test_names_and_background_are_written_read_back_and_lent(lent: Path) -> None:
    text = (
        STREET.replace("thing: true", "thing: true, names: [auto, Pkw]") + "background: road\nignore_names: [blurred]\n"
    )
    street = read_domain(write(lent, text))
    assert street.name_lookup == {"blurred": IGNORE, "road": 0, "auto": 1, "Pkw": 1}
    assert read_domain(write(lent, street.to_yaml())) == street
    dusk = find_domain("dusk", [lent])
    assert (dusk.background_id, dusk.ignore_names) == (0, ("blurred",))
    assert dusk.name_lookup == street.name_lookup
