"""Real processes for the reliability tests: the program, started, killed and watched.

A server that has everything imported forks each process, so that a start costs a fraction of a second; each process has
its own session, as under a scheduler. What a process does differently from the program (kill itself at a step, spoil a
loss) is said in `Plan`, and works from outside: it wraps what the loop is given, and leaves the program's own code as
it is.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import multiprocessing
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

WATCHDOG_SECONDS = 60 * float(os.environ.get("MDCCT_PATIENCE", "1"))
"""No process of these tests may live longer. On a machine that is busy with other work, MDCCT_PATIENCE stretches it."""
FULL = os.environ.get("MDCCT_RELIABILITY") == "full"
"""The full figures of `make reliability` rather than those of CI."""

server = multiprocessing.get_context("forkserver")
server.set_forkserver_preload(
    ["multidomain_cct.__main__", "multidomain_cct.training.loop", "multidomain_cct.results.report.page"]
)


@dataclass(frozen=True)
class Plan:
    """What happens to one process besides what its command says."""

    seen: Path | None = None
    """File that receives a line of JSON for each micro-batch that the loop takes: the step, and by domain the keys and
    a digest of the pixels.
    """
    send: tuple[int, int] | None = None
    """(step, signal): the process sends itself the signal while it waits for the batch of that step, counted from 0."""
    signal_in: str = ""
    """`save` or `evaluation`: the signal is sent there instead, at the first one at or after the step."""
    to_group: bool = False
    """The signal goes to the process's group: to its loader processes too."""
    nan_steps: tuple[int, ...] = ()
    """Steps, counted from 0, in which a loss is not a number."""
    nan_domain: str = "shapes"
    slow: float = 0.0
    """Seconds that each batch is late."""
    file_limit: int = 0
    """Bytes beyond which the system refuses to write a file; 0 for no limit."""
    more: tuple[str, ...] = ()
    """Further words of the command."""
    environment: dict[str, str] = field(default_factory=dict)


class Started:
    """A process of the program and what it has printed."""

    def __init__(self, process: BaseProcess, out: Path) -> None:
        self.process, self.out = process, out

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    def wait(self, seconds: float = WATCHDOG_SECONDS) -> int:
        """The exit code, negative for a signal.

        The watchdog: whoever has not ended by then is killed, and that is a failure.
        """
        self.process.join(seconds)
        if self.process.exitcode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
            raise AssertionError(f"still alive after {seconds} s:\n{self.text[-2000:]}")
        return self.process.exitcode

    @property
    def text(self) -> str:
        return self.out.read_text(errors="replace") if self.out.exists() else ""

    @property
    def errors(self) -> list[str]:
        return [line for line in self.text.splitlines() if line.startswith("error: ")]

    def wait_for(self, happened: Callable[[], bool], seconds: float = WATCHDOG_SECONDS) -> None:
        """Until something can be seen, or the process ends, or the watchdog bites."""
        deadline = time.monotonic() + seconds
        while not happened():
            assert self.process.is_alive(), f"ended before that:\n{self.text[-2000:]}"
            assert time.monotonic() < deadline, f"did not happen within {seconds} s:\n{self.text[-2000:]}"
            time.sleep(0.005)

    def children(self) -> list[int]:
        """Process ids of its loader processes."""
        return [
            int(pid)
            for task in Path(f"/proc/{self.pid}/task").iterdir()
            for pid in (task / "children").read_text().split()
        ]


def start(arguments: list[str], out: Path, plan: Plan | None = None) -> Started:
    """Start the program with these arguments; what it prints goes to the file `out`."""
    return call(_program, (arguments, plan or Plan()), out)


def call(function: Callable[..., Any], arguments: tuple[Any, ...], out: Path) -> Started:
    """Run a function of an importable module in a process of its own session."""
    process = server.Process(target=_in_own_session, args=(function, arguments, out), daemon=False)
    process.start()
    return Started(process, out)


def start_ranks(arguments: list[str], out: Path, plans: list[Plan]) -> list[Started]:
    """Start one process for each plan, as torchrun does: connected by gloo, each with its rank in the environment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    started = []
    for rank, plan in enumerate(plans):
        world = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": len(plans),
            "LOCAL_WORLD_SIZE": len(plans),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        environment = {name: str(value) for name, value in world.items()} | plan.environment
        started.append(
            call(
                _program,
                (arguments, Plan(**{**vars(plan), "environment": environment})),
                out.with_name(f"{out.name}-rank{rank}"),
            )
        )
    return started


def seen(*files: Path) -> dict[int, list[Any]]:
    """What the loop was given, by step; of a step that several attempts made, all of them."""
    found: dict[int, list[Any]] = {}
    for file in files:
        for line in file.read_text().splitlines():
            step, content = json.loads(line)
            found.setdefault(step, []).append(content)
    return found


def _in_own_session(function: Callable[..., Any], arguments: tuple[Any, ...], out: Path) -> None:
    os.setsid()
    # Whoever starts the tests may end without waiting; the kernel then ends the process.
    signal.alarm(int(2 * WATCHDOG_SECONDS))
    # A process of a fork server would start its own by that server too, and a run's loader processes are forked from
    # the run.
    multiprocessing.set_start_method("fork", force=True)
    descriptor = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    sys.stdout, sys.stderr = open(1, "w", buffering=1, closefd=False), open(2, "w", buffering=1, closefd=False)
    sys.exit(function(*arguments))


def _program(arguments: list[str], plan: Plan) -> int:
    from multidomain_cct.__main__ import main

    os.environ.update(plan.environment)
    if plan.file_limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (plan.file_limit, plan.file_limit))
    _follow(plan)
    return main([*arguments, *plan.more])


def _follow(plan: Plan) -> None:
    from multidomain_cct.training import loop

    steps, save, evaluate, now = loop.steps, loop.save_checkpoint, loop.validate, [0]

    def send(place: str) -> None:
        if (
            plan.send is not None
            and plan.signal_in == place
            and (now[0] == plan.send[0] or (place and now[0] >= plan.send[0]))
        ):
            (os.killpg if plan.to_group else os.kill)(os.getpid(), plan.send[1])

    def watched(data: Any, start: int, stop: int, **options: Any) -> Iterator[Any]:
        for number, batches in enumerate(steps(data, start, stop, **options), start * data.accumulation):
            now[0] = number // data.accumulation
            if plan.seen is not None:
                content = {name: [list(batch.keys), _digest(batch)] for name, batch in batches.items()}
                with plan.seen.open("a") as file:
                    file.write(json.dumps([now[0], content]) + "\n")
            time.sleep(plan.slow)
            send("")
            yield batches

    def saved(*arguments: Any, **options: Any) -> Any:
        send("save")
        return save(*arguments, **options)

    def evaluated(*arguments: Any) -> Any:
        send("evaluation")
        return evaluate(*arguments)

    loop.steps, loop.save_checkpoint, loop.validate = watched, saved, evaluated
    if plan.nan_steps:
        _spoil(plan, now)


def _digest(batch: Any) -> str:
    return hashlib.sha256(
        b"".join(tensor.numpy().tobytes() for tensor in (batch.images, batch.masks, batch.unlabelled, batch.valid))
    ).hexdigest()[:16]


def _spoil(plan: Plan, now: list[int]) -> None:
    from multidomain_cct.methods.supervised import Supervised

    losses = Supervised.supervised_losses

    def spoilt(self: Any, *arguments: Any) -> Any:
        found = losses(self, *arguments)
        if now[0] in plan.nan_steps:
            found[f"{plan.nan_domain}/supervised"] = found[f"{plan.nan_domain}/supervised"] * float("nan")
        return found

    Supervised.supervised_losses = spoilt
