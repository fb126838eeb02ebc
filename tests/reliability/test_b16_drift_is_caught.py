import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from processes import start

from multidomain_cct.__main__ import main
from multidomain_cct.data.shards.reader import Record, Shards
from multidomain_cct.data.shards.writer import ShardWriter

Train = Callable[..., str]


@pytest.fixture(scope="module")
def trained(tiny_training: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The workspace of a run of two steps: runs/tiny, shards and domains."""
    return tiny_training(tmp_path_factory.mktemp("trained")).parents[1]


@pytest.fixture
def workspace(trained: Path, tmp_path: Path) -> Path:
    """A copy of it, with its recipe beside it."""
    copy = shutil.copytree(trained, tmp_path / "workspace")
    text = (copy / "runs" / "tiny" / "recipe.yaml").read_text().replace(str(trained), str(copy))
    for path in (copy / "tiny.yaml", copy / "runs" / "tiny" / "recipe.yaml"):
        path.write_text(text)
    return copy


def go_on(workspace: Path, capsys: pytest.CaptureFixture[str], *overrides: str) -> tuple[int, str]:
    capsys.readouterr()
    code = main(
        [
            "train",
            str(workspace / "tiny.yaml"),
            "--domains",
            str(workspace / "domains"),
            *(overrides or ("resume=auto",)),
        ]
    )
    printed = capsys.readouterr()
    return code, printed.err if code else printed.out


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


SETTINGS = {
    "seed=1": "seed: 0 -> 1",
    "data.labelled_batch=1": "data.labelled_batch: 2 -> 1",
    "domains.fields.labelled=3": "domains.fields.labelled: 2 -> 3",
    "training.steps=3": "training.steps: 2 -> 3",
}


@pytest.mark.parametrize("override", SETTINGS)
def test_other_settings_are_refused_with_old_and_new(
    workspace: Path, capsys: pytest.CaptureFixture[str], override: str
) -> None:
    before = contents(workspace / "runs")
    code, line = go_on(workspace, capsys, "resume=auto", override)
    assert code == 2
    assert line.count("error: ") == 1
    assert SETTINGS[override] in line
    assert "resume=force" in line
    assert contents(workspace / "runs") == before


def without_shapes(workspace: Path) -> None:
    path = workspace / "tiny.yaml"
    text = path.read_text()
    start, end = text.index("  shapes:\n"), text.index("data:\n")
    path.write_text(text[:start] + text[end:])


def another_class(workspace: Path) -> None:
    path = workspace / "domains" / "fields.yaml"
    path.write_text(path.read_text().replace("name: barn", "name: shed"))


def changed_shard(workspace: Path, *, split: str = "train", source: str = "val") -> None:
    for path in list((workspace / "shards" / "shapes").glob(f"{split}-*")):
        path.unlink()
    for path in list((workspace / "shards" / "shapes").glob(f"{source}-*")):
        shutil.copy(path, path.with_name(path.name.replace(source, split)))


def written_again(workspace: Path, change: Callable[[list[Record]], list[tuple[str, Record]]]) -> None:
    """The train shards of shapes with other records under other keys."""
    folder = workspace / "shards" / "shapes"
    shards = Shards.open(folder, "train")
    rows = change([shards.read(number) for number in range(len(shards))])
    for path in list(folder.glob("train-*")):
        path.unlink()
    with ShardWriter(folder, "train") as writer:
        for key, record in rows:
            writer.write(key, image=record.image, mask=record.mask, meta=b"{}")


def added_images(workspace: Path) -> None:
    """The same images once more, under names that are new."""
    written_again(
        workspace, lambda records: [(again + record.key, record) for again in ("", "more_") for record in records]
    )


def removed_images(workspace: Path) -> None:
    written_again(workspace, lambda records: [(record.key, record) for record in records[:-1]])


CHANGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "domain removed": (without_shapes, "domains.shapes.labelled: 2 -> None"),
    "class renamed": (another_class, "fields.classes[2].name: barn -> shed"),
    "shard changed": (changed_shard, "was trained on other data in shapes/train: "),
    "images added": (added_images, "was trained on other data in shapes/train: "),
    "images removed": (removed_images, "was trained on other data in shapes/train: "),
}


@pytest.mark.parametrize("change", CHANGES)
def test_other_domains_classes_and_shards_are_refused_with_old_and_new(
    workspace: Path, capsys: pytest.CaptureFixture[str], change: str
) -> None:
    alter, message = CHANGES[change]
    alter(workspace)
    before = contents(workspace / "runs")
    code, line = go_on(workspace, capsys)
    assert code == 2, line
    assert line.count("error: ") == 1, line
    assert message in line, line
    assert " -> " in line, line
    assert "resume=force" in line, line
    assert contents(workspace / "runs") == before


def test_a_forced_run_goes_on_says_so_and_records_what_had_changed(
    workspace: Path, capsys: pytest.CaptureFixture[str], figure: Callable[[str, str], None]
) -> None:
    changed_shard(workspace)
    code, printed = go_on(workspace, capsys, "resume=force", "training.steps=4")
    assert code == 0
    assert "going on from step 2" in printed
    assert "resume=force goes on although training.steps: 2 -> 4" in printed
    assert "resume=force goes on although shapes/train: " in printed
    (again,) = json.loads((workspace / "runs" / "tiny" / "env.json").read_text())["resumed"]
    assert again["forced"][0] == "training.steps: 2 -> 4"
    assert any(line.startswith("shapes/train: ") for line in again["forced"])
    # What was forced once is the run's recipe and data from then on.
    code, printed = go_on(workspace, capsys, "resume=auto", "training.steps=4")
    assert code == 0
    assert "although" not in printed
    figure(
        "B16",
        f"{len(SETTINGS) + len(CHANGES)} kinds of drift refused with old -> new; resume=force goes on and records it",
    )


def test_a_forced_run_still_cannot_load_weights_that_do_not_fit(
    workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, line = go_on(workspace, capsys, "resume=force", "encoder.width=64")
    assert code == 2
    assert "does not fit the model" in line
    assert line.count("error: ") == 1


def test_ranks_that_find_different_checkpoints_do_not_start(command: Callable[..., list[str]], tmp_path: Path) -> None:
    """As on nodes whose `runs` is not one folder."""
    from processes import Plan, start_ranks

    words = command("run", "training.steps=2", "training.save_every=1", "resume=auto")
    first = start(words, tmp_path / "first.txt")
    assert first.wait() == 0, first.text
    elsewhere = shutil.copytree(tmp_path / "runs", tmp_path / "elsewhere")
    shutil.rmtree(elsewhere / "run" / "checkpoints" / "step-00000002")
    ranks = start_ranks(words, tmp_path / "out.txt", [Plan(), Plan(more=(f"runs={elsewhere}",))])
    assert [rank.wait() for rank in ranks] == [2, 2], ranks[0].text + ranks[1].text
    (line,) = [line for rank in ranks for line in rank.errors]
    assert "is not the same for all processes: rank 0 finds step-00000002, rank 1 finds step-00000001" in line
