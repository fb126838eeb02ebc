"""A trained run takes images in every form and answers at their own size."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import multidomain_cct
from multidomain_cct.__main__ import main
from multidomain_cct.errors import UserError
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


def test_evaluate_is_the_json_of_the_command(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = shutil.copytree(tiny_run, tmp_path / "run")  # The command writes its scores into the run's folder.
    assert main(["evaluate", str(copy), "--json", "--domain", "fields", "--flip"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert multidomain_cct.evaluate(multidomain_cct.load_run(copy), "fields", flip=True) == printed
