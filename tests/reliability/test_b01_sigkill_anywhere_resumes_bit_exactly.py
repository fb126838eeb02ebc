import contextlib
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from processes import FULL, Plan, seen, start
from run_files import logged, tensors_of

KILLS = 50 if FULL else 10


@pytest.mark.parametrize("method", ["cct", "mean_teacher"])
def test_a_run_that_is_killed_anywhere_ends_with_the_bytes_of_one_that_is_not(
    command: Callable[..., list[str]], tmp_path: Path, figure: Callable[[str, str], None], method: str
) -> None:
    """Labelled and unlabelled images of two domains, two loader processes, batch norm, augmentation; `cct` has dropout,
    `mean_teacher` a moving average.
    """
    settings = {
        "method": method,
        "data__workers": 2,
        "training": {"steps": 30, "log_every": 1, "save_every": 1, "evaluate_every": 10, "keep": 2},
    }
    runs, files = tmp_path / "runs", [tmp_path / "seen-straight"]
    straight = start(command("straight", **settings), tmp_path / "straight.txt", Plan(seen=files[0]))
    assert straight.wait() == 0, straight.text
    reference = seen(files[0])
    assert len(reference) == 30
    chance, kills, attempts = random.Random(method), 0, 0
    while kills < KILLS:
        attempts += 1
        name = f"killed{attempts}"
        records = tmp_path / f"seen-{name}"
        words = command(name, **settings) + ["resume=auto"]
        ended = False
        while not ended:
            records.touch()
            before = records.read_text().count("\n")
            run = start(words, tmp_path / f"{name}.txt", Plan(seen=records))
            if kills < KILLS:
                goal, extra = chance.choice([0, 1, 2, 4, 6]), chance.uniform(0, 0.4)
                with contextlib.suppress(AssertionError):
                    run.wait_for(
                        lambda records=records, before=before, goal=goal: (
                            records.read_text().count("\n") >= before + goal
                        )
                    )
                time.sleep(extra)
                if run.process.is_alive():
                    # Sometimes the loader processes are left to find out by themselves.
                    with contextlib.suppress(ProcessLookupError):
                        chance.choice([os.killpg, os.kill])(run.pid, signal.SIGKILL)
            code = run.wait()
            assert code in (0, -signal.SIGKILL), run.text
            kills, ended = kills + (code != 0), code == 0
        assert tensors_of(runs / name) == tensors_of(runs / "straight")
        assert logged(runs / name) == logged(runs / "straight")
        repeated = seen(records)
        assert repeated.keys() == reference.keys()
        assert all(content == reference[step][0] for step, contents in repeated.items() for content in contents)
    figure("B1", f"{method}: {kills} kills, all bytes, sample ids and losses equal")
