import json
from collections.abc import Callable
from pathlib import Path

import saving
from processes import Plan, call, start
from run_files import steps_of

from multidomain_cct.training.checkpoints.checkpoint import newest_checkpoint

Figure = Callable[[str, str], None]


def test_a_disk_that_is_full_at_any_page_keeps_the_last_good_checkpoint_and_nothing_else(
    tmp_path: Path, figure: Figure
) -> None:
    """Where a process may mount a disk of its own.

    Everywhere, B9 raises the error at each file operation, and below a limit of the system is met.
    """
    run = call(saving.fill_a_disk, (tmp_path / "disk",), tmp_path / "out.txt")
    assert run.wait() == 0, run.text
    found = json.loads(run.text.splitlines()[-1])
    if found["permitted"]:
        assert found["refused"] >= 8
        assert {"model.safetensors", "optimiser.safetensors", "state.json", "MANIFEST.json"} <= set(found["where"])
    figure(
        "B11",
        f"full at each of {found['refused']} pages"
        if found["permitted"]
        else f"mounting is not permitted here ({found['reason']})",
    )


def test_a_run_whose_disk_takes_no_more_ends_with_one_line(
    command: Callable[..., list[str]], tmp_path: Path, figure: Figure
) -> None:
    """The system's limit on the size of a file stands in for a full disk: real writes fail, those of the tensors'
    library too.
    """
    words = command("run", "training.steps=4", "training.save_every=2", "resume=auto")
    first = start([*words, "training.max_skipped=3"], tmp_path / "first.txt", Plan(file_limit=0))
    assert first.wait() == 0, first.text
    folder = tmp_path / "runs" / "run" / "checkpoints"
    (folder / "step-00000004" / "model.safetensors").write_bytes(b"")
    second = start(words, tmp_path / "second.txt", Plan(file_limit=100_000))
    assert second.wait() == 1, second.text
    (line,) = second.errors
    assert line.startswith(
        f"error: {folder}/.step-00000004.tmp/model.safetensors: File too large. Make room or choose another place."
    )
    assert "Traceback" not in second.text
    assert not list(folder.glob(".*"))
    assert steps_of(tmp_path / "runs" / "run") == [2, 4]
    newest, warnings = newest_checkpoint(folder)
    assert newest is not None
    assert newest.name == "step-00000002"
    assert len(warnings) == 1
    figure("B11", "a run ends with one line, the last good checkpoint loads")
