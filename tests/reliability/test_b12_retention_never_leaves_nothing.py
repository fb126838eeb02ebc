import json
from collections.abc import Callable
from pathlib import Path

import saving
from processes import call


def test_at_every_moment_of_saving_with_keep_1_a_checkpoint_can_be_loaded(
    tmp_path: Path, figure: Callable[[str, str], None]
) -> None:
    """A listing ahead of each file operation, also while a checkpoint takes the place of one of the same step."""
    run = call(saving.lose_power, (tmp_path / "disk",), tmp_path / "out.txt")
    assert run.wait() == 0, run.text
    loadable = json.loads(run.text.splitlines()[-1])["loadable"]
    assert loadable > 30
    figure("B12", f"{loadable} moments, at least 1 loadable at each")
