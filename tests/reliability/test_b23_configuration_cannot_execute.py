"""B23: recipes and domain files can run nothing and give nothing away."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from multidomain_cct.__main__ import main

SECRET = "hunter2-abcdef"
DOMAIN = (
    "name: yard\nlayout: folder\nsplits: {train: {images: '*.jpg', masks: '*.png'}}\nclasses: [{name: grass, color: "
    "[0, 200, 0]}]\n"
)
RECIPE = "domains: {yard: {labelled: 2}}\n"
BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{below}'] * 10)}]\n" for below, name in zip("abcdefghi", "bcdefghij", strict=True)
)
RECIPES = {
    "a shell as the place of shards": RECIPE + "data: {shards: 'pipe:touch canary'}\n",
    "a shell as a remote place": RECIPE.replace("labelled: 2", "labelled: 2, remote: 'pipe:touch canary'")
    + "data: {remote: [pipe]}\n",
    "standard input as shards": RECIPE + "data: {shards: '-'}\n",
    "a file address": RECIPE.replace("labelled: 2", "labelled: 2, remote: 'file:///etc'") + "data: {remote: [file]}\n",
    "a password in an address": RECIPE.replace("labelled: 2", f"labelled: 2, remote: 'https://me:{SECRET}@localhost/x'")
    + "data: {remote: [https]}\n",
    "an address without leave": RECIPE.replace("labelled: 2", "labelled: 2, remote: 'https://localhost/x'"),
    "a shell variable": RECIPE + "data: {shards: '${SECRET}'}\n",
    "an interpolated variable": RECIPE + "runs: '${oc.env:SECRET}'\n",
    "an interpolated key": RECIPE + "init_from: '${seed}'\n",
    "a shell in a budget": RECIPE.replace("2", "'$(touch canary)'"),
    "a python object": "domains: !!python/object/apply:os.mkdir [canary]\n",
    "a python name": RECIPE + "seed: !!python/name:os.mkdir\n",
    "a python module": RECIPE + "name: !!python/module:os\n",
    "an alias bomb": BOMB + RECIPE,
    "one alias": RECIPE + "seed: &s 1\ndata: {budget_seed: *s}\n",
    "a key twice": RECIPE + "seed: 1\nseed: 2\n",
    "a domain twice": "domains: {yard: {}, yard: {}}\n",
    "an unknown key": RECIPE + "sead: 1\n",
    "an unknown key inside": RECIPE + "data: {worker: 1}\n",
    "a merge key": RECIPE + "data: {<<: {workers: 1}}\n",
    "control characters": RECIPE + 'name: "a\x1b[2J"\n',
    "a folder upwards as name": RECIPE + "name: ../../outside\n",
}
DOMAINS = {
    "a python object": "name: !!python/object/apply:os.mkdir [canary]\n",
    "an alias bomb": BOMB + DOMAIN,
    "a key twice": DOMAIN + "title: a\ntitle: b\n",
    "an unknown key": DOMAIN + "colour: red\n",
    "a shell as layout": DOMAIN.replace("layout: folder", "layout: 'pipe:touch canary'"),
    "a name that leads out": DOMAIN.replace("name: yard", "name: ../yard"),
}
OVERRIDES = (
    "data.shards=pipe:touch canary",
    "seed=!!python/object/apply:os.mkdir [canary]",
    "runs=${oc.env:SECRET}",
    "data.workers=[*a]",
    "sead=1",
)


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "domains").mkdir()
    (tmp_path / "domains/yard.yaml").write_text(DOMAIN)
    (tmp_path / "run.yaml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SECRET", SECRET)
    return tmp_path


def one_line(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What a command says that refuses: one line, exit code 2, and not the secret."""
    assert main(list(words)) == 2
    out, err = capsys.readouterr()
    assert len(err.strip().splitlines()) == 1
    assert err.startswith("error: ")
    assert not out
    assert SECRET not in err
    assert "\x1b" not in err
    assert len(err) < 1000
    return err


def unharmed(workspace: Path) -> bool:
    return not list(workspace.rglob("canary")) and {path.name for path in workspace.iterdir()} <= {
        "domains",
        "run.yaml",
        "spare.yaml",
    }


@pytest.mark.parametrize("what", RECIPES)
def test_b23_a_recipe_that_asks_for_more_than_values_is_refused(
    workspace: Path, capsys: pytest.CaptureFixture[str], what: str, record_property: Callable[[str, object], None]
) -> None:
    (workspace / "run.yaml").write_text(RECIPES[what])
    one_line(capsys, "run.yaml")
    assert unharmed(workspace)
    record_property("B23", f"{len(RECIPES)} recipes refused with one line each, canary 0, no secret")


@pytest.mark.parametrize("what", DOMAINS)
def test_b23_a_domain_file_that_asks_for_more_than_values_is_refused(
    workspace: Path, capsys: pytest.CaptureFixture[str], what: str, record_property: Callable[[str, object], None]
) -> None:
    (workspace / "domains/yard.yaml").write_text(DOMAINS[what])
    one_line(capsys, "run.yaml")
    assert unharmed(workspace)
    record_property("B23", f"{len(DOMAINS)} domain files refused with one line each, canary 0, no secret")


@pytest.mark.parametrize("override", OVERRIDES)
def test_b23_an_override_that_asks_for_more_than_values_is_refused(
    workspace: Path, capsys: pytest.CaptureFixture[str], override: str, record_property: Callable[[str, object], None]
) -> None:
    one_line(capsys, "run.yaml", override)
    assert unharmed(workspace)
    record_property("B23", f"{len(OVERRIDES)} overrides refused with one line each, canary 0, no secret")
