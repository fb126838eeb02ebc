import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from processes import WATCHDOG_SECONDS, Plan, seen, start, start_ranks
from run_files import logged, state_of, steps_of, tensors_of

from multidomain_cct.training.processes.stopping import REPEATS_SECONDS, SIGNALS

Words = Callable[..., list[str]]
Figure = Callable[[str, str], None]
SETTINGS: dict[str, Any] = {
    "training": {"steps": 9, "log_every": 1, "save_every": 100, "evaluate_every": 4, "keep": 99},
    "data__workers": 2,
}


def finished(words: list[str], tmp_path: Path) -> None:
    run = start([*words, "resume=auto"], tmp_path / "again.txt")
    assert run.wait() == 0, run.text


@pytest.mark.parametrize(
    ("number", "to_group"),
    [(signal.SIGTERM, False), (signal.SIGTERM, True), (signal.SIGINT, True)],
    ids=["process", "group", "ctrl-c"],
)
def test_a_run_that_is_asked_to_stop_saves_its_step_and_goes_on_to_the_same_bytes(
    command: Words, tmp_path: Path, figure: Figure, number: signal.Signals, to_group: bool
) -> None:
    """In the middle of an epoch, with two loader processes, which a signal to the group reaches too."""
    straight = start(command("straight", **SETTINGS), tmp_path / "straight.txt")
    words = command("stopped", **SETTINGS)
    run = start(words, tmp_path / "run.txt", Plan(send=(5, number), to_group=to_group))
    assert run.wait() == 128 + number, run.text
    (line,) = run.errors
    assert line.startswith(f"error: stopped after step 6, as {SIGNALS[number]} asked, and saved.")
    assert line.endswith("with resume=auto.")
    assert "Traceback" not in run.text
    assert steps_of(tmp_path / "runs" / "stopped")[-1] == 6
    finished(words, tmp_path)
    assert straight.wait() == 0
    assert tensors_of(tmp_path / "runs" / "stopped") == tensors_of(tmp_path / "runs" / "straight")
    assert logged(tmp_path / "runs" / "stopped") == logged(tmp_path / "runs" / "straight")
    figure("B13", f"{SIGNALS[number]}, {'group' if to_group else 'process'}: saved at the step it was in")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["sigterm", "ctrl-c"])
def test_two_processes_stop_after_the_same_step_when_one_of_them_is_told(
    command: Words, tmp_path: Path, figure: Figure, number: signal.Signals
) -> None:
    settings = {**SETTINGS, "training": SETTINGS["training"] | {"evaluate_every": 100}}
    words = command("stopped", **settings)
    files = [tmp_path / "seen0", tmp_path / "seen1"]
    ranks = start_ranks(words, tmp_path / "run.txt", [Plan(seen=files[0]), Plan(seen=files[1], send=(5, number))])
    assert [rank.wait() for rank in ranks] == [128 + number] * 2, ranks[0].text + ranks[1].text
    assert len(ranks[0].errors) == 1
    assert not ranks[1].errors
    assert max(seen(files[0])) >= 5
    assert steps_of(tmp_path / "runs" / "stopped") == [6]
    again = start_ranks([*words, "resume=auto"], tmp_path / "again.txt", [Plan(), Plan()])
    straight = start_ranks(command("straight", **settings), tmp_path / "straight.txt", [Plan(), Plan()])
    assert [rank.wait() for rank in again + straight] == [0] * 4
    assert tensors_of(tmp_path / "runs" / "stopped") == tensors_of(tmp_path / "runs" / "straight")
    figure("B13", "2 ranks, one told: both stop after the same step, same bytes after going on")


def test_a_signal_during_a_save_lets_the_save_end_and_one_more_step(
    command: Words, tmp_path: Path, figure: Figure
) -> None:
    words = command("stopped", "training.save_every=3", **SETTINGS)
    run = start(words, tmp_path / "run.txt", Plan(send=(5, signal.SIGTERM), signal_in="save"))
    assert run.wait() == 143, run.text
    assert steps_of(tmp_path / "runs" / "stopped")[-2:] == [6, 7]
    figure("B13", "during a save: that save and one step more")


@pytest.mark.parametrize(("step", "stopped_after"), [(3, 4), (8, 9)], ids=["middle", "last"])
def test_an_evaluation_that_is_broken_off_is_made_up_for(
    command: Words, tmp_path: Path, figure: Figure, step: int, stopped_after: int
) -> None:
    straight = start(command("straight", **SETTINGS), tmp_path / "straight.txt")
    words = command("stopped", **SETTINGS)
    run = start(words, tmp_path / "run.txt", Plan(send=(step, signal.SIGTERM), signal_in="evaluation"))
    assert run.wait() == 143, run.text
    stopped = tmp_path / "runs" / "stopped"
    assert steps_of(stopped)[-1] == stopped_after
    assert state_of(stopped, stopped_after)["owes_evaluation"]
    assert not any(line["step"] == stopped_after and "val/mean_miou" in line for line in logged(stopped))
    finished(words, tmp_path)
    assert straight.wait() == 0
    assert logged(stopped) == logged(tmp_path / "runs" / "straight")
    ends = [state_of(tmp_path / "runs" / name, 9) for name in ("straight", "stopped")]
    assert all(not end["owes_evaluation"] for end in ends)
    assert [(end["best_step"], end["best_miou"]) for end in ends][0] == [
        (end["best_step"], end["best_miou"]) for end in ends
    ][1]
    figure("B13", f"during the evaluation of step {stopped_after}: saved at once, evaluation made up for")


def test_two_processes_break_off_an_evaluation_of_unequal_shares_together(command: Words, tmp_path: Path) -> None:
    """3 and 5 val images in two processes; only the second one is told."""
    words = command("stopped", **SETTINGS)
    ranks = start_ranks(words, tmp_path / "run.txt", [Plan(), Plan(send=(3, signal.SIGTERM), signal_in="evaluation")])
    assert [rank.wait() for rank in ranks] == [143, 143], ranks[0].text + ranks[1].text
    assert state_of(tmp_path / "runs" / "stopped", 4)["owes_evaluation"]


def test_a_second_signal_ends_a_run_at_once(command: Words, tmp_path: Path, figure: Figure) -> None:
    run = start(
        command("slow", **SETTINGS), tmp_path / "run.txt", Plan(seen=tmp_path / "seen", slow=10 * WATCHDOG_SECONDS)
    )
    run.wait_for((tmp_path / "seen").exists)
    for _ in range(3):
        # A scheduler and torchrun both tell a process: these are one request.
        os.kill(run.pid, signal.SIGTERM)
    time.sleep(REPEATS_SECONDS + 0.5)
    assert run.process.is_alive()
    second = time.monotonic()
    os.kill(run.pid, signal.SIGTERM)
    assert run.wait(10) == 143
    assert run.errors == [
        "error: ended at once by a second SIGTERM. The run goes on from its last checkpoint with resume=auto."
    ]
    figure("B13", f"second signal: ended after {time.monotonic() - second:.2f} s")


def test_a_second_ctrl_c_ends_a_run_at_once(command: Words, tmp_path: Path, figure: Figure) -> None:
    run = start(
        command("slow", **SETTINGS), tmp_path / "run.txt", Plan(seen=tmp_path / "seen", slow=10 * WATCHDOG_SECONDS)
    )
    run.wait_for((tmp_path / "seen").exists)
    os.kill(run.pid, signal.SIGINT)
    time.sleep(0.5)
    assert run.process.is_alive()
    second = time.monotonic()
    os.kill(run.pid, signal.SIGINT)
    assert run.wait(10) == 130
    assert run.errors == [
        "error: ended at once by a second Ctrl-C. The run goes on from its last checkpoint with resume=auto."
    ]
    figure("B13", f"second Ctrl-C: ended after {time.monotonic() - second:.2f} s")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["sigterm", "ctrl-c"])
def test_torchrun_passes_the_signal_on_and_both_ranks_save(
    command: Words, tmp_path: Path, figure: Figure, number: signal.Signals
) -> None:
    words = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        "-m",
        "multidomain_cct",
    ]
    words += command("run", "training.steps=100000", "training.save_every=2", "data.workers=1")
    printed = tmp_path / "printed.txt"
    with printed.open("w") as file:
        launcher = subprocess.Popen(
            words, stdout=file, stderr=file, start_new_session=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
    try:
        deadline = time.monotonic() + WATCHDOG_SECONDS
        while (
            not list((tmp_path / "runs" / "run" / "checkpoints").glob("step-*"))
            and launcher.poll() is None
            and time.monotonic() < deadline
        ):
            time.sleep(0.02)
        told = time.monotonic()
        # Launcher and ranks, as srun does; and then the launcher tells its ranks again.
        os.killpg(launcher.pid, number)
        launcher.wait(30 * WATCHDOG_SECONDS / 60)
        seconds = time.monotonic() - told
    finally:
        if launcher.poll() is None:
            os.killpg(launcher.pid, signal.SIGKILL)
    text = printed.read_text()
    (line,) = [line for line in text.splitlines() if line.startswith("error: stopped")]
    step = int(line.removeprefix("error: stopped after step ").split(",")[0])
    assert steps_of(tmp_path / "runs" / "run")[-1] == step
    # Its own word for a launch that a signal ended.
    assert launcher.returncode != 0
    figure("B13", f"torchrun, 2 ranks: saved and ended after {seconds:.1f} s")
