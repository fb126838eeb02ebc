"""Domains that lack something: labels (they borrow a label space), unlabelled images, or true masks."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from multidomain_cct.__main__ import main
from multidomain_cct.data.domain import Domain
from multidomain_cct.data.shards.reader import Shards
from multidomain_cct.data.specification import find_domain
from multidomain_cct.errors import UserError
from multidomain_cct.training.checkpoints.checkpoint import checkpoints
from multidomain_cct.training.loop import train
from multidomain_cct.training.recipe import Recipe
from multidomain_cct.training.runlog import read_metrics

TinyRecipe = Callable[..., Recipe]

MEADOW = """\
layout: folder
splits:
  train: {images: meadow/train/*.jpg, masks: meadow/train/*.png}
  val: {images: meadow/val/*.jpg, masks: meadow/val/*.png}
ignore_ids: [3, 255]
classes:
  - {name: grass, color: [0, 200, 0], ids: [7, 8]}
  - {name: cow, color: [200, 0, 0], ids: [20], thing: true}
"""
DUSK = """\
layout: folder
labels_of: meadow
splits:
  train: {images: dusk/train/*.jpg}
  val: {images: dusk/val/*.jpg, masks: dusk/val/*.png}
"""
RECIPE = """\
domains: {meadow: {labelled: 3}, dusk: {labelled: none}}
data: {crop: [32, 32], labelled_batch: 2, unlabelled_batch: 2, workers: 0}
encoder: {name: test_resnet, context: fpn, width: 32}
decoder: bilinear
perturbations:
  {feature_noise: {count: 1}, feature_drop: {count: 1}, adversarial_noise: {count: 0}, guided_cutout: {count: 1}}
training: {steps: 2, log_every: 1}
"""


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with raw pictures of a meadow by day, with masks, and at dusk, where only the val pictures
    have masks, in the raw ids of the day.
    """
    rng = np.random.default_rng(0)
    for place, split, count in (("meadow", "train", 5), ("meadow", "val", 2), ("dusk", "train", 4), ("dusk", "val", 3)):
        folder = tmp_path / "raw" / place / split
        folder.mkdir(parents=True)
        for number in range(count):
            Image.fromarray(rng.integers(0, 255, (40, 48, 3), dtype=np.uint8)).save(folder / f"{number}.jpg")
            if (place, split) != ("dusk", "train"):
                Image.fromarray(rng.choice([7, 8, 20, 3], (40, 48)).astype(np.uint8)).save(folder / f"{number}.png")
    (tmp_path / "domains").mkdir()
    (tmp_path / "domains/meadow.yaml").write_text(MEADOW)
    (tmp_path / "domains/dusk.yaml").write_text(DUSK)
    (tmp_path / "mine.yaml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def logged_keys(run: Path) -> set[str]:
    return {key for line in read_metrics(run / "metrics.jsonl") for key in line}


def test_a_domain_with_borrowed_labels_is_packed_trained_scored_and_predicted(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("meadow", "dusk"):
        assert main(["pack", name, "--raw", "raw", "--workers", "1"]) == 0
    packed = capsys.readouterr().out
    assert "dusk/train: 4 images (0 labelled)" in packed
    assert "dusk/val: 3 images (3 labelled)" in packed
    assert "cow" in packed.split("dusk/val")[1]
    shards = Shards.open(Path("data/shards/dusk"), "val")
    for number, key in enumerate(shards.keys):
        raw = np.asarray(Image.open(f"raw/dusk/val/{key}.png"))
        stored = np.asarray(Image.open(io.BytesIO(shards.read(number).mask or b"")))
        # The lender's raw ids: 7 and 8 are grass, 20 is a cow, 3 is ignored.
        assert np.array_equal(stored, np.select([raw == 7, raw == 8, raw == 20], [0, 0, 1], 255))

    assert main(["mine.yaml"]) == 0
    run = Path("runs/mine")
    keys = logged_keys(run)
    assert {
        "train/meadow/supervised",
        "train/meadow/consistency",
        "train/dusk/consistency",
        "val/meadow/miou",
        "val/dusk/iou/cow",
    } <= keys
    assert "train/dusk/supervised" not in keys
    heads = {
        name.split(".")[1]
        for name in load_file(checkpoints(run / "checkpoints")[-1] / "model.safetensors")
        if name.startswith("heads.")
    }
    assert heads == {"meadow"}

    # From here on the run's folder is enough: the specifications are gone.
    for path in (workplace / "domains").iterdir():
        path.unlink()
    capsys.readouterr()
    assert main(["evaluate", "runs/mine", "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)["domains"]
    assert list(scores) == ["meadow", "dusk"]
    assert list(scores["dusk"]["iou"]) == ["grass", "cow"]
    assert scores["dusk"]["images"] == 3
    last = {key: value for line in read_metrics(run / "metrics.jsonl") for key, value in line.items()}
    assert scores["dusk"]["miou"] == last["val/dusk/miou"]

    for name in ("meadow", "dusk"):
        assert main(["predict", "runs/mine", "--domain", name, "--out", f"out/{name}", "raw/dusk/train"]) == 0
    for number in range(4):
        assert Path(f"out/dusk/index/{number}.png").read_bytes() == Path(f"out/meadow/index/{number}.png").read_bytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"recipe": ("meadow: {labelled: 3}, ", "")},
            'domains.dusk borrows the labels of "meadow", which is not in the recipe. Add it: domains.meadow.',
        ),
        (
            {"dusk": ("labels_of: meadow", "labels_of: medow")},
            'labels_of is "medow"; it is the name of another domain. ',
        ),
        ({"dusk": ("labels_of: meadow", "labels_of: dusk")}, 'labels_of is "dusk"; it is the name of another domain. '),
        ({"dusk": ("splits:", "classes: [{name: cow, color: [1, 2, 3]}]\nsplits:")}, "but its classes are others"),
        (
            {"recipe": ("labelled: none", "labelled: 2")},
            "domains.dusk.labelled asks for 2 labelled images; there are 0.",
        ),
    ],
)
def test_labels_that_cannot_be_borrowed_end_training_with_one_line(
    workplace: Path, capsys: pytest.CaptureFixture[str], change: dict[str, tuple[str, str]], message: str
) -> None:
    for name in ("meadow", "dusk"):
        assert main(["pack", name, "--raw", "raw", "--workers", "1"]) == 0
    capsys.readouterr()
    for name, path, text in (("recipe", "mine.yaml", RECIPE), ("dusk", "domains/dusk.yaml", DUSK)):
        old, new = change.get(name, ("", ""))
        assert not old or text.count(old) == 1
        Path(path).write_text(text.replace(old, new) if old else text)
    assert main(["mine.yaml"]) == 2
    errors = capsys.readouterr().err.strip()
    assert errors.startswith("error: ")
    assert message in errors
    assert "\n" not in errors
    assert not Path("runs").exists()


# Domains of each kind beside each other


@pytest.fixture(scope="module")
def kinds_of_domains(
    tiny_domain: Callable[..., Domain], tiny_shards: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Shards and domains/ of `fields` (train, val), `dusk` that borrows its labels (train without masks, val), and
    `shapes` (train, train_weak, val).
    """
    root = tmp_path_factory.mktemp("kinds")
    (root / "domains").mkdir()
    fields, shapes = tiny_domain("fields", ("grass", "sky", "barn")), tiny_domain("shapes")
    dusk = replace(fields, name="dusk", labels_of="fields", classes=())
    for domain in (fields, shapes, dusk):
        (root / "domains" / f"{domain.name}.yaml").write_text(domain.to_yaml().replace("classes: []\n", ""))
    tiny_shards(root, fields, {"train": 6, "val": 2})
    tiny_shards(root, shapes, {"train": 4, "train_weak": 5, "val": 2})
    borrower = find_domain("dusk", [root / "domains"])
    tiny_shards(root, borrower, {"train": 5}, labelled=False)
    tiny_shards(root, borrower, {"val": 2})
    return root


LABELS_ONLY = {"labelled": "4", "unlabelled": "none"}
IMAGES_ONLY = {"labelled": "none"}
PSEUDO_LABELS_ONLY = {"train_split": "train_weak", "weak_split": "train_weak"}


def terms_by_step(run: Path) -> list[set[str]]:
    return [
        {key.removeprefix("train/") for key in line if key.startswith("train/")}
        for line in read_metrics(run / "metrics.jsonl")
        if "lr" in line
    ]


@pytest.mark.parametrize("schedule", ["together", "alternate"])
@pytest.mark.parametrize(
    ("method", "fields", "dusk", "shapes"),
    [
        ("cct", {"supervised"}, {"consistency"}, {"supervised", "consistency", "weak"}),
        ("supervised", {"supervised"}, set(), {"supervised"}),
        ("mean_teacher", {"supervised"}, {"consistency"}, {"supervised", "consistency"}),
        ("unimatch", {"supervised"}, {"strong", "feature"}, {"supervised", "strong", "feature"}),
        ("usss", {"supervised"}, {"within", "across"}, {"supervised", "within", "across"}),
    ],
)
def test_labels_only_images_only_and_pseudo_labels_only_train_beside_each_other(
    tiny_recipe: TinyRecipe,
    kinds_of_domains: Path,
    schedule: str,
    method: str,
    fields: set[str],
    dusk: set[str],
    shapes: set[str],
) -> None:
    recipe = tiny_recipe(
        method=method,
        domains={"fields": LABELS_ONLY, "dusk": IMAGES_ONLY, "shapes": PSEUDO_LABELS_ONLY},
        data={
            "shards": str(kinds_of_domains),
            "crop": [64, 64],
            "labelled_batch": 2,
            "unlabelled_batch": 2,
            "workers": 0,
            "schedule": schedule,
        },
        training={"steps": 3, "log_every": 1},
    )
    run = train(recipe, [kinds_of_domains / "domains"])
    each = [
        {f"{name}/{term}" for term in terms}
        for name, terms in (("fields", fields), ("dusk", dusk), ("shapes", shapes))
        if terms
    ]
    # A domain that adds nothing has no turn; it is scored all the same.
    expected = [set().union(*each)] * 3 if schedule == "together" else (each * 3)[:3]
    assert terms_by_step(run) == expected
    assert {"val/fields/miou", "val/dusk/miou", "val/shapes/miou"} <= logged_keys(run)


def test_pseudo_labels_add_a_term_beside_labelled_and_unlabelled_images(
    tiny_recipe: TinyRecipe, kinds_of_domains: Path
) -> None:
    runs = {}
    # With frozen norms an image's loss does not depend on the others of the step.
    frozen = {"name": "test_resnet", "stride": 8, "context": "fpn", "width": 32, "norm": "frozen"}
    for name, choice in (("with", {"labelled": "2", "weak_split": "train_weak"}), ("without", {"labelled": "2"})):
        recipe = tiny_recipe(name=name, domains={"shapes": choice}, data__shards=str(kinds_of_domains), encoder=frozen)
        runs[name] = read_metrics(train(recipe, [kinds_of_domains / "domains"]) / "metrics.jsonl")
    assert runs["with"][0]["train/shapes/weak"] > 0
    assert not any("train/shapes/weak" in line for line in runs["without"])
    assert runs["with"][0]["train/shapes/supervised"] == pytest.approx(
        runs["without"][0]["train/shapes/supervised"], rel=1e-5
    )


def test_a_label_space_without_a_labelled_image_is_refused(tiny_recipe: TinyRecipe, kinds_of_domains: Path) -> None:
    for domains in (
        {"fields": LABELS_ONLY, "shapes": IMAGES_ONLY},
        {"shapes": IMAGES_ONLY | {"weak_split": "train_weak"}},
    ):
        recipe = tiny_recipe(domains=domains, data__shards=str(kinds_of_domains))
        with pytest.raises(
            UserError, match="domains.shapes has no labelled image, nor has another domain with its classes"
        ):
            train(recipe, [kinds_of_domains / "domains"])
        assert not recipe.folder.exists()


def test_a_trained_run_adapts_to_unlabelled_images_alone(tiny_recipe: TinyRecipe, kinds_of_domains: Path) -> None:
    first = train(
        tiny_recipe(domains={"shapes": LABELS_ONLY}, data__shards=str(kinds_of_domains)), [kinds_of_domains / "domains"]
    )
    recipe = tiny_recipe(
        name="adapted", domains={"shapes": IMAGES_ONLY}, data__shards=str(kinds_of_domains), init_from=str(first)
    )
    assert terms_by_step(train(recipe, [kinds_of_domains / "domains"])) == [{"shapes/consistency"}] * 2


def test_a_run_to_start_from_must_have_the_head_that_is_not_taught(
    tiny_recipe: TinyRecipe, kinds_of_domains: Path
) -> None:
    first = train(
        tiny_recipe(domains={"fields": LABELS_ONLY}, data__shards=str(kinds_of_domains)), [kinds_of_domains / "domains"]
    )
    recipe = tiny_recipe(
        name="other", domains={"shapes": IMAGES_ONLY}, data__shards=str(kinds_of_domains), init_from=str(first)
    )
    with pytest.raises(UserError, match="domains.shapes has no labelled image.* start from a run that has its head"):
        train(recipe, [kinds_of_domains / "domains"])


def test_a_domain_that_adds_nothing_has_no_norms_of_its_own(tiny_recipe: TinyRecipe, kinds_of_domains: Path) -> None:
    encoder = {"name": "test_resnet", "stride": 8, "context": "fpn", "width": 32, "norm": "per_domain"}
    recipe = tiny_recipe(
        method="supervised",
        domains={"fields": LABELS_ONLY, "dusk": IMAGES_ONLY},
        data__shards=str(kinds_of_domains),
        encoder=encoder,
    )
    with pytest.raises(UserError, match="domains.dusk has no image to train its own norms"):
        train(recipe, [kinds_of_domains / "domains"])


def test_comparing_label_spaces_needs_unlabelled_images(tiny_recipe: TinyRecipe, kinds_of_domains: Path) -> None:
    recipe = tiny_recipe(
        method="usss", domains={"fields": LABELS_ONLY, "shapes": LABELS_ONLY}, data__shards=str(kinds_of_domains)
    )
    with pytest.raises(UserError, match="method is `usss`, but no domain has unlabelled images"):
        train(recipe, [kinds_of_domains / "domains"])


def test_a_run_that_starts_from_a_mean_teachers_takes_the_teacher(
    tiny_recipe: TinyRecipe, kinds_of_domains: Path
) -> None:
    folders, shards = [kinds_of_domains / "domains"], str(kinds_of_domains)
    old = train(tiny_recipe(method="mean_teacher", domains={"fields": {"labelled": "2"}}, data__shards=shards), folders)
    recipe = tiny_recipe(
        name="new", domains={"fields": LABELS_ONLY}, data__shards=shards, init_from=str(old), optimiser={"lr": 1e-12}
    )
    teacher, new = (
        load_file(sorted((run / "checkpoints").glob("step-*"))[-1] / "model.safetensors")
        for run in (old, train(recipe, folders))
    )
    name = "heads.fields.main.classify.weight"
    assert (new[name] - teacher[f"teacher.{name}"]).abs().max() < 1e-6 < (new[name] - teacher[name]).abs().max()
