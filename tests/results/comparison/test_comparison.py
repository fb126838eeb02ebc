"""The command `compare`: experiments on real tiny trainings, and the arithmetic of their table against numpy."""

import fcntl
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import yaml

from multidomain_cct.__main__ import main
from multidomain_cct.results.comparison.experiment import (
    Experiment,
    PlannedRun,
    Row,
    RunScores,
    finished_scores,
    planned_runs,
    read_experiment,
)
from multidomain_cct.results.comparison.tables import Comparison, write_comparison
from multidomain_cct.training.recipe import Recipe

ROOT = Path(__file__).parents[3]
NO_CONSISTENCY = {"set": ["consistency.weight=0"]}


@pytest.fixture
def bench(tiny_recipe: Callable[..., Recipe], two_domains: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """A function (rows, keys of the experiment) that writes the tiny recipe and the experiment and returns the words of
    the command.
    """
    (tmp_path / "tiny.yaml").write_text(
        tiny_recipe(training__save_every=1, training__keep=9).to_yaml(), encoding="utf-8"
    )
    (tmp_path / "plans").mkdir()

    def write(rows: object, **keys: object) -> list[str]:
        plain = {"recipe": "../tiny.yaml", "runs": str(tmp_path / "runs"), "rows": rows} | keys
        path = tmp_path / "plans" / "rivals.yaml"
        path.write_text(yaml.safe_dump(plain, sort_keys=False), encoding="utf-8")
        return ["compare", str(path), "--domains", str(two_domains / "domains"), "--out", str(tmp_path / "table.md")]

    return write


def refusal(capsys: pytest.CaptureFixture[str], words: Sequence[str]) -> str:
    """The one line that the command prints when it exits with 2."""
    assert main(words) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1
    assert not printed.out
    return printed.err


def times(folder: Path) -> dict[str, int]:
    """When each file under a folder was last written."""
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_an_experiment_is_trained_a_failed_run_named_and_finished_runs_skipped(
    bench: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = {"plain": NO_CONSISTENCY, "broken": {"set": ["domains.fields.labelled=99"]}, "cct": {}}
    assert main([*bench(rows, title="Rivals [red]", baseline="plain"), "--jobs", "2"]) == 1
    printed = capsys.readouterr()
    assert "error: broken-seed0 failed: " in printed.err
    assert "asks for 99 labelled images; there are 10" in printed.err
    assert "broken-seed0.log" in printed.err
    assert "Rivals [red]" in printed.out
    assert "cct-seed0  fields " in printed.out
    text = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert text.startswith("# Rivals [red]\n\n    python -m multidomain_cct compare ")
    assert "--jobs 2" in text
    assert "**Not complete**: 2 of 3 runs are finished; missing: broken-seed0." in text
    assert "- broken-seed0 failed: " in text
    runs = tmp_path / "runs" / "rivals"
    found = {each["row"]: each for each in json.loads((tmp_path / "table.json").read_text(encoding="utf-8"))["runs"]}
    line = json.loads((runs / "cct-seed0" / "metrics.jsonl").read_text().splitlines()[-1])
    assert found["cct"]["miou"] == {"fields": line["val/fields/miou"], "shapes": line["val/shapes/miou"]}
    assert found["cct"]["step"] == 2
    assert found["cct"]["iou"]["fields"]["barn"] == line["val/fields/iou/barn"]
    assert found["plain"]["overrides"][0] == "consistency.weight=0"
    assert found["cct"]["environment"]["device"] in text
    assert found["cct"]["peak_mib"] > 0
    assert 0 < found["cct"]["minutes"] < 10
    assert f"| plain | {100 * found['plain']['miou']['fields']:.1f} (1) | " in text

    before = times(runs)
    assert main(bench({"plain": NO_CONSISTENCY, "cct": {}})) == 0
    assert times(runs) == before
    printed = capsys.readouterr()
    assert printed.out.count("(was finished)") == 2
    assert not printed.err
    assert "Not complete" not in (tmp_path / "table.md").read_text(encoding="utf-8")

    assert main([*bench({"plain": {}, "cct": {}, "new": {}}), "--dry-run"]) == 0
    printed = capsys.readouterr()
    assert "plain-seed0 (will fail: " in printed.out
    assert "holds a run of another recipe, consistency.weight: 0" in printed.out
    assert "cct-seed0 (finished): " in printed.out
    assert "new-seed0 (new): " in printed.out
    assert "seed=0 name=new-seed0" in printed.out
    assert times(runs) == before
    words = bench({"cct": {}}, common=["evaluation.flip=true"])
    assert "cct-seed0 was scored with other evaluation settings" in refusal(capsys, words)


def test_a_run_that_was_stopped_goes_on(
    bench: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = bench({"cct": {}}, common=["training.steps=500", "training.keep=1"])
    folder = tmp_path / "runs" / "rivals" / "cct-seed0"
    ended = threading.Event()

    def interrupt_at_the_first_checkpoint() -> None:
        while not ended.is_set() and not list(folder.glob("checkpoints/step-*")):
            time.sleep(0.05)
        if not ended.is_set():
            os.kill(os.getpid(), signal.SIGINT)

    # A shell starts what it puts into the background without it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    watcher = threading.Thread(target=interrupt_at_the_first_checkpoint)
    watcher.start()
    try:
        assert main(words) == 130
    finally:
        ended.set()
        watcher.join()
        signal.signal(signal.SIGINT, before)
    assert (
        capsys.readouterr().err
        == "error: stopped with 0 of 1 runs finished. The same command goes on from the last checkpoints.\n"
    )
    log = folder.with_name("cct-seed0.log")
    with log.open("ab") as file:
        # Nobody holds the log any more: the training has ended.
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        begun = file.tell()
        assert main(words) == 1
    assert "is being written by a training that is still running" in capsys.readouterr().err
    assert log.stat().st_size == begun

    reached = max(int(path.name.removeprefix("step-")) for path in folder.glob("checkpoints/step-*"))
    assert main([*words, "--dry-run"]) == 0
    assert f"cct-seed0 (goes on from step-{reached:08d})" in capsys.readouterr().out
    # The interrupted run with its steps made fewer, so that the test need not train the rest.
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        recipe.read_text(encoding="utf-8").replace("steps: 500", f"steps: {reached + 1}"), encoding="utf-8"
    )
    assert main(bench({"cct": {}}, common=[f"training.steps={reached + 1}", "training.keep=1"])) == 0
    assert f"step {reached + 1}/{reached + 1}" in (later := log.read_bytes()[begun:].decode())
    assert f"step {reached}/" not in later
    (found,) = json.loads((tmp_path / "table.json").read_text(encoding="utf-8"))["runs"]
    assert found["step"] == reached + 1
    assert found["minutes"] is None


@pytest.fixture
def scored(tiny_recipe: Callable[..., Recipe]) -> Callable[..., Comparison]:
    """A function (mIoU by row, seed and domain; keys of the experiment) that makes the comparison of such runs."""

    def compare(
        values: dict[str, np.ndarray],
        domains: Sequence[str] = ("fields", "shapes"),
        own: dict[str, str] | None = None,
        **keys: str,
    ) -> Comparison:
        rows = {name: Row(baseline=(own or {}).get(name, "")) for name in values}
        experiment = Experiment(rows, title="Test", **keys)  # type: ignore[arg-type]
        runs, scores = [], []
        for row, seeds in values.items():
            for seed, numbers in enumerate(seeds):
                known = [
                    (name, float(number)) for name, number in zip(domains, numbers, strict=True) if not np.isnan(number)
                ]
                recipe = tiny_recipe(name=f"{row}-seed{seed}", domains={name: {} for name, _ in known})
                runs.append(PlannedRun(row, seed, Path("tiny.yaml"), (), recipe))
                scores.append(
                    RunScores(row, seed, 2, dict(known), {}, (), "folder", {"device": "CPU"}, 100.0 + seed, 3.0)
                )
        return Comparison(experiment, runs, scores)

    return compare


def test_the_table_agrees_with_numpy(scored: Callable[..., Comparison], tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    values = {
        "low": rng.uniform(0.2, 0.3, (3, 2)),
        "cct": rng.uniform(0.4, 0.5, (3, 2)),
        "all": rng.uniform(0.6, 0.7, (1, 2)),
    }
    comparison = scored(values, baseline="low", ceiling="all")
    shares = (values["cct"].mean(0) - values["low"].mean(0)) / (values["all"].mean(0) - values["low"].mean(0))
    for place, column in enumerate(("fields", "shapes")):
        spread = comparison.spread("cct", column)
        assert spread is not None
        assert spread.count == 3
        assert spread.mean == pytest.approx(values["cct"][:, place].mean())
        assert spread.std == pytest.approx(values["cct"][:, place].std(ddof=1))
        assert comparison.gain("cct", column) == pytest.approx(
            values["cct"][:, place].mean() - values["low"][:, place].mean()
        )
        assert comparison.gap_share("cct", column) == pytest.approx(shares[place])
    spread = comparison.spread("cct", "mean")
    assert spread is not None
    assert spread.mean == pytest.approx(values["cct"].mean())
    assert spread.std == pytest.approx(values["cct"].mean(1).std(ddof=1))
    assert comparison.gap_share("cct", "mean") == pytest.approx(shares.mean())
    assert comparison.gap_share("low", "mean") == 0
    assert comparison.gap_share("all", "mean") == 1

    write_comparison(comparison, tmp_path / "new" / "table.md", command="the command", date="2026-01-02")
    text = (tmp_path / "new" / "table.md").read_text(encoding="utf-8")
    mean, std = 100 * values["cct"].mean(0), 100 * values["cct"].std(0, ddof=1)
    assert f"| cct | {mean[0]:.1f} ± {std[0]:.1f} (3) | {mean[1]:.1f} ± {std[1]:.1f} (3) | " in text
    assert f"| {100 * values['all'].mean():.1f} (1) | 100 | 3.0 |" in text
    assert "| 101 | 3.0 |" in text
    assert (
        f"| {100 * (values['cct'].mean() - values['low'].mean()):+.1f} | {100 * shares[0]:.0f} | "
        f"{100 * shares[1]:.0f} | {100 * shares.mean():.0f} |" in text
    )
    assert "    the command\n\n2026-01-02. CPU, ? thread(s).\n" in text
    assert json.loads((tmp_path / "new" / "table.json").read_text(encoding="utf-8"))["rows"]["cct"]["gap_share"][
        "mean"
    ] == pytest.approx(shares.mean())


def test_there_is_no_share_of_a_gap_that_is_not_there(scored: Callable[..., Comparison]) -> None:
    comparison = scored(
        {"low": np.array([[0.5, 0.2]]), "cct": np.array([[0.6, 0.3]]), "all": np.array([[0.4, 0.4]])},
        baseline="low",
        ceiling="all",
    )
    assert comparison.gap_share("cct", "fields") is None
    assert comparison.gap_share("cct", "mean") is None
    assert comparison.gap_share("cct", "shapes") == pytest.approx(0.5)
    assert comparison.tables()[1][2] == ["cct", "+10.0", "+10.0", "+10.0", "n/a", "50", "n/a"]


def test_a_row_may_be_measured_against_a_row_of_its_own(scored: Callable[..., Comparison]) -> None:
    rows = {
        "ten": [[0.2, 0.1]],
        "cct_ten": [[0.3, 0.2]],
        "fifty": [[0.4, 0.3]],
        "cct_fifty": [[0.5, 0.5]],
        "all": [[0.6, 0.7]],
    }
    comparison = scored(
        {name: np.array(values) for name, values in rows.items()},
        own={"cct_fifty": "fifty"},
        baseline="ten",
        ceiling="all",
    )
    assert [comparison.gain(name, "fields") for name in ("cct_ten", "cct_fifty", "fifty")] == pytest.approx(
        [0.1, 0.1, 0.2]
    )
    assert comparison.gap_share("cct_ten", "shapes") == pytest.approx(1 / 6)
    assert comparison.gap_share("cct_fifty", "shapes") == pytest.approx(0.5)


def test_a_row_of_fewer_domains_has_no_mean(scored: Callable[..., Comparison]) -> None:
    comparison = scored({"both": np.array([[0.5, 0.2]]), "one": np.array([[0.6, np.nan]])}, baseline="both")
    assert comparison.spread("one", "mean") is None
    assert comparison.gain("one", "mean") is None
    assert comparison.tables()[0][2] == ["one", "60.0 (1)", "n/a", "n/a", "100", "3.0"]
    alone = scored({"one": np.array([[0.6]])}, domains=["fields"])
    assert alone.columns == ["fields"]
    assert len(alone.tables()) == 1


def test_every_row_is_trained_once_before_any_row_is_trained_twice(bench: Callable[..., list[str]]) -> None:
    path = Path(bench({"low": {"seeds": [7]}, "cct": {}, "high": {"seeds": [4, 3, 2]}}, seeds=[0, 1])[1])
    runs = planned_runs(path, read_experiment(path))
    assert [run.recipe.name for run in runs] == [
        "low-seed7",
        "cct-seed0",
        "high-seed4",
        "cct-seed1",
        "high-seed3",
        "high-seed2",
    ]
    assert [run.recipe.seed for run in runs] == [7, 0, 4, 1, 3, 2]
    assert not any(finished_scores(run) for run in runs)
    assert all(run.recipe.folder.parent.name == "rivals" and run.recipe.resume == "auto" for run in runs)


def test_a_row_has_its_own_recipe_and_overrides_over_the_common_ones(
    bench: Callable[..., list[str]], tmp_path: Path
) -> None:
    (tmp_path / "plans" / "other.yaml").write_text(
        (tmp_path / "tiny.yaml").read_text(encoding="utf-8").replace("bilinear", "pixelshuffle"), encoding="utf-8"
    )
    rows = {"own": {"recipe": "other.yaml", "set": ["training.steps=5"]}, "plain": None}
    path = Path(bench(rows, common=["training.steps=4", "optimiser.lr=0.5"])[1])
    own, plain = planned_runs(path, read_experiment(path))
    assert (own.recipe.decoder, own.recipe.training.steps, own.recipe.optimiser.lr) == ("pixelshuffle", 5, 0.5)
    assert (plain.recipe.decoder, plain.recipe.training.steps, plain.recipe.optimiser.lr) == ("bilinear", 4, 0.5)
    path = Path(bench({"demo": {}}, recipe="recipes/demo.yaml", runs="1.5")[1])
    (demo,) = planned_runs(path, read_experiment(path))
    assert "toy_street" in demo.recipe.domains
    assert demo.recipe.folder == Path("1.5/rivals/demo-seed0")


@pytest.mark.parametrize(
    ("rows", "keys", "words"),
    [
        ({"cct": {}}, {"seedz": [0]}, 'unknown key "seedz". Allowed at the top: rows, title, recipe, seeds, common, '),
        ({"cct": {}}, {"seedz": [0]}, 'Did you mean "seeds"?'),
        (
            {"cct": {"sets": []}},
            {},
            'unknown key "rows.cct.sets". Allowed in rows.cct: recipe, set, seeds, baseline. Did you mean "set"?',
        ),
        ({"cct": {}}, {"baseline": "ctc"}, "baseline is 'ctc'; it is one of cct. Did you mean \"cct\"?"),
        ({"cct": {}}, {"baseline": "cct", "ceiling": "all"}, "ceiling is 'all'; it is one of cct."),
        ({"cct": {"baseline": "cc"}}, {}, "rows.cct.baseline is 'cc'; it is one of cct. Did you mean"),
        ({"cct": {}}, {"ceiling": "cct"}, "ceiling is 'cct' and baseline is missing; the gap is between the two."),
        (
            {"cct": {}},
            {"baseline": "cct", "ceiling": "cct"},
            "baseline and ceiling are both 'cct'; the gap is between two rows.",
        ),
        ({}, {}, "rows is empty; name at least one, for example `rows: {cct: {}}`."),
        ([], {"title": "no rows"}, "rows is empty; name at least one"),
        (["cct"], {}, "rows is ['cct']; it is a mapping of names to rows"),
        ({"c c t": {}}, {}, "rows has the name 'c c t'; it holds letters, digits, _ and -, and starts with no -."),
        (
            {"cct": ["method=cct"]},
            {},
            "rows.cct is ['method=cct']; it is a section with the keys recipe, set, seeds, baseline.",
        ),
        ({"cct": {}}, {"seeds": [0, 1, 0]}, "seeds names 0 twice; keep one."),
        (
            {"cct": {"seeds": []}},
            {},
            "rows.cct.seeds is []; it is a list of whole numbers from 0 up, for example [0, 1, 2].",
        ),
        ({"cct": {}}, {"seeds": [True]}, "seeds is [True]; it is a list of whole numbers from 0 up"),
        ({"cct": {}}, {"title": "two\nlines"}, "title is 'two\\nlines'; it is text on one line."),
        ({"cct": {}}, {"common": "training.steps=2"}, "common is 'training.steps=2'; it is a list of key=value"),
        ({"cct": {"set": ["seed=3"]}}, {}, "rows.cct.set sets seed, which the comparison decides. Use `seeds`"),
        ({"cct": {}, "typo": {"set": ["training.stepz=3"]}}, {}, "rows.typo: {recipe} training.stepz=3 seed=0"),
        ({"cct": {}, "typo": {"set": ["training.stepz=3"]}}, {}, 'unknown key "training.stepz"'),
        ({"cct": {"recipe": "nothing.yaml"}}, {}, "rows.cct: nothing.yaml: there is no such recipe."),
        (
            {"cct": {"set": ["domains.fields.val_split=''", "domains.shapes.val_split=''"]}},
            {},
            "rows.cct: no domain has a val_split to compare by. Set domains.NAME.val_split",
        ),
    ],
)
def test_mistakes_in_an_experiment_are_one_line_before_anything_is_trained(
    rows: object,
    keys: dict[str, object],
    words: str,
    bench: Callable[..., list[str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    line = refusal(capsys, bench(rows, **keys))
    assert f"{tmp_path}/plans/rivals.yaml: " in line
    assert words.replace("{recipe}", f"{tmp_path}/tiny.yaml") in line
    assert not (tmp_path / "runs").exists()
    assert not (tmp_path / "table.md").exists()


def test_mistakes_in_the_command(
    bench: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = bench({"cct": {}})
    assert "--jobs is 0; it is at least 1." in refusal(capsys, [*words, "--jobs", "0"])
    assert "--out is table.html; it ends in .md" in refusal(capsys, [*words, "--out", "table.html"])
    assert "absent.yaml: there is no such file" in refusal(capsys, ["compare", "absent.yaml"])
    (tmp_path / "plans" / "rivals.yaml").write_text("rows: {cct: {}}\n")
    assert "rows.cct has no recipe, nor has the experiment. Name one" in refusal(capsys, words)


@pytest.mark.parametrize("path", sorted((ROOT / "recipes" / "experiments").glob("*.yaml")), ids=lambda path: path.stem)
def test_experiments_that_ship_can_be_planned(path: Path) -> None:
    assert planned_runs(path, read_experiment(path))


def test_the_experiment_in_the_documentation_can_be_planned(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "comparisons.md").read_text(encoding="utf-8")
    example = tmp_path / "example.yaml"
    example.write_text(page.split("```yaml\n")[1].split("```")[0], encoding="utf-8")
    runs = planned_runs(ROOT / "recipes" / "experiments" / "example.yaml", read_experiment(example))
    assert len(runs) == 13
    assert {run.recipe.training.steps for run in runs} == {600}
