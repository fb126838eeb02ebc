import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from processes import Plan, start, start_ranks


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("world", [1, 2])
def test_a_loader_process_that_is_killed_ends_the_run_within_ten_seconds(
    command: Callable[..., list[str]], tmp_path: Path, figure: Callable[[str, str], None], world: int
) -> None:
    words = command("run", "data.workers=2", "training.steps=1000")
    plans = [Plan(seen=tmp_path / f"seen{rank}", slow=0.05) for rank in range(world)]
    runs = (
        start_ranks(words, tmp_path / "run.txt", plans) if world > 1 else [start(words, tmp_path / "run.txt", plans[0])]
    )
    victim = runs[-1]
    victim.wait_for(lambda: (tmp_path / f"seen{world - 1}").exists() and len(victim.children()) == 2)
    children = [pid for run in runs for pid in run.children()]
    killed = time.monotonic()
    os.kill(victim.children()[0], signal.SIGKILL)
    assert [run.wait(10) for run in runs] == [1] * world
    seconds = time.monotonic() - killed
    printed = "".join(run.text for run in runs)
    assert "Traceback" not in printed
    assert printed.count("a loader process died: DataLoader worker (pid") == 1
    assert victim.errors[0].startswith(
        "error: rank 1: a loader process died" if world == 2 else "error: a loader process died"
    )
    assert "resume=auto" in victim.errors[0]
    assert not any(alive(pid) for pid in children)
    figure("B17", f"{world} process(es): ended after {seconds:.1f} s, 0 orphans")
