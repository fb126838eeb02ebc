import json
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import saving
from processes import FULL, call

KILLS = 100 if FULL else 20
Figure = Callable[[str, str], None]


def test_no_loss_of_power_leaves_an_invalid_checkpoint_or_takes_an_acknowledged_one(
    tmp_path: Path, figure: Figure
) -> None:
    """Every file operation of four saves, every order of names and every loss of contents that the disk may show."""
    run = call(saving.lose_power, (tmp_path / "disk",), tmp_path / "out.txt")
    assert run.wait() == 0, run.text
    found = json.loads(run.text.splitlines()[-1])
    assert found["operations"] > 40
    assert found["states"] > 50
    figure("B9", f"{found['states']} states of the disk after {found['operations']} operations: 0 invalid, 0 lost")


def test_the_model_of_the_disk_would_notice_a_writer_that_does_not_sync(tmp_path: Path) -> None:
    run = call(saving.lose_power_without_syncing, (tmp_path / "disk",), tmp_path / "out.txt")
    assert run.wait() == 1, run.text
    assert "AssertionError" in run.text, run.text


def test_neither_an_error_nor_a_death_at_any_file_operation_harms_what_is_published(
    tmp_path: Path, figure: Figure
) -> None:
    run = call(saving.fail_at_every_operation, (tmp_path / "work",), tmp_path / "out.txt")
    assert run.wait() == 0, run.text
    found = json.loads(run.text.splitlines()[-1])
    assert found["raised"] == found["killed"] > 10
    figure("B9", f"errors and deaths at each of {found['killed']} operations: 0 invalid, 0 lost")


def test_kills_in_the_save_window_leave_whole_checkpoints(tmp_path: Path, figure: Figure) -> None:
    chance, folder, told, saver = (
        random.Random(9),
        tmp_path / "checkpoints",
        tmp_path / "acknowledged",
        saving.Saver(64),
    )
    told.touch()
    for _ in range(KILLS):
        lines = told.read_text().count("\n")
        run = call(saving.save_until_killed, (folder, told), tmp_path / "out.txt")
        run.wait_for(lambda lines=lines: told.read_text().count("\n") > lines)
        time.sleep(chance.uniform(0, 0.05))
        os.kill(run.pid, signal.SIGKILL)
        assert run.wait() == -signal.SIGKILL, run.text
        saver.verify(folder, int(told.read_text().split()[-1]))
    figure("B9", f"{KILLS} kills in the save window: 0 invalid, 0 lost of {told.read_text().split()[-1]}")
