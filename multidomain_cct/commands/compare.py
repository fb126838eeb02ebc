"""`compare`: trains recipes x seeds, each run in a process of its own, and writes the table of their scores."""

from __future__ import annotations

import argparse
import fcntl
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from multidomain_cct.commands.terminal import DONE, FAILED, Words, complain, domain_options, say, show_table
from multidomain_cct.errors import UserError, require_number

if TYPE_CHECKING:
    from multidomain_cct.results.comparison.experiment import Experiment, PlannedRun, RunScores

_LOOK_EVERY = 0.2
"""Seconds between looks at the running processes."""
_GRACE = 10
"""Seconds that a stopped process has to end by itself."""


def register(words: Words) -> None:
    command = words.add_parser(
        "compare", parents=[domain_options()], help="train recipes x seeds -> a table of mean and standard deviation"
    )
    command.add_argument("experiment", type=Path, metavar="EXPERIMENT")
    command.add_argument(
        "--jobs", type=int, default=1, metavar="N", help="runs at once, each with its share of the cores (default: 1)"
    )
    out_help = "receives the table, and FILE.json the numbers (default: results/EXPERIMENT.md)"
    command.add_argument("--out", type=Path, metavar="FILE.md", help=out_help)
    command.add_argument("--dry-run", action="store_true", help="say what would be trained, and train nothing")
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from multidomain_cct.results.comparison.experiment import planned_runs, read_experiment, state_of

    require_number("--jobs", options.jobs, at_least=1)
    out: Path = options.out or Path("results") / f"{options.experiment.stem}.md"
    if out.suffix != ".md":
        raise UserError(f"--out is {out}; it ends in .md, and the numbers go into a file beside it that ends in .json.")
    experiment = read_experiment(options.experiment)
    runs = planned_runs(options.experiment, experiment)
    training = _Training(experiment, runs, options.domains, options.jobs, out, _command(options))
    if options.dry_run:
        for each in runs:
            say(f"{each.recipe.name} ({state_of(each)}): {shlex.join(training.words(each))}")
        return DONE
    # SIGTERM ends the trainings too, as Ctrl-C does.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        training.train()
    except KeyboardInterrupt:
        done = f"{len(training.scores)} of {len(runs)} runs finished"
        complain(f"stopped with {done}. The same command goes on from the last checkpoints.")
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)
    say(f"written to {out} and {out.with_suffix('.json')}")
    for each in runs:
        if each.recipe.name in training.failures:
            complain(f"{each.recipe.name} failed: {training.failures[each.recipe.name]} (log: {each.log})")
    return FAILED if training.failures else DONE


def _command(options: argparse.Namespace) -> str:
    words = ["python", "-m", "multidomain_cct", "compare", str(options.experiment)]
    words += ["--jobs", str(options.jobs)] if options.jobs > 1 else []
    words += ["--out", str(options.out)] if options.out else []
    return shlex.join([*words, *_domain_words(options.domains)])


def _domain_words(folders: Sequence[Path]) -> list[str]:
    return [word for folder in folders for word in ("--domains", str(folder))]


@dataclass(frozen=True)
class _Child:
    """A training in progress."""

    run: PlannedRun
    process: subprocess.Popen[bytes]
    log_start: int
    """Where in the log this attempt begins."""
    started: float


@dataclass(frozen=True)
class _Training:
    """The runs of one command: which are finished, which failed, and where the table goes."""

    experiment: Experiment
    runs: Sequence[PlannedRun]
    domains: Sequence[Path]
    jobs: int
    out: Path
    command: str
    scores: list[RunScores] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)

    def words(self, run: PlannedRun) -> list[str]:
        """The command that trains a run."""
        words = [sys.executable, "-m", "multidomain_cct", "train", str(run.source), *run.overrides]
        return [*words, *_domain_words(self.domains)]

    def train(self) -> None:
        """Train what is not finished, `jobs` at once; write the table after each run, and show it at the end."""
        from multidomain_cct.results.comparison.experiment import finished_scores

        waiting, running = [], list[_Child]()
        for run in self.runs:
            scores = finished_scores(run)
            if scores:
                self._finished(scores, "(was finished)")
            else:
                waiting.append(run)
        self._write()
        try:
            while waiting or running:
                while waiting and len(running) < self.jobs:
                    self._start(waiting.pop(0), running)
                time.sleep(_LOOK_EVERY)
                for child in [child for child in running if child.process.poll() is not None]:
                    running.remove(child)
                    code = child.process.returncode
                    scores = finished_scores(child.run) if code == 0 else None
                    if scores:
                        self._finished(scores, f"{(time.monotonic() - child.started) / 60:.1f} minutes")
                    else:
                        self._failed(child.run, _last_error(child, code))
                    self._write()
        finally:
            _stop([child.process for child in running])
        self._write(show=True)

    def _start(self, run: PlannedRun, running: list[_Child]) -> None:
        run.log.parent.mkdir(parents=True, exist_ok=True)
        with run.log.open("ab") as log:
            try:
                # The training inherits the lock and keeps it until it ends, also when this process dies before it.
                fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                advice = "Wait for it, or end it, and give the same command again."
                self._failed(run, f"{run.log} is being written by a training that is still running. {advice}")
                return
            begin = log.tell()
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
            # A number of threads that the user has set stays.
            environment = {"OMP_NUM_THREADS": str(max(1, cores // self.jobs))} | os.environ
            # In this process's group: what ends the group ends the trainings too.
            process = subprocess.Popen(
                self.words(run), stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=environment
            )
        say(f"{run.recipe.name}  training (log: {run.log})")
        running.append(_Child(run, process, begin, time.monotonic()))

    def _finished(self, scores: RunScores, remark: str) -> None:
        self.scores.append(scores)
        miou = (f"{name} {'n/a' if each is None else f'{100 * each:.1f}'}" for name, each in scores.miou.items())
        say(f"{scores.row}-seed{scores.seed}  {'  '.join(miou)}  {remark}")

    def _failed(self, run: PlannedRun, error: str) -> None:
        self.failures[run.recipe.name] = error
        say(f"{run.recipe.name}  failed: {error}")

    def _write(self, *, show: bool = False) -> None:
        """Write the tables as they are now."""
        from multidomain_cct.results.comparison.tables import Comparison, write_comparison

        comparison = Comparison(self.experiment, self.runs, self.scores, self.failures)
        write_comparison(comparison, self.out, command=self.command, date=datetime.now(UTC).strftime("%Y-%m-%d"))
        if show:
            say(self.experiment.title)
            for heading, *rows in comparison.tables():
                show_table(heading, rows)


def _stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """End the processes; their last checkpoints are whole whenever that happens."""
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + _GRACE
    for process in processes:
        try:
            process.wait(timeout=max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _last_error(child: _Child, code: int) -> str:
    """Why a training ended without its scores, in one line from its log."""
    if code < 0:
        return f"it was ended by {signal.Signals(-code).name}{' (out of memory?)' if code == -signal.SIGKILL else ''}."
    if code == 0:
        return f"it ended without val scores and a checkpoint at step {child.run.recipe.training.steps}."
    with child.run.log.open("rb") as log:
        log.seek(child.log_start)
        lines = [line.strip() for line in log.read().decode(errors="replace").splitlines() if line.strip()]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return (errors or lines or [f"it ended with exit code {code} and printed nothing."])[-1]
