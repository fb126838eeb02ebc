from collections.abc import Callable
from pathlib import Path

import pytest
from processes import Plan, seen, start, start_ranks
from run_files import tensors_of

from multidomain_cct.training.runlog import read_metrics

Words = Callable[..., list[str]]


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_both_processes_skip_a_step_whose_loss_is_not_finite_on_one_of_them(
    command: Words, tmp_path: Path, figure: Callable[[str, str], None], precision: str
) -> None:
    """With a moving average of the weights and batch norm: nothing of the step may stay."""
    words = command(
        "run", f"training.precision={precision}", "training.steps=5", "training.save_every=1", method="mean_teacher"
    )
    plans = [Plan(seen=tmp_path / "seen0"), Plan(seen=tmp_path / "seen1", nan_steps=(2,))]
    ranks = start_ranks(words, tmp_path / "run.txt", plans)
    assert [rank.wait() for rank in ranks] == [0, 0], ranks[0].text + ranks[1].text
    run = tmp_path / "runs" / "run"
    assert tensors_of(run, 3) == tensors_of(run, 2)
    assert tensors_of(run, 4) != tensors_of(run, 3)
    keys = seen(tmp_path / "seen1")[2][0]["shapes"][0]
    (notice,) = [line for rank in ranks for line in rank.text.splitlines() if "was skipped" in line]
    assert (
        notice == f"step 3: shapes/supervised is nan; keys {', '.join(keys)} (last finite at 2). The step was skipped."
    )
    assert [line["sys/skipped_steps"] for line in read_metrics(run / "metrics.jsonl") if "lr" in line] == [
        0,
        0,
        1,
        0,
        0,
    ]
    figure("B14", f"precision {precision}: skipped by both, weights, average and optimiser equal to the bit")


def test_ten_steps_in_a_row_may_be_skipped_and_an_eleventh_ends_the_run(
    command: Words, tmp_path: Path, figure: Callable[[str, str], None]
) -> None:
    survived = start(
        command("ten", "training.steps=13", "training.save_every=1"),
        tmp_path / "ten.txt",
        Plan(nan_steps=tuple(range(2, 12))),
    )
    ended = start(
        command("eleven", "training.steps=14"),
        tmp_path / "eleven.txt",
        Plan(nan_steps=tuple(range(2, 13)), nan_domain="fields"),
    )
    assert survived.wait() == 0, survived.text
    run = tmp_path / "runs" / "ten"
    assert tensors_of(run, 2) == tensors_of(run, 12) != tensors_of(run, 13)
    assert sum(line.get("sys/skipped_steps", 0) for line in read_metrics(run / "metrics.jsonl")) == 10
    assert ended.wait() == 1
    (line,) = ended.errors
    assert line.startswith("error: step 13: fields/supervised is nan; keys ")
    assert "11 steps in a row were skipped" in line
    assert "Traceback" not in ended.text
    figure("B14", "10 in a row skipped and counted, the 11th ends the run with one line")
