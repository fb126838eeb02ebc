"""The diagnosis measures what it says: distances to neighbours, borders on a grid, and how well the ones find the
others.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from multidomain_cct.__main__ import main
from multidomain_cct.commands.smoothness import print_diagnosis
from multidomain_cct.data.domain import Domain
from multidomain_cct.data.shards.reader import Shards
from multidomain_cct.data.shards.writer import ShardWriter
from multidomain_cct.errors import UserError
from multidomain_cct.model.encoder import Encoder, EncoderSettings
from multidomain_cct.model.stages import encoder_stages, model_stages
from multidomain_cct.results.smoothness.diagnosis import (
    Diagnosis,
    DiagnosisSettings,
    Stage,
    StageScore,
    Subject,
    diagnose,
    measure,
    published_encoder,
    trained_encoder,
)
from multidomain_cct.results.smoothness.panel import chosen_stages, outline, write_panel
from multidomain_cct.results.smoothness.variation import area_under_curve, class_borders, image_patches, local_variation
from multidomain_cct.results.trained_run import TrainedRun

AROUND = [(down, right) for down in (-1, 0, 1) for right in (-1, 0, 1) if (down, right) != (0, 0)]


def slow_variation(features: np.ndarray) -> np.ndarray:
    """The definition, position by position, of (D, h, w) float64."""
    _, height, width = features.shape
    result = np.zeros((height, width))
    for row in range(height):
        for column in range(width):
            near = [
                (row + down, column + right)
                for down, right in AROUND
                if 0 <= row + down < height and 0 <= column + right < width
            ]
            result[row, column] = np.mean(
                [np.linalg.norm(features[:, row, column] - features[:, y, x]) for y, x in near]
            )
    return result


def slow_area(values: np.ndarray, border: np.ndarray) -> float:
    """Share of the pairs in which the border varies more, every pair by itself."""
    more = values[border][:, None] - values[~border][None]
    return float((more > 0).mean() + 0.5 * (more == 0).mean())


def image_of(subject: Subject, stride: int = 8) -> Subject:
    """A subject with one stage: the mean colour of each patch."""
    return replace(
        subject,
        stages=(Stage("mean", stride, 3),),
        features=lambda image: [torch.nn.functional.avg_pool2d(image.float(), stride)],
    )


MEAN = image_of(Subject("mean colour", (), lambda image: []))


def test_variation_is_the_mean_distance_to_the_neighbours() -> None:
    features = torch.randn(5, 7, 4, generator=torch.Generator().manual_seed(0))
    np.testing.assert_allclose(local_variation(features).numpy(), slow_variation(features.double().numpy()), rtol=1e-5)


@pytest.mark.parametrize("size", [(1, 1), (0, 3), (1, 4), (4, 1)])
def test_variation_of_grids_without_all_neighbours_is_finite(size: tuple[int, int]) -> None:
    variation = local_variation(torch.ones(2, *size))
    assert variation.shape == size
    assert not variation.any()


def test_patches_are_the_pixels_of_whole_squares() -> None:
    image = torch.randint(0, 256, (3, 9, 14), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    patches = image_patches(image, 4)
    assert patches.shape == (48, 2, 3)
    for row in range(2):
        for column in range(3):
            square = image[:, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
            assert sorted(patches[:, row, column].tolist()) == sorted((square.flatten() / 255).tolist())
    distance = np.linalg.norm(image[:, :4, :4].double() / 255 - image[:, :4, 4:8].double() / 255)
    assert float((patches[:, 0, 0] - patches[:, 0, 1]).norm()) == pytest.approx(float(distance), rel=1e-5)


@pytest.mark.parametrize("finer", [1, 2])
def test_a_border_is_where_a_patch_and_its_neighbours_hold_two_classes(finer: int) -> None:
    rng = np.random.default_rng(finer)
    small = rng.choice([0, 255], (8, 9)).astype(np.uint8)
    small[:2, :2] = 255
    small[5, 6] = 1
    small[0, 8] = 1  # on half a patch, which the grid leaves out
    ids = np.kron(small, np.ones((2 * finer, 2 * finer), dtype=np.uint8))  # classes change every half patch
    border, counted = class_borders(torch.from_numpy(ids), (16, 18), stride=4, num_classes=2)
    patch = 4 * finer
    held = [
        [
            set(np.unique(ids[patch * r : patch * (r + 1), patch * c : patch * (c + 1)]).tolist()) - {255}
            for c in range(4)
        ]
        for r in range(4)
    ]
    for r in range(4):
        for c in range(4):
            near = set().union(
                *(held[y][x] for y in range(max(0, r - 1), min(4, r + 2)) for x in range(max(0, c - 1), min(4, c + 2)))
            )
            assert bool(counted[r, c]) == bool(held[r][c])
            assert bool(border[r, c]) == (len(near) > 1)
    assert not counted.all()
    assert border.any()
    assert not border.all()


def test_labels_coarser_than_the_image_cover_every_patch() -> None:
    border, counted = class_borders(torch.tensor([[0, 1]], dtype=torch.uint8), (8, 16), stride=1, num_classes=2)
    assert counted.all()
    assert border[:, 7:9].all()
    assert int(border.sum()) == 16


def test_the_area_under_the_curve_counts_ties_half() -> None:
    rng = np.random.default_rng(0)
    values, border = rng.integers(0, 6, 200).astype(np.float32), rng.random(200) < 0.3
    area = area_under_curve(torch.from_numpy(values), torch.from_numpy(border))
    assert area == pytest.approx(slow_area(values, border), abs=1e-12)
    assert area_under_curve(torch.ones(4), torch.ones(4, dtype=torch.bool)) is None
    assert area_under_curve(torch.ones(0), torch.ones(0, dtype=torch.bool)) is None


def test_two_flat_halves_vary_at_their_border_only() -> None:
    image, ids = torch.zeros(3, 64, 64, dtype=torch.uint8), torch.zeros(64, 64, dtype=torch.uint8)
    image[:, :, 32:], ids[:, 32:] = 200, 1
    (result,) = measure(MEAN, image, ids=ids, num_classes=2)
    expected = torch.zeros(8, 8, dtype=torch.bool)
    expected[:, 3:5] = True
    for variation in (result.features, result.patches):
        assert torch.equal(variation > 0, expected)
    assert torch.equal(result.border, expected)
    assert result.area == result.patch_area == 1.0


def test_constant_features_are_chance() -> None:
    ids = torch.zeros(40, 40, dtype=torch.uint8)
    ids[:, 20:] = 1
    (result,) = measure(MEAN, torch.full((3, 40, 40), 77, dtype=torch.uint8), ids=ids, num_classes=2)
    assert not result.features.any()
    assert not result.patches.any()
    assert result.area == result.patch_area == 0.5


def test_padding_is_not_measured() -> None:
    flat = torch.full((3, 61, 45), 250, dtype=torch.uint8)
    (result,) = measure(MEAN, flat, ids=torch.zeros(61, 45, dtype=torch.uint8), num_classes=2)
    assert result.features.shape == (7, 5)
    assert not result.features.any()


def test_an_image_smaller_than_a_patch_has_no_figure() -> None:
    (result,) = measure(
        image_of(MEAN, 32),
        torch.zeros(3, 20, 40, dtype=torch.uint8),
        ids=torch.zeros(20, 40, dtype=torch.uint8),
        num_classes=2,
    )
    assert result.features.shape == (0, 1)
    assert result.area is None


@pytest.mark.parametrize("norm", ["shared", "per_domain", "frozen"])
@pytest.mark.parametrize("context", ["psp", "fpn"])
def test_the_stages_of_a_trained_encoder_end_with_what_its_context_module_reads(norm: str, context: str) -> None:
    settings = EncoderSettings(
        "test_resnet", stride=32 if context == "psp" else 4, context=context, width=32, norm=norm
    )
    encoder = Encoder(settings, ["fields", "shapes"])
    image = torch.randint(0, 256, (1, 3, 64, 96), dtype=torch.uint8)
    encoder(
        torch.cat([image, image.flip(-1), image // 2, image]), [("fields", 2), ("shapes", 2)]
    )  # the domains' statistics part
    encoder.eval()
    levels = encoder_stages(encoder, settings, domain="shapes", domains=["fields", "shapes"])
    assert levels.strides == (2, 4, 8, 16, 32)
    with torch.inference_mode():
        found = levels(image)
        wanted = encoder(image, [("shapes", 1)])
        encoder.segments.parts = (("shapes", 1),)
        assert torch.equal(encoder.context(found[1:] if context == "fpn" else found[-1:]), wanted)
    assert [tuple(level.shape[1:]) for level in found] == [
        (c, 64 // s, 96 // s) for c, s in zip(levels.channels, levels.strides, strict=True)
    ]


def test_every_block_of_a_plain_vit_is_a_stage() -> None:
    assert model_stages("test_vit", "none").strides == (16,) * 6


def test_a_run_ends_with_the_output_of_its_context_module(tiny_run: Path) -> None:
    run = TrainedRun.load(tiny_run, device=torch.device("cpu"))
    subject = trained_encoder(run, "fields")
    image = torch.randint(0, 256, (1, 3, 64, 96), dtype=torch.uint8)
    with torch.inference_mode():
        features = subject.features(image)
        assert torch.equal(features[-1], run.model.encoder(image, [("fields", 1)]))
        assert subject.predict is not None
        assert torch.equal(subject.predict(image), run.model.logits(image, "fields")[0].argmax(0).to(torch.uint8))
    assert [stage.name for stage in subject.stages] == ["stage 1", "stage 2", "stage 3", "stage 4", "stage 5", "output"]
    assert [tuple(level.shape[1:]) for level in features] == [
        (stage.channels, 64 // stage.stride, 96 // stage.stride) for stage in subject.stages
    ]


@pytest.fixture
def fields(tiny_domain: Callable[..., Domain]) -> Domain:
    return tiny_domain("fields", ("grass", "sky", "barn"))


def test_the_headline_is_the_mean_over_images_and_the_gain_is_paired(fields: Domain, two_domains: Path) -> None:
    shards = Shards.open(two_domains / "fields", "val")
    subject = published_encoder("test_resnet", "none", torch.device("cpu"))
    diagnosis, examples = diagnose(subject, fields, shards=shards, settings=DiagnosisSettings(examples=9))
    assert diagnosis.images == len(examples) == 3
    assert diagnosis.borders == "labels"
    for number, score in enumerate(diagnosis.stages[:3]):
        pairs = np.array([(example.measured[number].area, example.measured[number].patch_area) for example in examples])
        assert (score.auc, score.patch_auc) == pytest.approx(tuple(pairs.mean(axis=0)))
        gains = pairs[:, 0] - pairs[:, 1]
        assert (score.gain, score.gain_error) == pytest.approx((gains.mean(), gains.std(ddof=1) / 3**0.5))
        counted = [example.measured[number].counted for example in examples]
        border = [example.measured[number].border & kept for example, kept in zip(examples, counted, strict=True)]
        share = sum(int(each.sum()) for each in border) / sum(int(each.sum()) for each in counted)
        assert score.border_share == pytest.approx(share)
    assert diagnose(subject, fields, shards=shards, settings=DiagnosisSettings(limit=2))[0].images == 2


def score(name: str, gain: float | None, error: float | None = 0.01, share: float = 0.3) -> StageScore:
    auc = None if gain is None else 0.7 + gain
    return StageScore(name, 8, 16, share, 3, auc, None if gain is None else 0.7, gain, error)


def test_the_verdict_names_the_stage_that_gains_most_over_the_image(fields: Domain) -> None:
    diagnosis = Diagnosis(
        "x",
        fields,
        "val",
        "labels",
        3,
        (score("stage 1", 0.02), score("output", 0.1), score("stage 3", 0.2, share=0.95)),
    )
    assert diagnosis.verdict.startswith(
        "The cluster assumption holds best at the encoder's output: its local variation finds class borders with AUC "
        "0.800"
    )
    assert "difference +0.100, standard error 0.010" in diagnosis.verdict
    assert diagnosis.verdict.endswith("Left out: stage 3, where 95 % of the positions are borders.")
    unclear = replace(diagnosis, stages=(score("stage 1", 0.015), score("stage 2", -0.1)))
    assert unclear.verdict.startswith(
        "At no stage do class borders stand out clearly more than in the image itself; nearest is stage 1"
    )
    assert replace(diagnosis, stages=(score("stage 1", None),)).verdict.startswith("No stage can be judged")


def test_a_picture_shows_the_first_and_the_last_of_many_stages() -> None:
    assert chosen_stages(4) == [0, 1, 2, 3]
    assert chosen_stages(13)[0] == 0
    assert chosen_stages(13)[-1] == 12
    assert len(chosen_stages(13)) == 6


def test_an_outline_lies_between_classes_and_not_at_ignored_pixels() -> None:
    ids = np.array([[0, 0, 1], [0, 255, 1]], dtype=np.uint8)
    assert (outline(ids)[..., 3] > 0).tolist() == [[False, False, True], [False, False, False]]


def test_smoothness_writes_a_picture_and_a_table(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "made" / "picture.png"
    assert main(["smoothness", str(tiny_run), "--domain", "fields", "--out", str(out), "--images", "2"]) == 0
    printed = capsys.readouterr().out
    assert "tiny, step-00000002 on fields/val: 3 images, borders of the labels" in printed
    assert f"picture: {out}" in printed
    assert all(name in printed for name in ("stage 1", "stage 5", "output", "border", "features", "patches"))
    with Image.open(out) as picture:
        assert picture.format == "PNG"
        assert 1000 < picture.width < 2500
        assert 600 < picture.height < 2500
        assert len(np.unique(np.asarray(picture.convert("L")))) > 100
    assert [path.name for path in out.parent.iterdir()] == ["picture.png"]


def test_smoothness_prints_the_same_as_json(tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "smoothness",
        str(tiny_run),
        "--domain",
        "shapes",
        "--out",
        str(tmp_path / "a.png"),
        "--limit",
        "1",
        "--json",
        "--borders",
        "prediction",
    ]
    assert main(arguments) == 0
    plain = json.loads(capsys.readouterr().out)
    assert (plain["domain"], plain["split"], plain["borders"], plain["images"]) == ("shapes", "val", "prediction", 1)
    assert [stage["stride"] for stage in plain["stages"]] == [2, 4, 8, 8, 8, 8]
    assert set(plain["stages"][0]) == set(StageScore.__dataclass_fields__)


def test_an_unlabelled_split_is_held_against_the_models_own_borders(
    tiny_run: Path, two_domains: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "a.png")
    assert (
        main(
            [
                "smoothness",
                str(tiny_run),
                "--domain",
                "fields",
                "--shards",
                str(two_domains),
                "--split",
                "unlabelled",
                "--out",
                out,
            ]
        )
        == 0
    )
    assert "6 images, borders of the prediction" in capsys.readouterr().out


def test_images_without_a_mask_are_left_out_of_labelled_borders(
    fields: Domain, two_domains: Path, tmp_path: Path
) -> None:
    source = Shards.open(two_domains / "fields", "val")
    with ShardWriter(tmp_path, "mixed") as writer:
        for number in range(3):
            record = source.read(number)
            writer.write(record.key, image=record.image, mask=record.mask if number == 1 else None, meta=b"{}")
    _, (example,) = diagnose(
        MEAN, fields, shards=Shards.open(tmp_path, "mixed"), settings=DiagnosisSettings("mixed", examples=6)
    )
    assert example.key == source.keys[1]


def test_hostile_names_are_drawn_and_printed_as_they_are(
    tiny_domain: Callable[..., Domain], two_domains: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    domain = tiny_domain("[red]fields[/] $a_b^", ("[bold]barn", "$sky$", "grass"))
    shards = Shards.open(two_domains / "fields", "val")
    diagnosis, examples = diagnose(
        replace(MEAN, name="run [/] $x_"), domain, shards=shards, settings=DiagnosisSettings(examples=1)
    )
    print_diagnosis(diagnosis)
    assert "run [/] $x_ on [red]fields[/] $a_b^/val" in capsys.readouterr().out
    write_panel(diagnosis, [replace(examples[0], key="line\nbreak $\\frac{ \x1b[31m 漢字" * 9)], tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 10_000


def mistake(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line that the command prints when it exits with 2."""
    assert main(["smoothness", *(str(argument) for argument in arguments)]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line


def test_mistakes_are_one_line(
    tiny_run: Path, two_domains: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, shards = ("--out", tmp_path / "a.png"), ("--shards", two_domains, "--domains", two_domains / "domains")
    fields = ("--domain", "fields", *out, *shards)
    plain = ("test_resnet", "--weights", "none")
    line = mistake(capsys, "resnet5o", *fields)
    assert "resnet5o is neither a run's folder (it has no recipe.yaml) nor a model of timm." in line
    assert "Did you mean" in line
    assert 'has no head for the domain "feilds"' in mistake(capsys, tiny_run, "--domain", "feilds", *out)
    assert 'the domain "feilds"' in mistake(capsys, *plain, "--domain", "feilds", *out, *shards)
    assert "has no test shards. Make them" in mistake(capsys, *plain, *fields, "--split", "test")
    assert "fields/unlabelled has no masks, but test_resnet, weights none is an encoder without a head" in mistake(
        capsys, *plain, *fields, "--split", "unlabelled"
    )
    assert "--borders is prediction, but test_resnet" in mistake(capsys, *plain, *fields, "--borders", "prediction")
    assert "fields/unlabelled has no masks. Name a labelled split" in mistake(
        capsys, tiny_run, *fields, "--split", "unlabelled", "--borders", "labels"
    )
    assert "--weights is lite, but" in mistake(capsys, tiny_run, *fields, "--weights", "lite")
    assert "--checkpoint is best, but test_resnet" in mistake(capsys, *plain, *fields, "--checkpoint", "best")
    assert "tf_efficientnet_lite0" in mistake(capsys, "test_resnet", *fields, "--weights", "lite")
    assert "--images is 0; it is at least 1 and at most 12" in mistake(capsys, *plain, *fields, "--images", "0")
    assert "--limit is 0; it is at least 1" in mistake(capsys, *plain, *fields, "--limit", "0")
    assert "a file that ends in .png" in mistake(
        capsys, *plain, "--domain", "fields", *shards, "--out", tmp_path / "a.jpg"
    )
    assert not (tmp_path / "a.png").exists()


def test_features_that_are_not_finite_are_named(fields: Domain, two_domains: Path) -> None:
    def features(image: Tensor) -> list[Tensor]:
        return [torch.full((1, 3, image.shape[2] // 8, image.shape[3] // 8), torch.nan)]

    with pytest.raises(UserError, match=r"val-00000.tar: key 'val_0.*': the features of mean are not finite"):
        diagnose(
            replace(MEAN, features=features),
            fields,
            shards=Shards.open(two_domains / "fields", "val"),
            settings=DiagnosisSettings(),
        )


def test_a_run_is_diagnosed_from_its_folder_alone(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(tiny_run, tmp_path / "moved")
    assert (
        main(
            [
                "smoothness",
                str(run),
                "--domain",
                "fields",
                "--checkpoint",
                "best",
                "--limit",
                "1",
                "--out",
                str(tmp_path / "a.png"),
            ]
        )
        == 0
    )
    assert "moved, step-" in capsys.readouterr().out
