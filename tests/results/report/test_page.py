"""The report is one page that opens without a network, compares runs, and shows data as text, never as markup."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from multidomain_cct.data.shards.reader import Shards
from multidomain_cct.data.shards.writer import ShardWriter
from multidomain_cct.errors import UserError
from multidomain_cct.results.report.page import write_report
from multidomain_cct.results.report.panels import PANEL_WIDTH
from multidomain_cct.results.trained_run import TrainedRun
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
    assert re.search(r"sky [\d.]+ % of val, [\d.]+ % of labelled absent", text)


def test_every_domain_has_its_curves(page: Page) -> None:
    assert (
        page.text.count("supervised loss") == page.text.count("consistency loss") == page.text.count("val mIoU, %") == 2
    )
    assert sum(tag == "svg" for tag, _ in page.elements) == 6


def test_pictures_show_image_truth_prediction_overlay_and_errors(page: Page) -> None:
    shown = page.text.count("prediction overlay")
    assert 4 <= shown <= 6  # two domains, of whose three images two are spread evenly, one is the worst, one the best
    pictures = page.pictures()
    assert len(pictures) == shown * 5
    assert all(picture.size == (96, 72) for picture in pictures)
    assert len(re.findall(r"[\d.]+ % wrong", page.text)) == shown
    assert "val_000" in page.text
    assert "val_002" in page.text


def test_the_worst_and_the_best_images_are_shown_besides_evenly_spread_ones(page: Page) -> None:
    for section in page.text.split("Pictures")[1:]:
        worst, best, *even = (float(share) for share in re.findall(r"([\d.]+) % wrong", section))
        assert worst >= max(best, *even, 0)
        assert best <= min(worst, *even, 100)
        assert re.search(r"Worst of 3 .* Best of 3 ", section)


def test_images_have_the_names_that_a_person_gave_them(copied_run: Path, tiny_run: Path, tmp_path: Path) -> None:
    shards = shutil.copytree(tiny_run.parents[1] / "shards", tmp_path / "shards")
    for name in ("fields", "shapes"):
        record = Shards.open(shards / name, "val").read(0)
        with ShardWriter(shards / name, "val") as writer:
            writer.write("street=2Fk=C3=B6ln=2001", image=record.image, mask=record.mask, meta=b"{}")
    recipe = copied_run / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace(str(tiny_run.parents[1] / "shards"), str(shards)))
    assert "street/köln 01" in read_page(write_report([copied_run])).text


def test_predictions_are_shrunk_without_classes_between_two_others(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("multidomain_cct.results.report.panels.PANEL_WIDTH", 41)
    ids = np.random.default_rng(0).choice(np.array([0, 2], dtype=np.uint8), (72, 96))
    predicted = TrainedRun.load(tiny_run).predict(np.zeros((72, 96, 3), dtype=np.uint8), "fields")
    monkeypatch.setattr(TrainedRun, "predict", lambda run, image, name: replace(predicted, ids=ids))
    panels = read_page(write_report([tiny_run], tmp_path / "page.html")).pictures()
    predictions = [picture for picture in panels if picture.mode == "P" and picture.size == (41, 31)]
    assert {tuple(np.unique(np.asarray(picture))) for picture in predictions[1::2]} == {(0, 2)}


def test_truths_are_shrunk_without_classes_between_two_others(
    tiny_training: Callable[..., Path],
    tiny_domain: Callable,
    tiny_shards: Callable,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("multidomain_cct.results.report.panels.PANEL_WIDTH", 41)
    classes = ("ground", "tree", "roof")
    folder = tiny_shards(tmp_path / "shards", tiny_domain("fields", classes), {"train": 3})
    ids, mask = np.random.default_rng(0).choice(np.array([0, 2], dtype=np.uint8), (72, 96)), io.BytesIO()
    Image.fromarray(ids).save(mask, "PNG")
    image = Shards.open(folder, "train").read(0).image
    with ShardWriter(folder, "val") as writer:
        writer.write("key", image=image, mask=mask.getvalue(), meta=b"{}")
    run = tiny_training(tmp_path, "shrunk", {"fields": classes}, training={"steps": 1})
    panels = read_page(write_report([run])).pictures()
    truth, _ = [picture for picture in panels if picture.mode == "P" and picture.size == (41, 31)]
    assert tuple(np.unique(np.asarray(truth))) == (0, 2)


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
    assert re.search(r"2 of 2 0:\d\d:\d\d [\d.]+ \d+ MiB [\d.]+ % \w+ CPU", page.text)


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
    assert sum((attributes.get("class") or "").split()[:1] == ["bar"] for _, attributes in page.elements) == 2 * (3 + 2)
    assert len(page.pictures()) == page.text.count("truth") * (2 + 2 * 3)
    assert "tiny, supervised" in page.text


def test_several_runs_are_compared_with_the_first(copied_run: Path, tiny_run: Path, tmp_path: Path) -> None:
    lines = [json.loads(line) for line in (copied_run / "metrics.jsonl").read_text().splitlines()]
    first = next(line for line in reversed(lines) if "val/mean_miou" in line)
    changed = first | {
        "val/fields/miou": first["val/fields/miou"] + 0.0525,
        "val/shapes/miou": first["val/shapes/miou"] - 0.01,
    }
    changed |= {"val/fields/iou/sky": 0.0, "val/fields/iou/grass": first["val/fields/iou/grass"] + 0.5}
    (copied_run / "metrics.jsonl").write_text(json.dumps(changed) + "\n")
    page = read_page(write_report([tiny_run, copied_run], tmp_path / "two.html", panels=1))
    scores = page.text.split("Curves")[0]
    for difference in ("+5.2", "−1.0", "+0.0"):
        assert difference in scores
    assert "+50.0" in page.text
    assert re.search(r"At 0: .*sky", page.text)


def test_the_teacher_of_each_class_is_shown(tiny_run: Path, tiny_training: Callable[..., Path], tmp_path: Path) -> None:
    run = tiny_training(tiny_run.parents[1], "strong", method="cct_strong")
    last = [line for line in read_metrics(run / "metrics.jsonl") if "val/mean_miou" in line][-1]
    text = read_page(write_report([run], tmp_path / "report.html", panels=1)).text
    start = text.index("Pseudo-labels")
    table = text[start : text.index("Pictures", start)]
    for kind in ("pseudo_labels", "kept"):
        assert f"{100 * last[f'train/fields/{kind}/grass']:.1f}" in table
    assert "EMA − student" in table
    # They are no losses: no curve is drawn of them.
    assert "strong loss" in text
    assert "pseudo_labels/" not in text.replace("pseudo_labels:", "")
    assert f"student: mIoU {100 * last['val/fields/student/miou']:.1f}" in text


def test_a_run_without_a_teacher_has_no_pseudo_labels(page: Page) -> None:
    assert "Pseudo-labels" not in page.text


def test_numbers_of_images_are_numbers(page: Page, copied_run: Path) -> None:
    assert re.search(r"fields [\d.]+ step \d [\d.]+ step \d [\d.]+ 2 4 3 ", page.text)
    assert not re.search(r"\ball\b", page.text.split("Recipe, resolved")[0].replace("small", ""))
    environment = json.loads((copied_run / "env.json").read_text())
    del environment["images"]
    (copied_run / "env.json").write_text(json.dumps(environment))
    assert re.search(r"fields [\d.]+ step \d [\d.]+ step \d [\d.]+ 2 – 3 ", read_page(write_report([copied_run])).text)


def test_classes_have_their_share_of_the_pixels(page: Page) -> None:
    shares = re.findall(r"([\d.]+) % of val, ([\d.]+) % of labelled", page.text)
    assert len(shares) == 3 + 2
    for column in zip(*shares, strict=True):
        assert abs(sum(map(float, column)) - 200) < 0.4


def test_no_two_entries_of_the_legend_look_the_same(copied_run: Path) -> None:
    path = copied_run / "domains" / "fields.yaml"
    domain = yaml.safe_load(path.read_text())
    for row in domain["classes"]:
        row["color"] = [70, 70, 70]
    path.write_text(yaml.safe_dump(domain))
    text = write_report([copied_run], panels=1).read_text()
    section = text[text.index('<section id="fields">') : text.index('<section id="shapes">')]
    swatches = re.findall(r'class="swatch"? ?([^>]*)>', section)
    assert len(swatches) == len(set(swatches)) == 3 + 1


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
    classes = {"fields": (script + "/script>", "$x^", "bell</td>")}
    folder = tiny_shards(tmp_path / "shards", tiny_domain("fields", classes["fields"]), {"train": 3})
    record = Shards.open(folder, "train").read(0)
    with ShardWriter(folder, "val") as writer:
        writer.write("<script>key", image=record.image, mask=record.mask, meta=b"{}")
    run = tiny_training(tmp_path, "plain", classes, training={"steps": 1}).rename(tmp_path / "runs" / f"{script}b>")
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 2, "train/fields/<i>\x1b[31m\n": 1.0}) + "\n")
    path = run / "domains" / "fields.yaml"
    path.write_text(path.read_text().replace("Tiny fields", "<script>title & <b>more"))
    environment = json.loads((run / "env.json").read_text())
    (run / "env.json").write_text(
        json.dumps(environment | {"command": "<script>x", "<script>k": {"<script>n": "<script>v"}})
    )
    path = write_report([run])
    page = read_page(path)
    # The page's own <i> are coloured dots and have a class.
    assert not any(tag == "script" or (tag == "i" and "class" not in attributes) for tag, attributes in page.elements)
    named = ("<script>alert(1)</script>", "$x^", "bell</td>", "<script>key", "<script>alert(1)<b>")
    for text in (*named, "<i>\\x1b[31m\\n loss", "<script>title & <b>more", "<script>x", "<script>k", "<script>v"):
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
