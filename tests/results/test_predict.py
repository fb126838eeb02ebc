"""predict keeps names and sizes, says what it could not read, and never writes over an input."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from multidomain_cct.data.batches.views import image_tensor
from multidomain_cct.errors import UserError
from multidomain_cct.evaluation.inference import InferenceSettings, class_probabilities
from multidomain_cct.results.predict import PredictSummary, predict
from multidomain_cct.results.trained_run import TrainedRun

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def run(tiny_run: Path) -> TrainedRun:
    return TrainedRun.load(tiny_run, device=CPU)


def draw(path: Path, size: tuple[int, int] = (90, 60), **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(len(path.name)).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, **options)
    return path


def segment(run: TrainedRun, sources: list[Path], out: Path, domain: str = "fields") -> PredictSummary:
    return predict(run, domain, sources, out, InferenceSettings())


def files_below(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_a_folder_is_mirrored_into_index_color_and_overlay(run: TrainedRun, tmp_path: Path) -> None:
    for name in ("a.jpg", "deep/er/b.PNG", "c.JPEG", "d.bmp", "e.tif", "f.tiff", "g.webp"):
        draw(tmp_path / "in" / name)
    summary = segment(run, [tmp_path / "in"], tmp_path / "out")
    names = ("a.png", "deep/er/b.png", "c.png", "d.png", "e.png", "f.png", "g.png")
    assert files_below(tmp_path / "out") == {
        f"{kind}/{name}" for kind in ("index", "color", "overlay") for name in names
    }
    assert summary == PredictSummary(written=7)


def test_indices_are_the_train_ids_of_the_most_probable_classes(run: TrainedRun, tmp_path: Path) -> None:
    path = draw(tmp_path / "a.png", size=(91, 63))
    segment(run, [path], tmp_path / "out")
    with Image.open(path) as image, torch.inference_mode():
        expected = (
            class_probabilities(run.model, image_tensor(image)[None], "fields", (63, 91), InferenceSettings())
            .argmax(dim=1)[0]
            .numpy()
        )
    with Image.open(tmp_path / "out/index/a.png") as index, Image.open(tmp_path / "out/color/a.png") as color:
        assert index.mode == "P"
        assert index.size == color.size == (91, 63)
        assert np.array_equal(np.asarray(index), expected)
        assert np.array_equal(np.asarray(color), run.domains["fields"].palette[expected])


@pytest.mark.parametrize(("size", "shown"), [((400, 300), (400, 300)), ((8000, 100), (4096, 51))])
def test_an_overlay_shows_the_image_above_a_legend(
    run: TrainedRun, tmp_path: Path, size: tuple[int, int], shown: tuple[int, int]
) -> None:
    segment(run, [draw(tmp_path / "a.png", size=size)], tmp_path / "out")
    with Image.open(tmp_path / "out/overlay/a.png") as overlay:
        assert overlay.width == shown[0]
        assert 10 < overlay.height - shown[1] < 300
    with Image.open(tmp_path / "out/index/a.png") as index, Image.open(tmp_path / "out/color/a.png") as color:
        assert index.size == color.size == size


def test_images_of_another_size_than_the_training_images_are_predicted_at_that_and_told(
    run: TrainedRun, tmp_path: Path
) -> None:
    draw(tmp_path / "in/a.png", size=(960, 720)), draw(tmp_path / "in/b.png", size=(96, 72))
    summary = segment(run, [tmp_path / "in"], tmp_path / "out")
    assert summary.resized == ["960x720 at 96x72"]
    with Image.open(tmp_path / "out/index/a.png") as index:
        assert index.size == (960, 720)


def test_an_image_that_lies_on_its_side_is_turned_upright(run: TrainedRun, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    segment(run, [draw(tmp_path / "a.jpg", size=(50, 30), exif=exif)], tmp_path / "out")
    with Image.open(tmp_path / "out/index/a.png") as index:
        assert index.size == (30, 50)


@pytest.mark.parametrize("size", [(1, 1), (7, 200)])
def test_any_size_is_predicted(run: TrainedRun, tmp_path: Path, size: tuple[int, int]) -> None:
    segment(run, [draw(tmp_path / "a.png", size=size)], tmp_path / "out")
    with Image.open(tmp_path / "out/index/a.png") as index:
        assert index.size == size


def test_unreadable_images_are_skipped_and_named(run: TrainedRun, tmp_path: Path) -> None:
    draw(tmp_path / "in/good.png")
    (tmp_path / "in/text.jpg").write_text("not an image")
    whole = draw(tmp_path / "in/cut.png", size=(200, 200)).read_bytes()
    (tmp_path / "in/cut.png").write_bytes(whole[: len(whole) // 2])
    summary = segment(run, [tmp_path / "in"], tmp_path / "out")
    assert summary.written == 1
    assert [line.split(": ")[0] for line in summary.unreadable] == [
        str(tmp_path / "in/cut.png"),
        str(tmp_path / "in/text.jpg"),
    ]
    assert all("cannot be read" in line and "\n" not in line for line in summary.unreadable)
    assert files_below(tmp_path / "out") == {"index/good.png", "color/good.png", "overlay/good.png"}


def test_images_that_differ_in_their_ending_only_keep_it(run: TrainedRun, tmp_path: Path) -> None:
    for name in ("b.jpg", "b.png", "c.png"):
        draw(tmp_path / "in" / name)
    segment(run, [tmp_path / "in"], tmp_path / "out")
    assert files_below(tmp_path / "out/index") == {"b.jpg.png", "b.png.png", "c.png"}


def test_images_of_one_name_from_two_folders_are_refused(run: TrainedRun, tmp_path: Path) -> None:
    draw(tmp_path / "one/b.jpg"), draw(tmp_path / "two/b.jpg")
    with pytest.raises(UserError, match=r"one/b\.jpg and .*two/b\.jpg would both be written as b\.jpg\.png.*--out"):
        segment(run, [tmp_path / "one", tmp_path / "two"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_image_that_is_named_twice_is_predicted_once(run: TrainedRun, tmp_path: Path) -> None:
    draw(tmp_path / "in/deep/b.jpg")
    summary = segment(run, [tmp_path / "in", tmp_path / "in/deep/b.jpg", tmp_path / "in/deep"], tmp_path / "out")
    assert summary.written == 1
    assert files_below(tmp_path / "out/index") == {"deep/b.png"}


def test_hidden_files_and_other_files_are_left_out(run: TrainedRun, tmp_path: Path) -> None:
    for name in ("a.jpg", ".hidden.jpg", ".cache/b.jpg"):
        draw(tmp_path / "in" / name)
    (tmp_path / "in/notes.txt").write_text("notes")
    assert segment(run, [tmp_path / "in"], tmp_path / "out") == PredictSummary(written=1)


def test_predicting_into_the_source_folder_again_gives_the_same_files(run: TrainedRun, tmp_path: Path) -> None:
    image = draw(tmp_path / "a.jpg").read_bytes()
    segment(run, [tmp_path], tmp_path)
    first = files_below(tmp_path)
    assert segment(run, [tmp_path], tmp_path) == PredictSummary(written=1)
    assert files_below(tmp_path) == first == {"a.jpg", "index/a.png", "color/a.png", "overlay/a.png"}
    assert (tmp_path / "a.jpg").read_bytes() == image


@pytest.mark.parametrize("link", [False, True])
def test_an_input_is_never_written_over(run: TrainedRun, tmp_path: Path, link: bool) -> None:
    image = draw(tmp_path / "color/a.png")
    content, source = image.read_bytes(), image
    if link:
        source = tmp_path / "a.png"
        source.symlink_to(image)
    with pytest.raises(UserError, match=r"color/a\.png is an input and would be replaced"):
        segment(run, [source], tmp_path)
    assert image.read_bytes() == content
    assert not (tmp_path / "index").exists()


def test_a_link_out_of_the_output_folder_is_replaced_not_followed(run: TrainedRun, tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("precious")
    (tmp_path / "out/index").mkdir(parents=True)
    (tmp_path / "out/index/a.png").symlink_to(tmp_path / "precious.txt")
    segment(run, [draw(tmp_path / "a.jpg")], tmp_path / "out")
    assert (tmp_path / "precious.txt").read_text() == "precious"
    assert not (tmp_path / "out/index/a.png").is_symlink()


@pytest.mark.parametrize("source", ["../in/a.jpg", "../in/../in", "."])
def test_nothing_is_written_outside_the_output_folder(
    run: TrainedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    draw(tmp_path / "in/a.jpg"), draw(tmp_path / "here/a.jpg")
    monkeypatch.chdir(tmp_path / "here")
    segment(run, [Path(source)], Path("../out"))
    assert files_below(tmp_path) == {
        "in/a.jpg",
        "here/a.jpg",
        *(f"out/{kind}/a.png" for kind in ("index", "color", "overlay")),
    }


def test_a_domain_without_a_head_is_refused_with_those_there_are(run: TrainedRun, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r'no head for the domain "feilds"\. It has: fields, shapes\. Did you mean "fields"\?'
    ):
        segment(run, [draw(tmp_path / "a.jpg")], tmp_path / "out", domain="feilds")
    assert not (tmp_path / "out").exists()


def test_a_source_that_does_not_exist_is_refused_before_anything_is_written(run: TrainedRun, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone: there is no such image or folder"):
        segment(run, [draw(tmp_path / "a.jpg"), tmp_path / "gone"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_without_images_is_refused(run: TrainedRun, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty holds no images\. Images end in \.jpg"):
        segment(run, [tmp_path / "empty"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_output_folder_that_is_a_file_is_refused(run: TrainedRun, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(UserError, match=r"out is a file; --out names a folder"):
        segment(run, [draw(tmp_path / "a.jpg")], tmp_path / "out")


def test_progress_wraps_the_images_with_their_number(run: TrainedRun, tmp_path: Path) -> None:
    draw(tmp_path / "in/a.jpg"), draw(tmp_path / "in/b.jpg")
    seen = []

    def progress(items: Iterable[Any], total: int) -> Iterator[Any]:
        for item in items:
            yield item
            seen.append(total)

    predict(run, "fields", [tmp_path / "in"], tmp_path / "out", progress=progress)
    assert seen == [2, 2]
