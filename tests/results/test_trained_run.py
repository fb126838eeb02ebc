"""A trained run takes images in every form and answers at their own size."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import multidomain_cct
from multidomain_cct.__main__ import main
from multidomain_cct.data.domain import Domain
from multidomain_cct.data.images import resized
from multidomain_cct.data.shards.writer import ShardWriter
from multidomain_cct.errors import UserError
from multidomain_cct.evaluation.scoring import confusion_of, mean_iou
from multidomain_cct.results.evaluate import evaluate
from multidomain_cct.results.trained_run import TrainedRun

PIXELS = np.random.default_rng(0).integers(0, 256, (41, 67, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def run(tiny_run: Path) -> TrainedRun:
    return TrainedRun.load(tiny_run, device=torch.device("cpu"))


def test_every_form_of_an_image_gives_the_same_ids(run: TrainedRun, tmp_path: Path) -> None:
    Image.fromarray(PIXELS).save(tmp_path / "a.png")
    tensor = torch.from_numpy(PIXELS).permute(2, 0, 1)
    forms: list[Any] = [str(tmp_path / "a.png"), tmp_path / "a.png", Image.fromarray(PIXELS), PIXELS, tensor]
    first, *others = run.predict(forms, "fields")
    assert first.ids.shape == (41, 67)
    assert first.ids.dtype == np.uint8
    for other in others:
        assert np.array_equal(other.ids, first.ids)


def test_a_single_image_gives_a_single_result(run: TrainedRun) -> None:
    result = run.predict(PIXELS, domain="shapes")
    assert result.domain == "shapes"
    assert result.classes == ("square", "ground")
    assert result.probabilities is None
    assert np.array_equal(np.asarray(result.colored()), run.domains["shapes"].palette[result.ids])
    assert np.array_equal(np.asarray(result.overlay(0.0)), PIXELS)
    assert run.predict([], "shapes") == []


def test_probabilities_sum_to_one_and_lead_to_the_ids(run: TrainedRun) -> None:
    result = run.predict(PIXELS, "fields", probabilities=True)
    assert result.probabilities is not None
    assert result.probabilities.shape == (3, 41, 67)
    np.testing.assert_allclose(result.probabilities.sum(axis=0), 1, atol=1e-5)
    assert np.array_equal(result.probabilities.argmax(axis=0), result.ids)


def test_a_photograph_on_its_side_is_turned_upright_and_left_as_it_was(run: TrainedRun, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(PIXELS).save(tmp_path / "a.jpg", exif=exif)
    with Image.open(tmp_path / "a.jpg") as opened:
        result = run.predict(opened, "fields")
        assert opened.size == (67, 41)
    assert result.ids.shape == (67, 41)
    assert np.array_equal(result.ids, run.predict(tmp_path / "a.jpg", "fields").ids)


def test_a_run_of_one_domain_needs_no_name(run: TrainedRun) -> None:
    with pytest.raises(UserError, match="2 domains; name one: fields, shapes"):
        run.predict(PIXELS)
    with pytest.raises(UserError, match=r'"feilds"\. It has: fields, shapes\. Did you mean "fields"'):
        run.predict(PIXELS, "feilds")


@pytest.mark.parametrize(
    ("image", "named"),
    [
        (PIXELS.astype(np.float32), r"ndarray \(41, 67, 3\) float32"),
        (PIXELS.transpose(2, 0, 1), r"ndarray \(3, 41, 67\) uint8"),
        (PIXELS[..., 0], r"ndarray \(41, 67\) uint8"),
        (PIXELS[None], r"ndarray \(1, 41, 67, 3\) uint8"),
        (PIXELS[:0], r"ndarray \(0, 67, 3\) uint8"),
        (torch.from_numpy(PIXELS), r"Tensor \(41, 67, 3\) torch.uint8"),
        (torch.zeros(3, 8, 8), r"Tensor \(3, 8, 8\) torch.float32"),
        (7, "int"),
    ],
)
def test_another_type_or_shape_is_refused_with_what_is_allowed(run: TrainedRun, image: Any, named: str) -> None:
    with pytest.raises(UserError, match=rf"the image is a {named};.*\(H, W, 3\) uint8 array"):
        run.predict(image, "fields")


def test_a_file_that_is_not_an_image_is_named(run: TrainedRun, tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_text("text")
    for name in ("a.jpg", "absent.jpg"):
        with pytest.raises(UserError, match=f"{name}: the image cannot be read"):
            run.predict(tmp_path / name, "fields")


@pytest.fixture(scope="module")
def learnt(
    tiny_training: Callable[..., Path], tiny_domain: Callable[..., Domain], tmp_path_factory: pytest.TempPathFactory
) -> TrainedRun:
    """A run that has learnt something from images of 96x72, which were photographs of 288x216: see `photographs`.

    The masks of its val split have the photographs' size, as `pack` leaves them.
    """
    workspace, classes = tmp_path_factory.mktemp("learnt"), ("grass", "sky", "barn")
    for split, count in (("train", 16), ("val", 3)):
        with ShardWriter(workspace / "shards" / "fields", split) as writer:
            for number, (image, mask) in enumerate(photographs(tiny_domain("fields", classes), split, count)):
                small, stored, labels = resized(image, (96, 72)), io.BytesIO(), io.BytesIO()
                (mask if split == "val" else mask.resize((96, 72), Image.Resampling.NEAREST)).save(labels, "PNG")
                small.save(stored, "JPEG", quality=95)
                writer.write(f"{split}_{number}", image=stored.getvalue(), mask=labels.getvalue(), meta=b"{}")
    training = {"steps": 60, "log_every": 60, "evaluate_every": 60}
    folder = tiny_training(
        workspace,
        "learnt",
        {"fields": classes},
        method="supervised",
        training=training,
        domains={"fields": {"labelled": "all"}},
    )
    return TrainedRun.load(folder, device=torch.device("cpu"))


def photographs(domain: Domain, split: str, count: int) -> Iterator[tuple[Image.Image, Image.Image]]:
    """Noisy images of 288x216, and their train ids: stripes of the classes, in about their colours."""
    rng = np.random.default_rng(len(split))
    for _ in range(count):
        rows = np.repeat(rng.permutation(3), 72)[rng.integers(0, 216, 4).max() :]
        ids = np.broadcast_to(np.resize(rows, 216)[:, None], (216, 288)).astype(np.uint8)
        pixels = domain.palette[ids] + rng.normal(0, 40, (216, 288, 3))
        yield Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), Image.fromarray(ids)


def miou_of_photographs(run: TrainedRun, *, factor: int = 1) -> float:
    """The score of `predict` on the photographs, enlarged `factor` times."""
    domain, confusion = run.domains["fields"], torch.zeros(3, 3, dtype=torch.int64)
    for image, mask in photographs(domain, "val", 3):
        size = image.width * factor, image.height * factor
        result = run.predict(image.resize(size, Image.Resampling.BICUBIC), "fields")
        assert result.ids.shape == size[::-1]
        truth = np.array(mask.resize(size, Image.Resampling.NEAREST))
        confusion += confusion_of(torch.from_numpy(truth), torch.from_numpy(result.ids), 3)
    return mean_iou(confusion.numpy())


@pytest.mark.parametrize("packed_to", [None, (96, 72)])
@pytest.mark.parametrize("factor", [1, 3])
def test_packed_and_original_photographs_give_the_same_scores(
    learnt: TrainedRun, packed_to: tuple[int, int] | None, factor: int
) -> None:
    run = replace(learnt, domains={"fields": replace(learnt.domains["fields"], size=packed_to)})
    (packed,) = evaluate(run)
    assert packed.miou > 0.5
    assert abs(miou_of_photographs(run, factor=factor) - packed.miou) < 0.01
    # At their own size they are something else.
    unscaled = replace(run, domains={"fields": replace(run.domains["fields"], size=(9999, 9999))})
    assert abs(miou_of_photographs(unscaled, factor=factor) - packed.miou) > 0.02


def test_small_photographs_are_enlarged_unless_pack_would_not(learnt: TrainedRun) -> None:
    assert learnt.seen_at((48, 36), learnt.domains["fields"]) == (96, 72)
    assert learnt.seen_at((48, 36), replace(learnt.domains["fields"], size=(96, 72))) == (48, 36)


@pytest.mark.parametrize("size", [(96, 72), (140, 100), (70, 50)])
def test_photographs_of_about_the_size_of_the_training_images_keep_theirs(
    learnt: TrainedRun, size: tuple[int, int]
) -> None:
    assert learnt.predict(Image.new("RGB", size), "fields").seen_at == size


def test_a_run_that_recorded_no_image_size_predicts_at_the_image_s_own(learnt: TrainedRun, tmp_path: Path) -> None:
    folder = shutil.copytree(learnt.folder, tmp_path / "old")
    environment = json.loads((folder / "env.json").read_text())
    recorded = environment.pop("images")
    assert recorded["fields"]["median_size"] == [96, 72]
    (folder / "env.json").write_text(json.dumps(environment))
    old = TrainedRun.load(folder, device=torch.device("cpu"))
    assert old.predict(Image.new("RGB", (300, 200)), "fields").seen_at == (300, 200)


def test_evaluate_is_the_json_of_the_command(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = shutil.copytree(tiny_run, tmp_path / "run")  # The command writes its scores into the run's folder.
    assert main(["evaluate", str(copy), "--json", "--domain", "fields", "--flip"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert multidomain_cct.evaluate(multidomain_cct.load_run(copy), "fields", flip=True) == printed


@pytest.fixture(scope="module")
def averaged_run(tiny_run: Path, tiny_training: Callable[..., Path]) -> Path:
    """A run on the shards of tiny_run that keeps a running average of its weights."""
    return tiny_training(tiny_run.parents[1], "averaged", method="supervised", ema=0.9)


def test_the_running_average_predicts_unless_the_student_is_asked_for(averaged_run: Path) -> None:
    average, student = TrainedRun.load(averaged_run), TrainedRun.load(averaged_run, weights="student")
    assert average.weights == "ema"
    assert student.weights == "student"
    predictions = [run.predict(PIXELS, "fields", probabilities=True).probabilities for run in (average, student)]
    assert not np.allclose(*predictions)
    explicit = multidomain_cct.load_run(averaged_run, weights="ema").predict(PIXELS, "fields", probabilities=True)
    assert np.array_equal(explicit.probabilities, predictions[0])


def test_scores_say_whose_they_are_and_are_those_of_the_log(
    averaged_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    last = json.loads((averaged_run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    for weights, logged in (("ema", "val/fields/miou"), ("student", "val/fields/student/miou")):
        assert main(["evaluate", str(averaged_run), "--domain", "fields", "--weights", weights, "--json"]) == 0
        scores = json.loads(capsys.readouterr().out)
        assert scores["weights"] == weights
        assert scores["domains"]["fields"]["miou"] == pytest.approx(last[logged])
    assert (averaged_run / "evaluation-val-step-00000002-fields-student.json").is_file()
    assert main(["evaluate", str(averaged_run), "--domain", "fields"]) == 0
    assert "step-00000002 of" in (said := capsys.readouterr().out)
    assert ", ema" in said


def test_weights_that_a_run_does_not_have_are_refused(run: TrainedRun, averaged_run: Path) -> None:
    with pytest.raises(UserError, match=r"has no student weights\. It keeps no running average: choose trained\."):
        TrainedRun.load(run.folder, weights="student")
    with pytest.raises(UserError, match=r"has no trained weights.*choose ema or student\."):
        TrainedRun.load(averaged_run, weights="trained")
