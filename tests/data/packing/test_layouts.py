"""Each published tree, in miniature, gives its pairs; what is missing in it is named."""

from __future__ import annotations

import random
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from multidomain_cct.data.domain import LAYOUTS, Domain, LabelClass, Split
from multidomain_cct.data.packing.layouts import _LAYOUTS, raw_samples
from multidomain_cct.data.packing.raw_files import LONGEST_KEY, Glob, MissingRawFiles, RawSample
from multidomain_cct.data.packing.raw_masks import read_mask
from multidomain_cct.data.specification import find_domain
from multidomain_cct.errors import UserError

SHIPPED = Path(__file__).parents[3] / "domains"


def published(name: str) -> Domain:
    return find_domain(name, [SHIPPED])


def folder_domain(**splits: Split) -> Domain:
    return Domain("mine", "folder", splits, (LabelClass("a", (1, 2, 3)), LabelClass("b", (4, 5, 6))))


def draw(raw: Path, *names: str, value: int = 0) -> None:
    for name in names:
        (raw / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (2, 2), value).save(raw / name)


def pairs(samples: list[RawSample], raw: Path) -> dict[str, tuple[str, str | None]]:
    assert [sample.key for sample in samples] == sorted(sample.key for sample in samples)
    return {
        s.key: (s.image.relative_to(raw).as_posix(), s.mask and s.mask.path.relative_to(raw).as_posix())
        for s in samples
    }


def refused(kind: type[Exception], domain: Domain, raw: Path, split: str = "train") -> str:
    """What is said about a tree that cannot be used."""
    with pytest.raises(kind) as caught:
        raw_samples(domain, raw, split)
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith((".", "]"))
    return message


# What every layout shares


def test_a_split_that_the_domain_does_not_have_is_refused_with_the_nearest_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'trian'; it is one of train, val, train_extra. Did you mean \"train\""):
        raw_samples(published("cityscapes"), tmp_path, "trian")


@pytest.mark.parametrize("name", ["cityscapes", "camvid", "sun_rgbd", "pascal_voc", "toy_street"])
def test_a_raw_folder_that_is_not_there_is_named(tmp_path: Path, name: str) -> None:
    message = refused(MissingRawFiles, published(name), tmp_path / "absent")
    assert message == f"{tmp_path / 'absent'}: there is no such folder. Name the folder of the raw files of {name}."


@pytest.mark.parametrize(
    ("name", "needed"),
    [
        (
            "cityscapes",
            "leftImg8bit/train: split train of cityscapes needs */*_leftImg8bit.png in it, and there is no such "
            "folder.",
        ),
        (
            "camvid",
            "split train of camvid needs the folders train and trainannot, or 701_StillsRaw_full and "
            "LabeledApproved_full; neither pair is there.",
        ),
        ("sun_rgbd", "image/train: split train of sun_rgbd needs * in it, and there is no such folder."),
        ("pascal_voc", "JPEGImages: split train of pascal_voc needs * in it, and there is no such folder."),
        ("toy_street", "split train of toy_street needs images/train/*.jpg, and no image matches that."),
    ],
)
def test_a_raw_folder_without_the_split_is_told_what_it_lacks(tmp_path: Path, name: str, needed: str) -> None:
    message = refused(MissingRawFiles, published(name), tmp_path)
    assert message.startswith(str(tmp_path))
    assert message.endswith(needed)


def test_a_folder_without_images_is_no_split(tmp_path: Path) -> None:
    (tmp_path / "leftImg8bit" / "train" / "aachen").mkdir(parents=True)
    (tmp_path / "leftImg8bit" / "train" / "aachen" / "notes.txt").touch()
    assert refused(MissingRawFiles, published("cityscapes"), tmp_path).endswith(
        "needs */*_leftImg8bit.png in it, and no image there matches that."
    )


# Keys


def test_keys_are_flat_names_that_tell_paths_apart(tmp_path: Path) -> None:
    stems = ["a-b_1", "a/b", "a=2Fb", "a b", "a.b", "ä", "a=b"]
    draw(tmp_path, *(f"images/{stem}.png" for stem in stems))
    samples = raw_samples(folder_domain(train=Split("images/**/*.png")), tmp_path, "train")
    keys = {sample.image.relative_to(tmp_path / "images").with_suffix("").as_posix(): sample.key for sample in samples}
    assert keys == {
        "a-b_1": "a-b_1",
        "a/b": "a=2Fb",
        "a=2Fb": "a=3D2Fb",
        "a b": "a=20b",
        "a.b": "a=2Eb",
        "ä": "=C3=A4",
        "a=b": "a=3Db",
    }
    assert all(re.fullmatch(r"[A-Za-z0-9_=-]+", key) for key in keys.values())


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not allow such file names")
def test_a_file_name_that_is_no_text_has_a_key_too(tmp_path: Path) -> None:
    draw(tmp_path, "images/a.png")
    (tmp_path / "images" / "a.png").rename(tmp_path / "images" / "\udcff.png")
    assert [sample.key for sample in raw_samples(folder_domain(train=Split("images/*.png")), tmp_path, "train")] == [
        "=FF"
    ]


def test_a_key_that_no_file_system_holds_is_refused(tmp_path: Path) -> None:
    draw(tmp_path, f"images/{'a' * LONGEST_KEY}.png")
    domain = folder_domain(train=Split("images/*.png"))
    assert len(raw_samples(domain, tmp_path, "train")[0].key) == LONGEST_KEY
    draw(tmp_path, f"images/{'b' * LONGEST_KEY}b.png")
    assert "bbb: gives a sample key of 201 characters; at most 200 fit." in refused(UserError, domain, tmp_path)


# folder


def test_images_and_masks_are_paired_by_name_not_by_listing_order(tmp_path: Path) -> None:
    # Sorted, the two folders list these in different orders: "-" comes before "." and "." before "_".
    stems = ["a", "a-1", "a_1", "b", "10", "9"]
    random.Random(0).shuffle(stems)
    draw(tmp_path, *(f"photos/{stem}.jpg" for stem in stems))
    draw(tmp_path, *(f"labels/{stem}_mask.png" for stem in reversed(stems)))
    samples = raw_samples(folder_domain(train=Split("photos/*.jpg", "labels/*.png")), tmp_path, "train")
    assert pairs(samples, tmp_path) == {stem: (f"photos/{stem}.jpg", f"labels/{stem}_mask.png") for stem in stems}


@pytest.mark.parametrize("ending", ["", "_mask", "-mask", "_label", "_gt"])
def test_a_mask_may_add_a_usual_ending_to_the_name(tmp_path: Path, ending: str) -> None:
    draw(tmp_path, "images/x/one.jpg", f"masks/x/one{ending}.png")
    samples = raw_samples(folder_domain(train=Split("images/**/*.jpg", "masks/**/*.png")), tmp_path, "train")
    assert pairs(samples, tmp_path) == {"x=2Fone": ("images/x/one.jpg", f"masks/x/one{ending}.png")}


def test_the_exact_name_comes_before_a_usual_ending(tmp_path: Path) -> None:
    draw(tmp_path, "images/one.jpg", "images/one_gt.jpg", "masks/one.png", "masks/one_gt.png")
    samples = raw_samples(folder_domain(train=Split("images/*.jpg", "masks/*.png")), tmp_path, "train")
    assert pairs(samples, tmp_path) == {
        "one": ("images/one.jpg", "masks/one.png"),
        "one_gt": ("images/one_gt.jpg", "masks/one_gt.png"),
    }


def test_an_image_never_takes_the_mask_of_another(tmp_path: Path) -> None:
    draw(tmp_path, "images/one.jpg", "images/one_gt.jpg", "masks/one_gt.png")
    message = refused(UserError, folder_domain(train=Split("images/*.jpg", "masks/*.png")), tmp_path)
    assert message.startswith(f"{tmp_path}/images/one.jpg: has no mask; expected the name one in masks/*.png. ")


def test_an_ending_that_a_glob_names_is_no_part_of_the_name(tmp_path: Path) -> None:
    draw(tmp_path, "all/one_rgb.jpg", "all/two_rgb.jpg", "all/one_seg.png", "all/two_seg.png")
    samples = raw_samples(folder_domain(train=Split("all/*_rgb.jpg", "all/*_seg.png")), tmp_path, "train")
    assert pairs(samples, tmp_path) == {
        "one": ("all/one_rgb.jpg", "all/one_seg.png"),
        "two": ("all/two_rgb.jpg", "all/two_seg.png"),
    }


@pytest.mark.parametrize(
    "pattern",
    [
        "images/*",
        "images/*.*",
        "images/*.[jp]*",
        "images/on?.jpg",
        "images/one.jpg",
        "*/one.jpg",
        "images/[!a]*.jpg",
        "./images/o[[n]*.jpg",
    ],
)
def test_any_glob_may_name_the_images(tmp_path: Path, pattern: str) -> None:
    draw(tmp_path, "images/one.jpg")
    key = "images=2Fone" if pattern.startswith("*") else "one"
    samples = raw_samples(folder_domain(train=Split(pattern)), tmp_path, "train")
    assert pairs(samples, tmp_path) == {key: ("images/one.jpg", None)}


@pytest.mark.parametrize(
    ("images", "masks", "files"),
    [
        ("rgb/rgb_*.jpg", "label/label_*.png", ("rgb/rgb_{}.jpg", "label/label_{}.png")),
        ("*/rgb/*.jpg", "*/label/*.png", ("seq {}/rgb/{}.jpg", "seq {}/label/{}.png")),
        ("a/img_*_rgb.jpg", "b/gt_*_id.png", ("a/img_{}_rgb.jpg", "b/gt_{}_id.png")),
        ("rgb_*.*", "label_*.png", ("rgb_{}.jpg", "label_{}.png")),
        ("**/color/*.jpg", "**/ids/*.png", ("x/{}/color/{}.jpg", "x/{}/ids/{}.png")),
    ],
)
def test_the_wildcards_of_both_globs_stand_for_the_same_text(
    tmp_path: Path, images: str, masks: str, files: tuple[str, str]
) -> None:
    draw(tmp_path, *(name.replace("{}", number) for name in files for number in ("1", "2", "10")))
    samples = raw_samples(folder_domain(train=Split(images, masks)), tmp_path, "train")
    found = {image: mask for image, mask in pairs(samples, tmp_path).values()}
    assert found == {files[0].replace("{}", n): files[1].replace("{}", n) for n in ("1", "2", "10")}


def test_a_partner_that_the_wildcards_do_not_give_is_missed_by_name(tmp_path: Path) -> None:
    draw(tmp_path, "rgb_1.jpg", "rgb_2.jpg", "label_1.png")
    message = refused(UserError, folder_domain(train=Split("rgb_*.jpg", "label_*.png")), tmp_path)
    assert message.startswith(f"{tmp_path}/rgb_2.jpg: has no mask;")
    # Names that differ by what the globs leave out.
    message = refused(UserError, folder_domain(train=Split("*.jpg", "*.png")), tmp_path)
    assert "rgb_*.jpg and mask_*.png" in message


def test_endings_of_either_case_match(tmp_path: Path) -> None:
    draw(tmp_path, "images/a.jpg", "images/B.JPG", "masks/a.PNG", "masks/B_id.Png", "masks/a_id.png")
    domain = folder_domain(train=Split("images/*.jpg", "masks/*_id.png"))
    assert pairs(raw_samples(domain, tmp_path, "train"), tmp_path) == {
        "a": ("images/a.jpg", "masks/a_id.png"),
        "B": ("images/B.JPG", "masks/B_id.Png"),
    }


def test_linked_folders_are_followed_once(tmp_path: Path) -> None:
    draw(tmp_path, "elsewhere/deep/one.jpg", "raw/images/two.jpg")
    raw = tmp_path / "raw"
    (raw / "images/more").symlink_to(tmp_path / "elsewhere")
    (raw / "images/again").symlink_to(raw / "images")
    (raw / "images/up").symlink_to(raw)
    samples = raw_samples(folder_domain(train=Split("images/**/*.jpg")), raw, "train")
    assert [sample.key for sample in samples] == ["more=2Fdeep=2Fone", "two"]


def test_a_link_to_a_file_that_is_gone_is_not_left_out(tmp_path: Path) -> None:
    draw(tmp_path, "images/one.jpg")
    (tmp_path / "images/two.jpg").symlink_to(tmp_path / "gone.jpg")
    samples = raw_samples(folder_domain(train=Split("images/*")), tmp_path, "train")
    assert [sample.key for sample in samples] == ["one", "two"]


def test_files_that_a_glob_matches_and_nobody_reads_are_named(tmp_path: Path) -> None:
    draw(tmp_path, "images/one.jpg", "images/two.jpg", "masks/one.png")
    for name in ("masks/two.npy", "photos/one.heic"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    message = refused(UserError, folder_domain(train=Split("images/*", "masks/*")), tmp_path)
    assert "images/two.jpg: has no mask" in message
    assert "1 .npy match, but only .bmp" in message
    assert "1 .heic match" in refused(MissingRawFiles, folder_domain(train=Split("photos/*")), tmp_path)
    assert Glob(tmp_path, "photos/*", "").others() == "1 .heic"
    assert Glob(tmp_path, "images/*", "").others() == ""


def test_an_unlabelled_split_needs_no_masks(tmp_path: Path) -> None:
    draw(tmp_path, "more/one.jpg", "masks/two.png")
    samples = raw_samples(
        folder_domain(train=Split("images/*.jpg", "masks/*.png"), more=Split("more/*.jpg")), tmp_path, "more"
    )
    assert pairs(samples, tmp_path) == {"one": ("more/one.jpg", None)}


def test_hidden_and_other_files_do_not_count(tmp_path: Path) -> None:
    draw(tmp_path, "images/one.jpg", "images/._one.jpg", "images/.cache/two.jpg", "masks/one.png", "masks/.two.png")
    (tmp_path / "images" / "Thumbs.db").touch()
    (tmp_path / "images" / "folder.jpg").mkdir()
    samples = raw_samples(folder_domain(train=Split("images/**/*", "masks/*")), tmp_path, "train")
    assert pairs(samples, tmp_path) == {"one": ("images/one.jpg", "masks/one.png")}


def test_an_image_without_mask_is_named_with_what_was_expected(tmp_path: Path) -> None:
    domain = folder_domain(train=Split("images/*.jpg", "masks/*.png"))
    draw(tmp_path, "images/one.jpg", "images/two.jpg", "images/zoo.jpg", "masks/one.png", "masks/zoo.png")
    message = refused(UserError, domain, tmp_path)
    assert message == (
        f"{tmp_path}/images/two.jpg: has no mask; expected the name two in masks/*.png. Add what is missing, or take "
        "the file out of the split."
    )
    draw(tmp_path, "images/six.jpg")
    assert "images/six.jpg: has no mask; expected the name six in masks/*.png (2 of 4 have none)." in refused(
        UserError, domain, tmp_path
    )


def test_a_mask_without_image_is_named(tmp_path: Path) -> None:
    draw(tmp_path, "images/one.jpg", "masks/one.png", "masks/two.png")
    message = refused(UserError, folder_domain(train=Split("images/*.jpg", "masks/*.png")), tmp_path)
    assert message.startswith(f"{tmp_path}/masks/two.png: has no image; expected the name two.")


def test_two_images_of_one_name_are_refused(tmp_path: Path) -> None:
    draw(tmp_path, "images/one.jpg", "images/one.png")
    message = refused(UserError, folder_domain(train=Split("images/*")), tmp_path)
    assert (
        message
        == f"{tmp_path}/images/one.png: goes by the name one, as {tmp_path}/images/one.jpg does. Keep one, or rename "
        "one."
    )


def test_two_masks_that_could_belong_to_an_image_are_refused(tmp_path: Path) -> None:
    draw(tmp_path, "images/one.jpg", "masks/one_gt.png", "masks/one_mask.png")
    message = refused(UserError, folder_domain(train=Split("images/*.jpg", "masks/*.png")), tmp_path)
    assert message == f"{tmp_path}/images/one.jpg: has 2 masks, one_mask.png and one_gt.png; keep one."


@pytest.mark.parametrize("pattern", ["/etc/*.png", "../*.png", "images/**.png", "."])
def test_a_glob_that_leaves_the_raw_folder_or_is_none_is_refused(tmp_path: Path, pattern: str) -> None:
    message = refused(UserError, folder_domain(train=Split(pattern)), tmp_path)
    assert message.startswith(
        f"mine: splits.train.images is {pattern}; a glob is relative to the raw folder and stays in it, and ** is a "
        "whole folder, as in images/**/*.jpg."
    )


# toy


def test_a_toy_split_has_labels_where_there_is_a_folder_of_masks(tmp_path: Path) -> None:
    draw(tmp_path, "images/train/a.jpg", "masks/train/a.png", "images/val/b.jpg")
    toy = published("toy_street")
    assert pairs(raw_samples(toy, tmp_path, "train"), tmp_path) == {"a": ("images/train/a.jpg", "masks/train/a.png")}
    assert pairs(raw_samples(toy, tmp_path, "val"), tmp_path) == {"b": ("images/val/b.jpg", None)}


# cityscapes


def draw_cityscapes(raw: Path, kind: str = "labelIds") -> None:
    for stem in ("ulm/ulm_000000_000019", "aachen/aachen_000001_000019", "aachen/aachen_000000_000019"):
        draw(raw, f"leftImg8bit/train/{stem}_leftImg8bit.png")
        draw(
            raw,
            f"gtFine/train/{stem}_gtFine_{kind}.png",
            f"gtFine/train/{stem}_gtFine_color.png",
            f"gtFine/train/{stem}_gtFine_instanceIds.png",
            value=7,
        )


def test_cityscapes_pairs_frames_across_cities(tmp_path: Path) -> None:
    draw_cityscapes(tmp_path)
    samples = raw_samples(published("cityscapes"), tmp_path, "train")
    assert [sample.key for sample in samples] == ["aachen_000000_000019", "aachen_000001_000019", "ulm_000000_000019"]
    assert pairs(samples, tmp_path)["ulm_000000_000019"] == (
        "leftImg8bit/train/ulm/ulm_000000_000019_leftImg8bit.png",
        "gtFine/train/ulm/ulm_000000_000019_gtFine_labelIds.png",
    )
    assert not any(sample.mask is None or sample.mask.train_ids for sample in samples)


def test_cityscapes_label_ids_come_before_train_ids(tmp_path: Path) -> None:
    draw_cityscapes(tmp_path, "labelTrainIds")
    domain = published("cityscapes")
    masks = [sample.mask for sample in raw_samples(domain, tmp_path, "train")]
    assert all(mask and mask.train_ids and mask.path.name.endswith("_labelTrainIds.png") for mask in masks)
    # Raw id 7 is road, train id 7 is traffic sign.
    assert masks[0]
    assert (read_mask(masks[0], domain)[0] == 7).all()
    draw_cityscapes(tmp_path, "labelIds")
    masks = [sample.mask for sample in raw_samples(domain, tmp_path, "train")]
    assert all(mask and not mask.train_ids and mask.path.name.endswith("_labelIds.png") for mask in masks)
    assert masks[0]
    assert (read_mask(masks[0], domain)[0] == 0).all()


def test_cityscapes_train_ids_are_refused_for_another_class_table(tmp_path: Path) -> None:
    draw_cityscapes(tmp_path, "labelTrainIds")
    domain = replace(published("cityscapes"), classes=published("cityscapes").classes[::-1])
    assert "has labelTrainIds only, numbered as the 19 usual classes; cityscapes has others." in refused(
        UserError, domain, tmp_path
    )


def test_a_cityscapes_frame_without_labels_is_named_with_its_label_file(tmp_path: Path) -> None:
    draw_cityscapes(tmp_path)
    (tmp_path / "gtFine/train/ulm/ulm_000000_000019_gtFine_labelIds.png").unlink()
    message = refused(UserError, published("cityscapes"), tmp_path)
    assert message.startswith(
        f"{tmp_path}/leftImg8bit/train/ulm/ulm_000000_000019_leftImg8bit.png: has no mask; "
        f"expected {tmp_path}/gtFine/train/ulm/ulm_000000_000019_gtFine_labelIds.png."
    )


@pytest.mark.parametrize("home", ["leftImg8bit", "leftImg8bit_trainextra/leftImg8bit", "leftImg8bit_trainextra"])
def test_cityscapes_extra_images_are_unlabelled(tmp_path: Path, home: str) -> None:
    draw(tmp_path, f"{home}/train_extra/bonn/bonn_000000_000019_leftImg8bit.png")
    samples = raw_samples(published("cityscapes"), tmp_path, "train_extra")
    assert pairs(samples, tmp_path) == {
        "bonn_000000_000019": (f"{home}/train_extra/bonn/bonn_000000_000019_leftImg8bit.png", None)
    }


def test_cityscapes_test_labels_hold_nothing_and_are_not_read(tmp_path: Path) -> None:
    domain = replace(published("cityscapes"), splits={"test": Split()})
    draw(tmp_path, "leftImg8bit/test/bonn/bonn_0_leftImg8bit.png", "gtFine/test/bonn/bonn_0_gtFine_labelIds.png")
    assert [sample.mask for sample in raw_samples(domain, tmp_path, "test")] == [None]


# camvid


def camvid_stems() -> list[str]:
    """The 701 frames of the release."""
    first = [f"0001TP_{number:06d}" for number in range(6690, 10381, 30)]
    second = [f"0006R0_f{number:05d}" for number in range(930, 3931, 30)]
    third = [
        f"0016E5_{number:05d}"
        for number in [*range(390, 871, 30), 901, *range(930, 2401, 30), *range(4350, 7921, 30), *range(8190, 8641, 30)]
    ]
    return [
        *first,
        *second,
        *third,
        *(f"0016E5_{number:05d}" for number in range(7959, 8160, 2)),
        *(f"Seq05VD_f{number:05d}" for number in range(0, 5101, 30)),
    ]


def test_camvid_reads_the_tutorials_folders(tmp_path: Path) -> None:
    draw(
        tmp_path,
        "train/0001TP_006690.png",
        "train/0006R0_f00930.png",
        "trainannot/0006R0_f00930.png",
        "trainannot/0001TP_006690.png",
        "val/a.png",
        "valannot/a.png",
    )
    assert pairs(raw_samples(published("camvid"), tmp_path, "train"), tmp_path) == {
        "0001TP_006690": ("train/0001TP_006690.png", "trainannot/0001TP_006690.png"),
        "0006R0_f00930": ("train/0006R0_f00930.png", "trainannot/0006R0_f00930.png"),
    }
    (tmp_path / "trainannot/0001TP_006690.png").unlink()
    assert (
        f"{tmp_path}/train/0001TP_006690.png: has no mask; expected the name 0001TP_006690 in trainannot/*."
        in refused(UserError, published("camvid"), tmp_path)
    )


def test_camvid_splits_the_original_release_as_the_tutorial_does(tmp_path: Path) -> None:
    (tmp_path / "701_StillsRaw_full").mkdir()
    (tmp_path / "LabeledApproved_full").mkdir()
    for stem in camvid_stems():
        (tmp_path / "701_StillsRaw_full" / f"{stem}.png").touch()
        (tmp_path / "LabeledApproved_full" / f"{stem}_L.png").touch()
    splits = {
        split: pairs(raw_samples(published("camvid"), tmp_path, split), tmp_path) for split in ("train", "val", "test")
    }
    assert [len(samples) for samples in splits.values()] == [367, 101, 233]
    assert {"0001TP_008520", "0016E5_08640", "0006R0_f03930"} <= splits["train"].keys()
    assert {"0016E5_07959", "0016E5_08159"} <= splits["val"].keys()
    assert {"0001TP_008550", "0001TP_010380", "Seq05VD_f00000"} <= splits["test"].keys()
    assert splits["val"]["0016E5_07959"] == (
        "701_StillsRaw_full/0016E5_07959.png",
        "LabeledApproved_full/0016E5_07959_L.png",
    )


@pytest.mark.parametrize("line", ["{}", "{}.png", "/SegNet/CamVid/train/{}.png /SegNet/CamVid/trainannot/{}.png"])
def test_camvid_lists_in_the_raw_folder_come_before_the_usual_split(tmp_path: Path, line: str) -> None:
    draw(
        tmp_path,
        *(f"701_StillsRaw_full/{stem}.png" for stem in ("mine", "0001TP_006690")),
        "LabeledApproved_full/mine_L.png",
    )
    (tmp_path / "train.txt").write_text(line.replace("{}", "mine") + "\n\n")
    assert pairs(raw_samples(published("camvid"), tmp_path, "train"), tmp_path) == {
        "mine": ("701_StillsRaw_full/mine.png", "LabeledApproved_full/mine_L.png")
    }


def test_camvid_frames_of_no_known_sequence_need_a_list(tmp_path: Path) -> None:
    draw(tmp_path, "701_StillsRaw_full/mine.png", "LabeledApproved_full/mine_L.png")
    assert "mine.png: is in no sequence of CamVid's usual split. Name the frames of each split in train.txt" in refused(
        UserError, published("camvid"), tmp_path
    )


def test_a_camvid_list_that_names_a_frame_twice_or_one_that_is_not_there_is_refused(tmp_path: Path) -> None:
    draw(tmp_path, "701_StillsRaw_full/mine.png", "LabeledApproved_full/mine_L.png")
    (tmp_path / "train.txt").write_text("mine\nyours\n")
    assert f"train.txt: names yours, and {tmp_path}/701_StillsRaw_full has no such image." in refused(
        UserError, published("camvid"), tmp_path
    )
    (tmp_path / "train.txt").write_text("mine\nmine\n")
    assert "train.txt: names mine 2 times; keep one." in refused(UserError, published("camvid"), tmp_path)


def test_a_camvid_split_without_frames_is_refused(tmp_path: Path) -> None:
    draw(tmp_path, "701_StillsRaw_full/0001TP_006690.png", "LabeledApproved_full/0001TP_006690_L.png")
    assert "split val of camvid has no image" in refused(MissingRawFiles, published("camvid"), tmp_path, "val")


# sun_rgbd


@pytest.mark.parametrize("image_start", [1, 5051])
@pytest.mark.parametrize("label_start", [1, 5051])
def test_repacked_sun_rgbd_is_paired_by_number_however_each_side_counts(
    tmp_path: Path, image_start: int, label_start: int
) -> None:
    images = [f"image/train/img-{image_start + number:06d}.jpg" for number in range(12)]
    # Without leading zeros a listing is in another order: 1, 10, 11, 2.
    labels = [f"label37/train/img37labels-{label_start + number}.png" for number in range(12)]
    draw(tmp_path, *images, *labels)
    assert pairs(raw_samples(published("sun_rgbd"), tmp_path, "train"), tmp_path) == {
        f"img-{5051 + number:06d}": (images[number], labels[number]) for number in range(12)
    }


def test_repacked_sun_rgbd_test_images_keep_their_numbers(tmp_path: Path) -> None:
    draw(
        tmp_path,
        "image/test/img-000002.jpg",
        "image/test/img-005050.jpg",
        "label37/test/img37labels-005050.png",
        "label37/test/img37labels-000002.png",
    )
    assert pairs(raw_samples(published("sun_rgbd_13"), tmp_path, "test"), tmp_path) == {
        "img-000002": ("image/test/img-000002.jpg", "label37/test/img37labels-000002.png"),
        "img-005050": ("image/test/img-005050.jpg", "label37/test/img37labels-005050.png"),
    }


def test_repacked_sun_rgbd_errors_name_the_file(tmp_path: Path) -> None:
    draw(tmp_path, "image/train/img-000001.jpg", "image/train/img-000002.jpg", "label37/train/img37labels-005052.png")
    message = refused(UserError, published("sun_rgbd"), tmp_path)
    assert message.startswith(
        f"{tmp_path}/image/train/img-000001.jpg: has no mask; expected its number in {tmp_path}/label37/train."
    )
    draw(tmp_path, "image/train/1.jpg")
    assert "goes by the name img-005051" in refused(UserError, published("sun_rgbd"), tmp_path)
    draw(tmp_path, "image/train/img.jpg")
    assert "image/train/img.jpg: SUN RGB-D is paired by number, and this name does not end in one." in refused(
        UserError, published("sun_rgbd"), tmp_path
    )


SCENES = ["kv2/kinect2data/000002_a", "xtion/sun3ddata/b/0001", "realsense/lg/c", "kv1/NYUdata/NYU0001"]
"""In the order of the table: the first two are test images."""


def draw_official_sun(raw: Path, table: str = "SUNRGBDMeta.mat", variable: str = "SUNRGBDMeta") -> None:
    h5py, scipy_io = pytest.importorskip("h5py"), pytest.importorskip("scipy.io")
    toolbox = raw / "SUNRGBDtoolbox"
    (toolbox / "Metadata").mkdir(parents=True)
    (toolbox / "traintestSUNRGBD").mkdir()
    draw(raw, *(f"SUNRGBD/{scene}/image/{number}.jpg" for number, scene in enumerate(SCENES)))
    rows = np.zeros((1, len(SCENES)), dtype=[("sequenceName", object), ("rgbpath", object)])
    for number, scene in enumerate(SCENES):
        rows[0, number] = (f"SUNRGBD/{scene}", f"/n/fs/sun3d/data/SUNRGBD/{scene}/image/{number}.jpg")
    scipy_io.savemat(toolbox / "Metadata" / table, {variable: rows})
    folders = np.array([f"/n/fs/sun3d/data/SUNRGBD/{scene}" for scene in SCENES], dtype=object)
    scipy_io.savemat(
        toolbox / "traintestSUNRGBD" / "allsplit.mat", {"alltest": folders[None, :2], "alltrain": folders[None, :1:-1]}
    )
    with h5py.File(toolbox / "Metadata" / "SUNRGBD2Dseg.mat", "w") as labels:
        cells = labels.create_dataset("SUNRGBD2Dseg/seglabel", (len(SCENES), 1), dtype=h5py.ref_dtype)
        for number in range(len(SCENES)):
            content = np.full((2, 3), number + 1, dtype=np.uint8)
            cells[number, 0] = labels.create_dataset(f"#refs#/{number}", data=content).ref


@pytest.mark.parametrize(
    ("table", "variable"), [("SUNRGBDMeta.mat", "SUNRGBDMeta"), ("SUNRGBDMeta2DBB_v2.mat", "SUNRGBDMeta2DBB")]
)
def test_official_sun_rgbd_takes_order_and_splits_from_its_tables(tmp_path: Path, table: str, variable: str) -> None:
    draw_official_sun(tmp_path, table, variable)
    domain = published("sun_rgbd")
    samples = raw_samples(domain, tmp_path, "train")
    assert [
        (sample.key, sample.image.relative_to(tmp_path).as_posix(), sample.mask and sample.mask.cell)
        for sample in samples
    ] == [
        ("img-000003", "SUNRGBD/realsense/lg/c/image/2.jpg", 2),
        ("img-000004", "SUNRGBD/kv1/NYUdata/NYU0001/image/3.jpg", 3),
    ]
    for sample in samples:
        assert sample.mask
        assert sample.mask.cell is not None
        train_ids, unknown = read_mask(sample.mask, domain)
        assert train_ids.tolist() == [[sample.mask.cell] * 2] * 3
        assert not unknown
    assert [sample.key for sample in raw_samples(domain, tmp_path, "test")] == ["img-000001", "img-000002"]


def test_official_sun_rgbd_names_what_was_not_unpacked(tmp_path: Path) -> None:
    draw_official_sun(tmp_path)
    (tmp_path / "SUNRGBD/realsense/lg/c/image/2.jpg").unlink()
    message = refused(MissingRawFiles, published("sun_rgbd"), tmp_path)
    assert message.startswith(
        f"{tmp_path}/SUNRGBD/realsense/lg/c/image/2.jpg: there is no such file, but SUNRGBDMeta.mat names it in split "
        "train."
    )
    (tmp_path / "SUNRGBDtoolbox/Metadata/SUNRGBD2Dseg.mat").unlink()
    assert "SUNRGBD2Dseg.mat: there is no such file. Unpack SUNRGBDtoolbox.zip" in refused(
        MissingRawFiles, published("sun_rgbd"), tmp_path
    )


def test_official_sun_rgbd_has_no_validation_split(tmp_path: Path) -> None:
    draw_official_sun(tmp_path)
    domain = replace(published("sun_rgbd"), splits={"val": Split()})
    assert "allsplit.mat: has no list allval for the split val of sun_rgbd. SUN RGB-D has train and test." in refused(
        MissingRawFiles, domain, tmp_path, "val"
    )


@pytest.mark.parametrize("package", ["h5py", "scipy.io"])
def test_official_sun_rgbd_names_the_extra_that_reads_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    (tmp_path / "SUNRGBDtoolbox").mkdir()
    monkeypatch.setitem(sys.modules, package, None)
    assert refused(UserError, published("sun_rgbd"), tmp_path).endswith(
        "To read them: pip install multidomain-cct[sun_rgbd]"
    )


# voc


def draw_voc(home: Path, **lists: list[str]) -> None:
    stems = [f"2007_00000{number}" for number in range(6)]
    draw(home, *(f"JPEGImages/{stem}.jpg" for stem in stems))
    draw(home, *(f"SegmentationClass/{stem}.png" for stem in stems[:4]))
    folder = home / "ImageSets" / "Segmentation"
    folder.mkdir(parents=True)
    for name, numbers in {"train": ["2", "0"], "val": ["1", "3"], **lists}.items():
        (folder / f"{name}.txt").write_text("".join(f"2007_00000{number}\n" for number in numbers))


@pytest.mark.parametrize("home", ["", "VOC2012", "VOCdevkit/VOC2012"])
def test_voc_takes_the_images_that_its_lists_name(tmp_path: Path, home: str) -> None:
    draw_voc(tmp_path / home)
    prefix = f"{home}/" if home else ""
    assert pairs(raw_samples(published("pascal_voc"), tmp_path, "train"), tmp_path) == {
        stem: (f"{prefix}JPEGImages/{stem}.jpg", f"{prefix}SegmentationClass/{stem}.png")
        for stem in ("2007_000000", "2007_000002")
    }
    assert list(pairs(raw_samples(published("pascal_voc"), tmp_path, "val"), tmp_path)) == [
        "2007_000001",
        "2007_000003",
    ]


def test_voc_reads_any_list_that_the_domain_names(tmp_path: Path) -> None:
    draw_voc(tmp_path, trainval=["0", "1", "2", "3"])
    domain = replace(published("pascal_voc"), splits={"trainval": Split(), "mine": Split()})
    assert len(raw_samples(domain, tmp_path, "trainval")) == 4
    assert "Segmentation/mine.txt: there is no such file." in refused(MissingRawFiles, domain, tmp_path, "mine")


@pytest.mark.parametrize("listed", ["trainaug", "train_aug", None])
def test_voc_augmented_masks_are_their_list_or_all_but_validation(tmp_path: Path, listed: str | None) -> None:
    draw_voc(tmp_path)
    draw(tmp_path, *(f"SegmentationClassAug/2007_00000{number}.png" for number in (0, 1, 2, 3, 4)))
    if listed:
        # DeepLab's list gives both paths in a line.
        line = "/JPEGImages/2007_000004.jpg /SegmentationClassAug/2007_000004.png\n"
        (tmp_path / "ImageSets" / "Segmentation" / f"{listed}.txt").write_text(line)
    samples = pairs(raw_samples(published("pascal_voc"), tmp_path, "train_aug"), tmp_path)
    assert list(samples) == (["2007_000004"] if listed else ["2007_000000", "2007_000002", "2007_000004"])
    assert samples["2007_000004"] == ("JPEGImages/2007_000004.jpg", "SegmentationClassAug/2007_000004.png")


def test_voc_without_the_augmented_masks_says_so(tmp_path: Path) -> None:
    draw_voc(tmp_path)
    message = refused(MissingRawFiles, published("pascal_voc"), tmp_path, "train_aug")
    assert (
        message == f"{tmp_path}/SegmentationClassAug: there is no such folder; split train_aug of pascal_voc needs it."
    )


def test_voc_unlabelled_images_are_those_that_no_list_names(tmp_path: Path) -> None:
    draw_voc(tmp_path, test=["4"])
    assert pairs(raw_samples(published("pascal_voc"), tmp_path, "unlabelled"), tmp_path) == {
        "2007_000005": ("JPEGImages/2007_000005.jpg", None)
    }
    (tmp_path / "ImageSets" / "Segmentation" / "val.txt").unlink()
    # Without the list, validation images would be taken for unlabelled ones.
    assert "Segmentation/val.txt: there is no such file." in refused(
        MissingRawFiles, published("pascal_voc"), tmp_path, "unlabelled"
    )


def test_a_voc_list_that_the_files_do_not_bear_out_is_refused(tmp_path: Path) -> None:
    draw_voc(tmp_path, train=["0", "4"])
    message = refused(UserError, published("pascal_voc"), tmp_path)
    assert message.startswith(
        f"{tmp_path}/JPEGImages/2007_000004.jpg: has no mask; expected {tmp_path}/SegmentationClass/2007_000004.png."
    )
    (tmp_path / "JPEGImages" / "2007_000004.jpg").unlink()
    assert "train.txt: names 2007_000004, and " in refused(UserError, published("pascal_voc"), tmp_path)


def test_every_layout_that_a_specification_may_name_can_be_read() -> None:
    assert set(_LAYOUTS) == set(LAYOUTS)
