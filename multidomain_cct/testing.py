"""assert_resumes_exactly: a test for transforms, methods and recipes of your own.

A run that is killed and resumed must end with the same bytes as one that was not. It does when all randomness depends
on the step or the sample alone. A transform that draws from numpy's or Python's global generator, counts its calls or
reads the clock breaks that:

    from multidomain_cct.testing import assert_resumes_exactly
    from multidomain_cct.training.recipe import read_recipe

    def test_my_recipe_resumes_exactly(tmp_path):
        recipe = read_recipe(Path("recipes/mine.yaml"), ["training.steps=8"])
        assert_resumes_exactly(recipe, [Path("domains")], tmp_path)
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from multidomain_cct.errors import UserError
from multidomain_cct.training.checkpoints.checkpoint import checkpoints
from multidomain_cct.training.loop import train
from multidomain_cct.training.recipe import Recipe
from multidomain_cct.training.runlog import read_metrics

Train = Callable[[Recipe, Sequence[Path]], object]


def assert_resumes_exactly(
    recipe: Recipe, folders: Sequence[Path], workspace: Path, *, start: Train = train, timeout: float = 600
) -> None:
    """Train the recipe in `workspace` without interruption, then with a SIGKILL half-way and resume=auto, and compare.

    `folders` hold domain files. `start` is `train`, or a function of an importable module that sets up your own code
    and calls it. Each run has a fresh process and `timeout` seconds; few steps are enough. Raises AssertionError that
    names the first step with other losses, or the file with other bytes; and RuntimeError when a run fails.
    """
    half = recipe.training.steps // 2
    if half < 1:
        raise UserError(f"training.steps is {recipe.training.steps}; a run that is interrupted needs 2 or more.")
    training = replace(recipe.training, log_every=1, save_every=half, keep=recipe.training.steps)
    straight, killed = (
        replace(recipe, runs=str(workspace), name=name, training=training, resume="auto")
        for name in ("straight", "killed")
    )
    for each in (straight, killed):
        if each.folder.exists():
            raise UserError(f"{each.folder} exists. Give a workspace without the runs of an earlier comparison.")
    _finish(_started(start, straight, folders), timeout)
    saved = killed.folder / "checkpoints" / f"step-{half:08d}"
    _kill_once_saved(_started(start, killed, folders), saved, timeout)
    for later in checkpoints(saved.parent):
        # It may have come further before it died.
        if later.name > saved.name:
            later.rename(later.with_name(f".{later.name}.old"))
    _finish(_started(start, killed, folders), timeout)
    _compare(straight.folder, killed.folder)


def _started(start: Train, recipe: Recipe, folders: Sequence[Path]) -> BaseProcess:
    context = multiprocessing.get_context("forkserver")
    # Unless the server runs already: imported once, torch costs no further process its start.
    context.set_forkserver_preload([__name__])
    process = context.Process(target=_run, args=(start, recipe, list(folders)))
    process.start()
    return process


def _kill_once_saved(process: BaseProcess, saved: Path, timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while process.is_alive() and not saved.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.join()
    if not saved.exists():
        raise RuntimeError(f"the run to be killed did not reach {saved.name}; what it printed says why.")


def _run(start: Train, recipe: Recipe, folders: list[Path]) -> None:
    # A process of a fork server would start its loader processes by that server; a run forks them.
    multiprocessing.set_start_method("fork", force=True)
    start(recipe, folders)


def _finish(process: BaseProcess, timeout: float) -> None:
    process.join(timeout)
    if process.exitcode is None:
        process.kill()
        process.join()
        raise RuntimeError(f"a run did not end within {timeout} seconds.")
    if process.exitcode:
        raise RuntimeError(f"a run ended with exit code {process.exitcode}; what it printed says why.")


def _compare(straight: Path, killed: Path) -> None:
    before, after = (_logged(run) for run in (straight, killed))
    for step in sorted(before.keys() | after.keys()):
        values, others = before.get(step, {}), after.get(step, {})
        for key in values | others:
            assert values.get(key) == others.get(key), (
                f"step {step}: {key} is {others.get(key)} after the interruption, {values.get(key)} without it."
            )
    last = checkpoints(straight / "checkpoints")[-1].name
    for name in ("model.safetensors", "optimiser.safetensors"):
        contents = [(run / "checkpoints" / last / name).read_bytes() for run in (straight, killed)]
        assert contents[0] == contents[1], (
            f"{name} of {last} has other bytes after the interruption, although all losses agree."
        )


def _logged(run: Path) -> dict[int, dict[str, Any]]:
    """Losses, scores and learning rate by step."""
    steps: dict[int, dict[str, Any]] = {}
    for line in read_metrics(run / "metrics.jsonl"):
        kept = {key: value for key, value in line.items() if not key.startswith("sys/")}
        steps.setdefault(line["step"], {}).update(kept)
    return steps
