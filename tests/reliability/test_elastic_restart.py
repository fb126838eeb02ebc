"""A process, and a node, that is killed: torchrun starts the others again, and the run goes on from its last checkpoint
by itself.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from nodes import LOOPBACK, Node, two_nodes
from processes import WATCHDOG_SECONDS, Plan, start_ranks
from run_files import logged, steps_of, tensors_of

Words = Callable[..., list[str]]
SETTINGS = {
    "training": {"steps": 14, "log_every": 1, "save_every": 2, "evaluate_every": 100, "keep": 99},
    "data__workers": 1,
}


class Launched:
    """torchrun with what it has printed."""

    def __init__(self, options: list[str], words: list[str], out: Path, node: Node) -> None:
        self.out = out
        launcher = [
            *node.words,
            sys.executable,
            "-m",
            "torch.distributed.run",
            *options,
            "-m",
            "multidomain_cct",
            *words,
        ]
        # Without it, torch 2.14 gives a second attempt the addresses of the first.
        environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
            "GLOO_SOCKET_IFNAME": node.interface,
        }
        with out.open("w") as file:
            self.process = subprocess.Popen(launcher, stdout=file, stderr=file, start_new_session=True, env=environment)

    def ranks(self) -> dict[int, int]:
        """Process ids of its training processes, by rank."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if int((folder / "stat").read_text().rpartition(")")[2].split()[1]) == self.process.pid:
                    words = dict(
                        word.split("=", 1) for word in (folder / "environ").read_text().split("\0") if "=" in word
                    )
                    found[int(words["RANK"])] = int(folder.name)
            except (OSError, KeyError, ValueError):
                continue
        return found

    def end(self) -> None:
        for pid in (*self.ranks().values(), self.process.pid):
            try:
                os.killpg(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.process.wait()


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Callable[..., Launched]]:
    launched: list[Launched] = []

    def one(options: list[str], words: list[str], node: Node = LOOPBACK) -> Launched:
        launched.append(Launched(options, words, tmp_path / f"launched{len(launched)}.txt", node))
        return launched[-1]

    yield one
    for each in launched:
        each.end()


def wait_for_step(run: Path, step: int, launched: Launched) -> None:
    deadline = time.monotonic() + WATCHDOG_SECONDS
    while step not in steps_of(run):
        assert launched.process.poll() is None, launched.out.read_text()[-3000:]
        assert time.monotonic() < deadline, launched.out.read_text()[-3000:]
        time.sleep(0.02)


def finished(command: Words, tmp_path: Path) -> Path:
    """The same run in two processes, without an accident."""
    ranks = start_ranks(command("straight", **SETTINGS), tmp_path / "straight.txt", [Plan(), Plan()])
    assert [rank.wait() for rank in ranks] == [0, 0], ranks[0].text
    return tmp_path / "runs" / "straight"


def test_a_killed_rank_is_started_again_with_its_peer(
    command: Words, tmp_path: Path, launch: Callable[..., Launched], figure: Callable[[str, str], None]
) -> None:
    run = tmp_path / "runs" / "run"
    launched = launch(
        ["--standalone", "--nproc_per_node", "2", "--max-restarts", "1"], [*command("run", **SETTINGS), "resume=auto"]
    )
    wait_for_step(run, 4, launched)
    os.kill(launched.ranks()[1], signal.SIGKILL)
    assert launched.process.wait(WATCHDOG_SECONDS) == 0, launched.out.read_text()[-3000:]
    straight = finished(command, tmp_path)
    assert "going on from step" in launched.out.read_text()
    assert tensors_of(run) == tensors_of(straight)
    assert logged(run) == logged(straight)
    figure("elastic", "rank killed: restarted by torchrun, same bytes as without")


def test_a_killed_node_comes_back_and_the_run_goes_on(
    command: Words, tmp_path: Path, launch: Callable[..., Launched], figure: Callable[[str, str], None]
) -> None:
    """A node is killed as a whole: its launcher and its rank."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    run, words = tmp_path / "runs" / "run", [*command("run", **SETTINGS), "resume=auto"]
    with two_nodes() as (one, other, what):
        meeting = ["--rdzv-backend", "c10d", "--rdzv-id", "cct", "--rdzv-endpoint", f"{one.address}:{port}"]
        options = ["--nnodes", "2", "--nproc_per_node", "1", "--max-restarts", "3", *meeting]
        first = launch([*options, "--local-addr", one.address, "--rdzv-conf", "is_host=1"], words, one)
        member = [*options, "--local-addr", other.address, "--rdzv-conf", "is_host=0"]
        second = launch(member, words, other)
        wait_for_step(run, 4, first)
        assert json.loads((run / "env.json").read_text())["processes"] == 2
        networks = {os.readlink(f"/proc/{pid}/ns/net") for each in (first, second) for pid in each.ranks().values()}
        assert len(networks) == len({one.words, other.words})
        second.end()
        again = launch(member, words, other)
        assert first.process.wait(2 * WATCHDOG_SECONDS) == 0, first.out.read_text()[-3000:]
        assert again.process.wait(WATCHDOG_SECONDS) == 0, again.out.read_text()[-3000:]
    assert "going on from step" in first.out.read_text() + again.out.read_text()
    straight = finished(command, tmp_path)
    assert tensors_of(run) == tensors_of(straight)
    assert logged(run) == logged(straight)
    figure("elastic", f"node killed and started again, {what}: went on by itself, same bytes as without")
