"""`compare`: trains the recipes and seeds of an experiment, each in a process of its own, and writes the table of their
scores.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from multidomain_cct.commands.terminal import DONE, FAILED, Words, complain, domain_options, say
from multidomain_cct.errors import UserError

if TYPE_CHECKING:
    from multidomain_cct.results.comparison.experiment import Experiment, Run, RunScores
    from multidomain_cct.results.comparison.tables import Comparison

_LOOK_EVERY = 0.2
"""Seconds between looks at the running processes."""
_GRACE = 10
"""Seconds that a stopped process has to end by itself."""


def register(words: Words) -> None:
    command = words.add_parser(
        "compare", parents=[domain_options()], help="train recipes x seeds -> a table with mean and std"
    )
    command.add_argument("experiment", type=Path, metavar="EXPERIMENT")
    command.add_argument(
        "--jobs", type=int, default=1, metavar="N", help="runs at once, each with its share of the cores (default: 1)"
    )
    command.add_argument(
        "--out",
        type=Path,
        metavar="FILE.md",
        help="receives the table, and FILE.json the numbers (default: results/EXPERIMENT.md)",
    )
    command.add_argument("--dry-run", action="store_true", help="say what would be trained, and train nothing")
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from multidomain_cct.results.comparison.experiment import planned_runs, read_experiment

    if options.jobs < 1:
        raise UserError(f"--jobs is {options.jobs}; it is at least 1.")
    out: Path = options.out or Path("results") / f"{options.experiment.stem}.md"
    if out.suffix != ".md":
        raise UserError(f"--out is {out}; it ends in .md, and the numbers go beside it into a file that ends in .json.")
    experiment = read_experiment(options.experiment)
    runs = planned_runs(options.experiment, experiment)
    training = _Training(experiment, runs, options.domains, options.jobs, out, _command(options))
    if options.dry_run:
        training.print_plan()
        return DONE
    # A comparison that is told to end takes its processes along, as one that is interrupted does.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        training.train()
    except KeyboardInterrupt:
        complain(
            f"stopped with {len(training.scores)} of {len(runs)} runs finished. The same command goes on from the "
            "last checkpoints."
        )
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)
    _print_tables(training.comparison)
    say(f"written to {out} and {out.with_suffix('.json')}")
    for each in runs:
        if each.recipe.name in training.failures:
            complain(f"{each.recipe.name} failed: {training.failures[each.recipe.name]} (log: {each.log})")
    return FAILED if training.failures else DONE


def _command(options: argparse.Namespace) -> str:
    words = ["python", "-m", "multidomain_cct", "compare", str(options.experiment)]
    words += ["--jobs", str(options.jobs)] if options.jobs > 1 else []
    words += ["--out", str(options.out)] if options.out else []
    return shlex.join([*words, *(word for folder in options.domains for word in ("--domains", str(folder)))])


@dataclass(frozen=True)
class _Child:
    """A training that is under way."""

    run: Run
    process: subprocess.Popen[bytes]
    log_start: int
    """Where in the log this attempt begins."""
    started: float

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started


@dataclass(frozen=True)
class _Training:
    """The runs of one command: which are finished, which failed, and where the table goes."""

    experiment: Experiment
    runs: Sequence[Run]
    domains: Sequence[Path]
    jobs: int
    out: Path
    command: str
    scores: list[RunScores] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)
    console: Console = field(default_factory=lambda: Console(highlight=False, soft_wrap=True))

    @property
    def comparison(self) -> Comparison:
        from multidomain_cct.results.comparison.tables import Comparison

        return Comparison(self.experiment, self.runs, self.scores, self.failures)

    def print_plan(self) -> None:
        """One line per run, in the order of training: its state and its command."""
        from multidomain_cct.results.comparison.experiment import state_of

        for each in self.runs:
            say(f"{each.recipe.name} ({state_of(each)}): {shlex.join(_words(each, self.domains))}")

    def train(self) -> None:
        """Train what is not finished, `jobs` at once, and write the table after each run."""
        from multidomain_cct.results.comparison.experiment import finished_scores

        waiting, running = [], list[_Child]()
        for each in self.runs:
            found = finished_scores(each)
            if found:
                self.scores.append(found)
                self.console.print(f"{_line(found)}  (was finished)", markup=False)
            else:
                waiting.append(each)
        self.write()
        status = self.console.status("") if self.console.is_terminal else nullcontext()
        try:
            with status as shown:
                while waiting or running:
                    while waiting and len(running) < self.jobs:
                        self._start(waiting.pop(0), running)
                    time.sleep(_LOOK_EVERY)
                    for child in [child for child in running if child.process.poll() is not None]:
                        running.remove(child)
                        self._ended(child)
                    if shown is not None:
                        names = ", ".join(f"{child.run.recipe.name} {_clock(child.seconds)}" for child in running)
                        shown.update(escape(f"{len(self.scores)} of {len(self.runs)} finished; training {names}"))
        finally:
            _stop([child.process for child in running])

    def _start(self, each: Run, running: list[_Child]) -> None:
        each.log.parent.mkdir(parents=True, exist_ok=True)
        with each.log.open("ab") as log:
            if not _locked(log):
                self._failed(
                    each,
                    f"{each.log} is being written by a training that is still under way. Wait for it, or end it, and "
                    "give the same command again.",
                )
                return
            begin = log.tell()
            # In this process's group, so that what ends the group ends the trainings too.
            process = subprocess.Popen(
                _words(each, self.domains),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=_child_environment(self.jobs),
            )
        running.append(_Child(each, process, begin, time.monotonic()))

    def _ended(self, child: _Child) -> None:
        from multidomain_cct.results.comparison.experiment import finished_scores

        code = child.process.returncode
        found = finished_scores(child.run) if code == 0 else None
        if found:
            self.scores.append(found)
            self.console.print(f"{_line(found)}  {_clock(child.seconds)}", markup=False)
        else:
            self._failed(child.run, _last_error(child, code))
        self.write()

    def _failed(self, each: Run, error: str) -> None:
        self.failures[each.recipe.name] = error
        self.console.print(f"{each.recipe.name}  failed: {error}", markup=False)

    def write(self) -> None:
        """Write the table as it now is."""
        from multidomain_cct.results.comparison.tables import write_comparison

        write_comparison(self.comparison, self.out, command=self.command, date=datetime.now(UTC).strftime("%Y-%m-%d"))


def _words(each: Run, domains: Sequence[Path]) -> list[str]:
    """The command that trains a run."""
    folders = [word for folder in domains for word in ("--domains", str(folder))]
    return [sys.executable, "-m", "multidomain_cct", "train", str(each.source), *each.overrides, *folders]


def _child_environment(jobs: int) -> Mapping[str, str]:
    """This process's variables, with a share of the cores for each training; a number of threads that the user has set
    stays.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {"OMP_NUM_THREADS": str(max(1, cores // jobs))} | os.environ


def _locked(log: BinaryIO) -> bool:
    """Whether the log is now ours.

    The training inherits the lock and keeps it until it ends, also when this process dies before it.
    """
    # Here, because Windows has no such module, and this command alone needs it.
    import fcntl

    try:
        fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


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
    return (errors or lines or [f"it ended with the exit code {code} and no word."])[-1]


def _line(scores: RunScores) -> str:
    domains = "  ".join(
        f"{name} {'n/a' if value is None else f'{100 * value:.1f}'}" for name, value in scores.miou.items()
    )
    return f"{scores.row}-seed{scores.seed}  {domains}"


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def _print_tables(comparison: Comparison) -> None:
    terminal = Console(highlight=False)
    # A file has no width; the assumed one of a terminal would break the cells.
    console = terminal if terminal.is_terminal else Console(highlight=False, width=240)
    console.print(comparison.experiment.title, markup=False, style="bold")
    for heading, *rows in comparison.tables():
        table = Table(*map(escape, heading))
        for cells in rows:
            table.add_row(*map(escape, cells))
        console.print(table)
