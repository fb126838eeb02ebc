import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from processes import Plan, seen, start, start_ranks
from run_files import DETERMINISTIC, state_of, tensors_of
from safetensors.torch import load

STEPS = 20


def merged(files: list[Path], step: int) -> dict[str, list[str]]:
    """The keys of a step's global batch by domain: the labelled ones of all ranks, then the unlabelled ones."""
    ranks = [seen(file)[step][-1] for file in files]
    found = {}
    for domain in ranks[0]:
        keys = [content[domain][0] for content in ranks]
        half = len(keys[0]) // 2
        found[domain] = [key for part in (slice(None, half), slice(half, None)) for own in keys for key in own[part]]
    return found


def test_a_run_goes_on_in_two_processes_and_in_one_again(
    command: Callable[..., list[str]], tmp_path: Path, figure: Callable[[str, str], None]
) -> None:
    """Stopped after steps 7 and 13, in the middle of epochs of 10 and 8 images in batches of 4."""
    settings: dict[str, Any] = {
        **DETERMINISTIC,
        "training": {"steps": STEPS, "log_every": 1, "save_every": 100, "evaluate_every": 100, "keep": 99},
    }
    batches = [
        "data.labelled_batch=4",
        "data.unlabelled_batch=4",
        "domains.fields.labelled=all",
        "domains.shapes.labelled=all",
        "domains.fields.unlabelled=all",
    ]
    batches += ["domains.shapes.unlabelled=all", "data.workers=1"]
    straight = start(
        command("straight", *batches, **settings), tmp_path / "straight.txt", Plan(seen=tmp_path / "seen-straight")
    )
    words = command("changing", *batches, "resume=auto", **settings)
    files = [[tmp_path / f"seen-{part}-{rank}" for rank in range(world)] for part, world in enumerate((1, 2, 1))]
    first = start(words, tmp_path / "first.txt", Plan(seen=files[0][0], send=(6, signal.SIGTERM)))
    assert first.wait() == 143, first.text
    ranks = start_ranks(
        words, tmp_path / "second.txt", [Plan(seen=files[1][0], send=(12, signal.SIGTERM)), Plan(seen=files[1][1])]
    )
    assert [rank.wait() for rank in ranks] == [143, 143], ranks[0].text + ranks[1].text
    last = start(words, tmp_path / "last.txt", Plan(seen=files[2][0]))
    assert last.wait() == 0, last.text + straight.text
    assert straight.wait() == 0, last.text + straight.text
    assert [state_of(tmp_path / "runs" / "changing", step)["step"] for step in (7, 13, STEPS)] == [7, 13, STEPS]
    for step in range(STEPS):
        part = files[0] if step < 7 else files[1] if step < 13 else files[2]
        assert merged(part, step) == merged([tmp_path / "seen-straight"], step), step
    # The pixels of the steps that one process saw are the same to the bit; those of two are halves, whose losses agree
    # below.
    for step in (*range(7), *range(13, STEPS)):
        part = files[0] if step < 7 else files[2]
        assert seen(part[0])[step][-1] == seen(tmp_path / "seen-straight")[step][-1]
    one, other = (load(tensors_of(tmp_path / "runs" / name)["model.safetensors"]) for name in ("straight", "changing"))
    difference = max((one[name].double() - other[name].double()).abs().max().item() for name in one)
    assert difference <= 1e-4
    figure("B3", f"1 -> 2 -> 1 processes: same order, largest weight difference {difference:.1e} after {STEPS} steps")


def test_a_batch_that_does_not_divide_is_one_line_before_anything_is_read(
    command: Callable[..., list[str]], tmp_path: Path
) -> None:
    ranks = start_ranks(
        command("odd", "data.labelled_batch=3"),
        tmp_path / "odd.txt",
        [Plan(seen=tmp_path / "seen"), Plan(seen=tmp_path / "seen")],
    )
    assert [rank.wait() for rank in ranks] == [2, 2]
    (line,) = [line for rank in ranks for line in rank.errors]
    assert "domains.fields.labelled_batch is 3, which 2 process(es)" in line
    assert "Use a multiple of 2." in line
    assert "Traceback" not in ranks[0].text + ranks[1].text
    assert not (tmp_path / "runs").exists()
    assert not (tmp_path / "seen").exists()
