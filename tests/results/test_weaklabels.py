"""`weaklabels` from a recipe to shards: what is in them, what is refused, and that running it again gives the same
bytes.
"""

from __future__ import annotations

import io
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from multidomain_cct.__main__ import main
from multidomain_cct.data.domain import IGNORE, Domain
from multidomain_cct.data.shards.reader import Shards
from multidomain_cct.results.weaklabels import (
    Tally,
    average_precision,
    loss_ends,
    tagged_domains,
    train_classifier,
    write_pseudo_labels,
)
from multidomain_cct.training.recipe import read_recipe

RECIPE = """
domains:
  fields: {{labelled: 3, image_labels: {labels}}}
data: {{shards: {root}/shards, crop: [64, 64], workers: 0}}
encoder: {{name: test_resnet, stride: 8, context: fpn, width: 32}}
pseudo_labels: {{steps: 3, batch: 4, scales: [1.0, 0.5]}}
"""


@pytest.fixture
def workspace(tiny_domain: Callable[..., Domain], tiny_shards: Callable[..., Path], tmp_path: Path) -> Path:
    """A folder with a recipe for the domain fields (grass and sky are things, barn is the background), 6 training
    images in shards, and a list of labels.
    """
    domain = tiny_domain("fields", ("grass", "sky", "barn"))
    domain = replace(domain, classes=tuple(replace(label, thing=label.name != "barn") for label in domain.classes))
    (tmp_path / "domains").mkdir()
    (tmp_path / "domains" / "fields.yaml").write_text(domain.to_yaml(), encoding="utf-8")
    tiny_shards(tmp_path / "shards", domain)
    (tmp_path / "labels.txt").write_text(
        "train_000 grass\ntrain_001 sky\ntrain_003 grass sky\ntrain_004 barn\n", encoding="utf-8"
    )
    (tmp_path / "recipe.yaml").write_text(
        RECIPE.format(labels=tmp_path / "labels.txt", root=tmp_path), encoding="utf-8"
    )
    return tmp_path


def run(workspace: Path, *words: str) -> int:
    return main(["weaklabels", str(workspace / "recipe.yaml"), *words])


def masks(workspace: Path) -> dict[str, np.ndarray]:
    """The pseudo-labels by key, as a reader of shards sees them."""
    shards = Shards.open(workspace / "shards" / "fields", "train_weak")
    records = [shards.read(number) for number in range(len(shards))]
    return {record.key: np.asarray(Image.open(io.BytesIO(record.mask or b""))) for record in records}


def test_pseudo_labels_hold_only_what_the_image_level_labels_name(workspace: Path) -> None:
    assert run(workspace) == 0
    grass, sky, barn = 0, 1, 2
    allowed = {
        "train_000": {grass, barn},
        "train_001": {sky, barn},
        "train_003": {grass, sky, barn},
        "train_004": {barn},
    }
    found = masks(workspace)
    assert found.keys() == allowed.keys()
    assert all(set(np.unique(ids)) <= allowed[key] | {IGNORE} for key, ids in found.items())
    assert (found["train_004"] == barn).all()


def test_a_class_that_nearly_every_image_shows_gets_no_pseudo_labels(
    workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (workspace / "labels.txt").write_text(
        "".join(f"train_00{n} grass{' sky' if n % 2 else ''}\n" for n in range(6)), encoding="utf-8"
    )
    assert run(workspace) == 0
    assert "fields: no pseudo-labels for grass, which more than 90 % of the images" in capsys.readouterr().out
    found = masks(workspace)
    assert all(0 not in ids for ids in found.values())
    # Every image shows grass somewhere, so nowhere is it sure that what is no sky is background.
    assert all(2 not in ids for ids in found.values())
    assert (found["train_000"] == IGNORE).all()


def test_the_images_are_those_of_the_training_split_byte_for_byte(workspace: Path) -> None:
    run(workspace)
    folder = workspace / "shards" / "fields"
    original, weak = Shards.open(folder, "train"), Shards.open(folder, "train_weak")
    for number, key in enumerate(weak.keys):
        assert weak.read(number).image == original.read(original.keys.index(key)).image


def test_a_contact_sheet_lies_beside_the_shards(workspace: Path) -> None:
    run(workspace)
    with Image.open(workspace / "shards" / "fields" / "fields-train_weak.png") as sheet:
        assert sheet.width > 4 * 250
        assert sheet.height > 4 * 190


def test_the_table_says_how_much_is_labelled_and_how_right_it_is(
    workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(workspace)
    printed = capsys.readouterr().out
    for words in (
        "fields/train_weak",
        "pixels labelled",
        "precision",
        "mIoU",
        "average precision",
        "domains.fields.weak_split=train_weak",
    ):
        assert words in printed
    # Listed are 4 images; 3 are in the labelled budget, of which some are listed too.
    assert "classifier: 3 steps on" in printed


def test_images_without_masks_are_labelled_and_not_judged(
    workspace: Path, tiny_domain: Callable[..., Domain], tiny_shards: Callable[..., Path]
) -> None:
    tiny_shards(workspace / "shards", tiny_domain("fields", ("grass", "sky", "barn")), {"more": 2}, labelled=False)
    (workspace / "labels.txt").write_text("more_000 grass\nmore_001 sky grass\n", encoding="utf-8")
    recipe = read_recipe(workspace / "recipe.yaml", ["domains.fields.unlabelled_splits=[more]"])
    [tagged] = tagged_domains(recipe, [workspace / "domains"], [], named_by="the recipe")
    model, _ = train_classifier(recipe, [tagged], device=torch.device("cpu"))
    summary = write_pseudo_labels(recipe, tagged, model)
    assert summary.refined.precision is None
    assert summary.images == 2
    assert set(masks(workspace)) == {"more_000", "more_001"}


def test_running_it_again_refuses_and_force_gives_the_same_bytes(
    workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(workspace)
    shard = workspace / "shards" / "fields" / "train_weak-00000.tar"
    before = shard.read_bytes()
    assert run(workspace) == 2
    error = capsys.readouterr().err
    assert (
        f"{shard} exists. Train with it: domains.fields.weak_split=train_weak; or replace it with --force."
        in " ".join(error.split())
    )
    assert run(workspace, "--force") == 0
    assert shard.read_bytes() == before


def test_what_was_there_stays_when_making_it_anew_fails(workspace: Path) -> None:
    run(workspace)
    folder = workspace / "shards" / "fields"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    recipe = read_recipe(workspace / "recipe.yaml")
    [tagged] = tagged_domains(recipe, [workspace / "domains"], [], named_by="the recipe", force=True)
    model, _ = train_classifier(recipe, [tagged], device=torch.device("cpu"))

    def interrupted(items: object, total: int) -> object:
        yield tagged.listed[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_pseudo_labels(recipe, tagged, model, progress=interrupted)  # type: ignore[arg-type]
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_the_classifier_learns_what_it_is_shown(workspace: Path) -> None:
    recipe = read_recipe(
        workspace / "recipe.yaml", ["pseudo_labels.steps=60", "pseudo_labels.lr=0.2", "optimiser.backbone_factor=1.0"]
    )
    [tagged] = tagged_domains(recipe, [workspace / "domains"], [], named_by="the recipe")
    _, losses = train_classifier(recipe, [tagged], device=torch.device("cpu"))
    first, last = loss_ends(losses)
    assert last < 0.8 * first


def test_training_can_use_the_shards(workspace: Path) -> None:
    from multidomain_cct.training.loop import train

    run(workspace)
    changes = [
        "domains.fields.weak_split=train_weak",
        f"runs={workspace}/runs",
        "training.steps=1",
        "decoder=bilinear",
        "domains.fields.val_split=''",
    ]
    recipe = read_recipe(workspace / "recipe.yaml", [*changes, "data.labelled_batch=2", "data.unlabelled_batch=2"])
    assert (train(recipe, [workspace / "domains"]) / "metrics.jsonl").read_text(encoding="utf-8").count("fields/") >= 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--domain", "feilds"], "--domain is 'feilds'; it is one of fields. Did you mean \"fields\"?"),
        (
            ["domains.fields.image_labels=''"],
            "{recipe}: domains.fields.image_labels is empty. Name a text or JSON list of image-level labels, or "
            "`masks`.",
        ),
        (
            ["domains.fields.image_labels=gone.txt"],
            "domains.fields.image_labels is 'gone.txt'; it is `masks`, or a text or JSON file that is there.",
        ),
        (["pseudo_labels.step=3"], 'unknown key "pseudo_labels.step".'),
        (["pseudo_labels.crf.iterations=-1"], "crf.iterations is -1; it is at least 0."),
        (["pseudo_labels.batch=1"], "pseudo_labels.batch is 1"),
    ],
)
def test_mistakes_are_one_line_and_nothing_is_written(
    workspace: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert run(workspace, *words) == 2
    error = capsys.readouterr().err
    assert message.format(recipe=workspace / "recipe.yaml") in error
    assert error.count("\n") == 1
    assert not list((workspace / "shards" / "fields").glob("*weak*"))


def test_an_unknown_class_is_named_with_its_file_and_key(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (workspace / "labels.txt").write_text("train_000 gras\n", encoding="utf-8")
    assert run(workspace) == 2
    assert (
        f"{workspace}/labels.txt: line 1: the key 'train_000' has the class 'gras'. Known: grass, sky, barn. Did you "
        'mean "grass"?' in capsys.readouterr().err
    )


def test_a_domain_of_nothing_but_background_is_refused(
    workspace: Path, tiny_domain: Callable[..., Domain], capsys: pytest.CaptureFixture[str]
) -> None:
    (workspace / "domains" / "fields.yaml").write_text(tiny_domain("fields", ("barn",)).to_yaml(), encoding="utf-8")
    assert run(workspace) == 2
    assert "fields has no class beside its background. Add classes to the domain." in capsys.readouterr().err


def test_a_loss_that_is_not_finite_ends_the_command_with_its_step(
    workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(workspace, "pseudo_labels.lr=1e30", "pseudo_labels.steps=5") == 1
    error = capsys.readouterr().err
    assert "the classifier's loss is" in error
    assert "Lower pseudo_labels.lr." in error


def test_precision_and_miou_follow_from_the_confusion() -> None:
    quality = Tally(2, confusion=np.array([[6, 2], [1, 3]]))
    assert quality.precision == pytest.approx(9 / 12)
    assert quality.miou == pytest.approx((6 / 9 + 3 / 6) / 2)


def test_average_precision_matches_its_definition() -> None:
    scores = np.array([[0.9, 1.0, 0.0], [0.8, 1.0, 0.0], [0.7, 1.0, 0.0], [0.1, 1.0, 0.0]])
    truth = np.array([[True, True, True], [False, True, True], [True, True, False], [False, True, True]])
    found = average_precision(scores, truth)
    assert found[0] == pytest.approx((1 / 1 + 2 / 3) / 2)
    assert math.isnan(found[1])
    # A constant score ranks the negative first.
    assert found[2] == pytest.approx((1 / 2 + 2 / 3 + 3 / 4) / 3)


def test_several_domains_share_one_classifier_and_each_gets_its_shards(two_domains: Path, tmp_path: Path) -> None:
    root = tmp_path / "shards"
    shutil.copytree(two_domains, root)
    text = RECIPE.format(labels="masks", root=tmp_path).replace(
        "data:", "  shapes: {labelled: 2, image_labels: masks}\ndata:"
    )
    (tmp_path / "recipe.yaml").write_text(text, encoding="utf-8")
    assert (
        main(["weaklabels", str(tmp_path / "recipe.yaml"), "--domains", str(root / "domains"), "pseudo_labels.steps=1"])
        == 0
    )
    assert len(Shards.open(root / "fields", "train_weak")) == 10
    assert len(Shards.open(root / "shapes", "train_weak")) == 8


def test_only_the_named_domain_is_labelled(two_domains: Path, tmp_path: Path) -> None:
    root = tmp_path / "shards"
    shutil.copytree(two_domains, root)
    text = RECIPE.format(labels="masks", root=tmp_path).replace(
        "data:", "  shapes: {labelled: 2, image_labels: masks}\ndata:"
    )
    (tmp_path / "recipe.yaml").write_text(text, encoding="utf-8")
    words = ["--domains", str(root / "domains"), "--domain", "shapes", "pseudo_labels.steps=1"]
    assert main(["weaklabels", str(tmp_path / "recipe.yaml"), *words]) == 0
    assert [path.parent.name for path in root.glob("*/train_weak-*.tar")] == ["shapes"]
