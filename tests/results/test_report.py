"""The report is one page that opens without a network, compares runs, and shows data as text, never as markup."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from multidomain_cct.data.shards.reader import Shards
from multidomain_cct.data.shards.writer import ShardWriter
from multidomain_cct.errors import UserError
from multidomain_cct.results.report import PANEL_WIDTH, write_report
from multidomain_cct.training.runlog import read_metrics

VOID = {"meta", "img", "br", "path", "use", "rect", "circle"}


class Page(HTMLParser):
    """What a browser would see: text, elements that were opened, and whether they were closed in order."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(content)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.words.append(" ".join(data.split()))

    @property
    def text(self) -> str:
        return " ".join(word for word in self.words if word)

    def pictures(self) -> list[Image.Image]:
        sources = [attributes["src"] or "" for tag, attributes in self.elements if tag == "img"]
        return [Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))) for source in sources]


def read_page(path: Path) -> Page:
    page = Page(path.read_text(encoding="utf-8"))
    assert not page.open
    return page


@pytest.fixture(scope="module")
def supervised_run(tiny_run: Path, tiny_training: Callable[..., Path]) -> Path:
    """A run on the shards of tiny_run, without consistency."""
    return tiny_training(tiny_run.parents[1], "supervised", consistency={"weight": 0.0})


@pytest.fixture(scope="module")
def page(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Page:
    """The report of tiny_run."""
    return read_page(write_report([tiny_run], tmp_path_factory.mktemp("report") / "report.html", panels=2))


@pytest.fixture
def copied_run(tiny_run: Path, tmp_path: Path) -> Path:
    """A copy of tiny_run that may be changed."""
    return shutil.copytree(tiny_run, tmp_path / "runs" / "copy")


def test_scores_of_every_domain_are_those_of_the_log(page: Page, tiny_run: Path) -> None:
    last = [line for line in read_metrics(tiny_run / "metrics.jsonl") if "val/mean_miou" in line][-1]
    for key in (
        "val/fields/miou",
        "val/shapes/miou",
        "val/fields/pixel_accuracy",
        "val/mean_miou",
        "val/harmonic_miou",
        "val/shapes/iou/ground",
    ):
        assert f"{100 * last[key]:.1f}" in page.text
    assert "grass" in page.text
    assert "Tiny shapes" in page.text
    assert "val split at label resolution, whole image, mean over 3 of 3 classes" in page.text


def test_best_is_the_first_evaluation_with_the_highest_mean(copied_run: Path) -> None:
    means = {1: 0.3, 2: 0.5, 3: 0.5, 4: 0.4}
    lines = [
        {"step": step, "val/mean_miou": mean, "val/fields/miou": mean / 2, "val/fields/iou/sky": None}
        for step, mean in means.items()
    ]
    (copied_run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = read_page(write_report([copied_run], panels=1)).text
    assert "fields 20.0 step 4 25.0 step 2" in text
    assert "mean over domains 40.0 step 4 50.0 step 2" in text
    assert "sky absent" in text


def test_every_domain_has_its_curves(page: Page) -> None:
    assert (
        page.text.count("supervised loss") == page.text.count("consistency loss") == page.text.count("val mIoU, %") == 2
    )
    assert sum(tag == "svg" for tag, _ in page.elements) == 6


def test_pictures_show_image_truth_prediction_and_errors(page: Page) -> None:
    pictures = page.pictures()
    assert len(pictures) == 2 * 2 * 4  # domains, panels, pictures of a panel
    assert all(picture.size == (96, 72) for picture in pictures)
    assert page.text.count("prediction") == 4
    assert len(re.findall(r"[\d.]+ % wrong", page.text)) == 4
    assert "val_000" in page.text
    assert "val_002" in page.text
    assert "val_001" not in page.text


def test_large_pictures_are_made_small(
    tiny_training: Callable[..., Path], tiny_domain: Callable, tiny_shards: Callable, tmp_path: Path
) -> None:
    domain = tiny_domain("shapes")
    tiny_shards(tmp_path / "shards", domain, {"train": 3}, size=(96, 72))
    tiny_shards(tmp_path / "shards", domain, {"val": 1}, size=(1000, 500))
    run = tiny_training(tmp_path, "large", {"shapes": ("square", "ground")}, training={"steps": 1})
    assert {picture.size for picture in read_page(write_report([run])).pictures()} == {(PANEL_WIDTH, PANEL_WIDTH // 2)}


def test_how_the_run_was_made_is_on_the_page(page: Page) -> None:
    assert "multidomain_cct train tiny.yaml" in page.text
    assert re.search(r"torch \d+\.\d+", page.text)
    assert "labelled_batch: 2" in page.text
    assert re.search(r"2 of 2 [\d.]+ \d+ MiB [\d.]+ %", page.text)


def test_the_page_needs_no_network_and_runs_no_script(page: Page) -> None:
    for tag, attributes in page.elements:
        assert tag not in ("script", "link", "iframe", "object", "embed", "base")
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href", "xlink:href"):
            assert (attributes.get(name) or "#").startswith(("data:image/", "#"))
        assert "url(http" not in (attributes.get("style") or "")


def test_the_default_place_is_the_run_or_for_several_beside_them(copied_run: Path, tiny_run: Path) -> None:
    assert write_report([copied_run], panels=1) == copied_run / "report.html"
    assert write_report([copied_run, tiny_run], panels=1) == copied_run.parent / "report.html"


def test_a_folder_as_the_place_receives_report_html(tiny_run: Path, tmp_path: Path) -> None:
    assert write_report([tiny_run], tmp_path, panels=1) == tmp_path / "report.html"
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_several_runs_share_charts_bars_and_panels(tiny_run: Path, supervised_run: Path, tmp_path: Path) -> None:
    page = read_page(write_report([tiny_run, supervised_run, tiny_run], tmp_path / "two.html", panels=1))
    assert sum(tag == "svg" for tag, _ in page.elements) == 6
    assert sum(attributes.get("class") == "bar" for _, attributes in page.elements) == 2 * (3 + 2)
    assert len(page.pictures()) == 2 * (2 + 2 * 2)
    assert "tiny, supervised" in page.text


def test_runs_of_one_name_are_told_apart_by_their_folders(tiny_run: Path, tmp_path: Path) -> None:
    other = shutil.copytree(tiny_run, tmp_path / tiny_run.name)
    text = read_page(write_report([tiny_run, other], tmp_path / "two.html", panels=1)).text
    assert f"{tiny_run}, {other}" in text


def test_runs_of_different_domains_and_classes_share_a_page(
    tiny_run: Path, tiny_training: Callable[..., Path], tmp_path: Path
) -> None:
    other = tiny_training(
        tmp_path, "other", {"fields": ("grass", "sea", "barn"), "alone": ("one", "two")}, training={"steps": 1}
    )
    text = read_page(write_report([tiny_run, other], tmp_path / "two.html", panels=1)).text
    assert "3 domains: fields, shapes, alone" in text
    assert "No predictions of other: its fields has other classes." in text
    assert "sea" in text


def test_a_run_that_was_not_evaluated_yet_says_so(copied_run: Path) -> None:
    lines = [
        line for line in (copied_run / "metrics.jsonl").read_text().splitlines(keepends=True) if '"val/' not in line
    ]
    (copied_run / "metrics.jsonl").write_text("".join(lines))
    text = read_page(write_report([copied_run], panels=1)).text
    assert "copy has no evaluation of fields yet." in text
    assert "supervised loss" in text
    assert "val mIoU, %" not in text


def test_a_run_that_died_at_once_has_a_page(copied_run: Path) -> None:
    shutil.rmtree(copied_run / "checkpoints")
    (copied_run / "metrics.jsonl").unlink()
    (copied_run / "env.json").write_text("")
    text = read_page(write_report([copied_run], panels=1)).text
    assert "No step has been logged yet." in text
    assert "has no checkpoints; train it first." in text
    assert "The command was not recorded." in text


def test_values_that_were_not_finite_leave_a_gap(copied_run: Path) -> None:
    with (copied_run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 3, "train/fields/supervised": None}) + "\n")
    assert "supervised loss" in read_page(write_report([copied_run], panels=1)).text


def test_without_shards_the_page_says_so_and_has_no_pictures(copied_run: Path, tiny_run: Path) -> None:
    recipe = copied_run / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace(str(tiny_run.parents[1] / "shards"), "gone"))
    page = read_page(write_report([copied_run]))
    assert "No pictures from copy: gone/fields has no val shards." in page.text
    assert not page.pictures()


def test_data_is_shown_as_text(
    tiny_training: Callable[..., Path], tiny_domain: Callable, tiny_shards: Callable, tmp_path: Path
) -> None:
    script = "<script>alert(1)<"
    classes = {"fields": (script + "/script>", "$x^", "bell\x07</td>")}
    folder = tiny_shards(tmp_path / "shards", tiny_domain("fields", classes["fields"]), {"train": 3})
    record = Shards.open(folder, "train").read(0)
    with ShardWriter(folder, "val") as writer:
        writer.write("<script>key", image=record.image, mask=record.mask, meta=b"{}")
    run = tiny_training(tmp_path, "plain", classes, training={"steps": 1}).rename(tmp_path / "runs" / f"{script}b>")
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 2, "train/fields/<i>\x1b[31m\n": 1.0}) + "\n")
    environment = json.loads((run / "env.json").read_text())
    (run / "env.json").write_text(
        json.dumps(environment | {"command": "<script>x", "<script>k": {"<script>n": "<script>v"}})
    )
    path = write_report([run])
    page = read_page(path)
    # The page's own <i> are coloured dots and have a class.
    assert not any(tag == "script" or (tag == "i" and "class" not in attributes) for tag, attributes in page.elements)
    named = ("<script>alert(1)</script>", "$x^", "bell\\x07</td>", "<script>key", "<script>alert(1)<b>")
    for text in (*named, "<i>\\x1b[31m\\n loss", "<script>x", "<script>k", "<script>v"):
        assert text in page.text
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f]", path.read_text(encoding="utf-8"))


def test_a_folder_that_is_not_a_run_is_refused_before_anything_is_written(tiny_run: Path, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    with pytest.raises(UserError, match=r"photos: this is not a run's folder \(it has no recipe\.yaml\)\."):
        write_report([tiny_run, tmp_path / "photos"], tmp_path / "out.html")
    assert not (tmp_path / "out.html").exists()


def test_long_curves_are_thinned(copied_run: Path) -> None:
    lines = [
        {"step": step, "train/fields/supervised": 1 / step, "train/shapes/supervised": 1.0} for step in range(1, 20001)
    ]
    (copied_run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert write_report([copied_run], panels=1).stat().st_size < 400_000
