"""What the processes of the checkpoint tests do. Each ends with one line of JSON, or with the traceback of what did not
hold.

The tensors of step n are all n: a mixture of two steps cannot hide.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import shutil
import signal
from pathlib import Path

import torch
from filesystem import Moment, Recorder, after_power_loss, lay_out, tree_of
from torch import nn

from multidomain_cct.training.checkpoints.checkpoint import (
    checkpoints,
    damage,
    load_checkpoint,
    newest_checkpoint,
    save_checkpoint,
)
from multidomain_cct.training.checkpoints.state import RunState

PAGE = 4096


class Saver:
    """A model and an optimiser that are saved with a step's number in every tensor."""

    def __init__(self, width: int = 4) -> None:
        self.model = nn.Sequential(nn.Linear(width, width), nn.BatchNorm1d(width))
        self.optimiser = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        self.model(torch.ones(2, width)).sum().backward()
        self.optimiser.step()

    def tensors(self) -> list[torch.Tensor]:
        return [
            *self.model.state_dict().values(),
            *(state["momentum_buffer"] for state in self.optimiser.state.values()),
        ]

    def save(self, folder: Path, step: int, *, best: int = 0, owes: bool = False) -> None:
        for tensor in self.tensors():
            tensor.detach().fill_(step)
        save_checkpoint(
            folder,
            RunState(step=step, fingerprints={}, best_step=best, owes_evaluation=owes),
            self.model,
            self.optimiser,
            keep=1,
        )

    def verify(self, folder: Path, acknowledged: int) -> int:
        """Every published checkpoint is whole and of one step, and none that was acknowledged is lost.

        The newest one's step, 0 for none.
        """
        for checkpoint in checkpoints(folder):
            assert damage(checkpoint) is None, f"{checkpoint}: {damage(checkpoint)}"
        newest, _ = newest_checkpoint(folder)
        if newest is None:
            assert not acknowledged, f"step {acknowledged} was acknowledged and is lost"
            return 0
        step = load_checkpoint(newest, self.model, self.optimiser).step
        assert f"step-{step:08d}" == newest.name.removesuffix(".before"), (
            f"{newest} holds step {step}, acknowledged was {acknowledged}"
        )
        assert step >= acknowledged, f"{newest} holds step {step}, acknowledged was {acknowledged}"
        assert all(bool((tensor == step).all()) for tensor in self.tensors()), f"{newest} is a mixture"
        return step


def lose_power(work: Path) -> None:
    """Record four saves with keep=1, the last of them in the place of the third; verify what a loss of power could
    leave, and the folder at every moment.
    """
    saver, folder, moments, acknowledged = Saver(), work / "run" / "checkpoints", [], [0]
    work.mkdir(parents=True)

    def before(event: str, path: str) -> None:
        synced = os.path.relpath(path, work) if event == "fsync" else ""
        moments.append(Moment(tree_of(work), synced, acknowledged[0]))

    recorder = Recorder(work, before)
    recorder.install()
    for step, owes in ((1, False), (2, False), (3, True), (3, False)):
        recorder.on = True
        saver.save(folder, step, owes=owes)
        recorder.on = False
        acknowledged[0] = step
    states = after_power_loss(moments)
    for tree, promised in states:
        lay_out(tree, work.parent / "replayed")
        saver.verify(work.parent / "replayed" / "run" / "checkpoints", promised)
        shutil.rmtree(work.parent / "replayed")
    loadable = 0
    for moment in moments:
        if moment.acknowledged:
            lay_out(moment.tree, work.parent / "listed")
            assert saver.verify(work.parent / "listed" / "run" / "checkpoints", moment.acknowledged)
            shutil.rmtree(work.parent / "listed")
            loadable += 1
    print(json.dumps({"operations": len(moments), "states": len(states), "loadable": loadable}))


def lose_power_without_syncing(work: Path) -> None:
    """The same with a writer that forgets to sync, which must not pass."""
    from multidomain_cct.files import durable
    from multidomain_cct.training.checkpoints import checkpoint

    checkpoint.sync = durable.sync = lambda path: None
    lose_power(work)


def fail_at_every_operation(work: Path) -> None:
    """For every k: raise "no space left" at the k-th file operation of a save over another, and die at it."""
    saver, operations, target = Saver(), [0], [0]
    failing = [True]
    recorder = Recorder(work, lambda event, path: None)

    def before(event: str, path: str) -> None:
        operations[0] += 1
        if operations[0] == target[0]:
            if not failing[0]:
                os.kill(os.getpid(), signal.SIGKILL)
            recorder.on = False
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)

    recorder.before = before
    recorder.install()
    raised = killed = 0
    for failing[0] in (True, False):
        target[0], reached = 0, True
        while reached:
            target[0] += 1
            folder = work / f"{'raise' if failing[0] else 'die'}{target[0]}"
            saver.save(folder, 1)
            operations[0], reached = 0, False
            child = 0 if failing[0] else os.fork()
            if child == 0:
                recorder.on = True
                try:
                    saver.save(folder, 2)
                except OSError as error:
                    assert error.errno == errno.ENOSPC
                    assert error.filename
                    raised, reached = raised + 1, True
                recorder.on = False
                if not failing[0]:
                    os._exit(0)
                assert not list(folder.glob(".*.tmp")) or not reached, (
                    f"operation {target[0]} left {list(folder.iterdir())}"
                )
            else:
                reached = os.waitpid(child, 0)[1] == signal.SIGKILL
                killed += reached
            saver.verify(folder, 1)
            # Whatever was left, the next save clears it away.
            saver.save(folder, 3)
            assert [path.name for path in folder.iterdir()] == ["step-00000003"]
    print(json.dumps({"raised": raised, "killed": killed}))


def save_until_killed(folder: Path, acknowledged: Path) -> None:
    """Save one step after the other, and tell each once its save has returned."""
    saver = Saver(64)
    newest, _ = newest_checkpoint(folder)
    step = int(newest.name.removeprefix("step-")) if newest else 0
    while True:
        step += 1
        saver.save(folder, step)
        with acknowledged.open("a") as file:
            file.write(f"{step}\n")


def fill_a_disk(work: Path) -> None:
    """On a small disk of memory, in a mount namespace of its own: save with room for nothing, for one page, for two,
    until it fits.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    new_namespaces = 0x00020000 | (0 if os.geteuid() == 0 else 0x10000000)
    work.mkdir()
    if (
        libc.unshare(new_namespaces)
        or libc.mount(None, b"/", None, 0x44000, None)
        or libc.mount(b"tmpfs", str(work).encode(), b"tmpfs", 0, b"size=1m")
    ):
        print(json.dumps({"permitted": False, "reason": os.strerror(ctypes.get_errno())}))
        return
    saver, folder, refused, pages, where = Saver(64), work / "checkpoints", 0, 0, set()
    saver.save(folder, 1)
    while True:
        space = os.statvfs(work)
        ballast = work / "ballast"
        ballast.write_bytes(bytes(max(0, space.f_bavail * space.f_frsize - pages * PAGE)))
        try:
            saver.save(folder, 2)
        except OSError as error:
            assert error.errno == errno.ENOSPC, error
            refused, pages = refused + 1, pages + 1
            where.add(Path(error.filename).name)
            assert [path.name for path in folder.iterdir()] == ["step-00000001"]
            ballast.unlink()
            saver.verify(folder, 1)
            continue
        break
    saver.verify(folder, 2)
    print(json.dumps({"permitted": True, "refused": refused, "where": sorted(where)}))
