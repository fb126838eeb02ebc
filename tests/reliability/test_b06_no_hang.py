import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from file_server import Server, serving
from processes import FULL, WATCHDOG_SECONDS, Plan, seen, start, start_ranks
from run_files import steps_of

from multidomain_cct.__main__ import main
from multidomain_cct.data.batches.order import Stream
from multidomain_cct.data.batches.streams import open_streams
from multidomain_cct.data.specification import read_domain
from multidomain_cct.training.recipe import read_recipe

Words = Callable[..., list[str]]


def test_two_processes_with_uneven_domains_evaluate_save_and_end_together(
    command: Words, tmp_path: Path, figure: Callable[[str, str], None]
) -> None:
    """10 and 8 images to train on, 3 and 5 to score: no share of either is whole."""
    training = {"steps": 9, "log_every": 1, "evaluate_every": 2, "save_every": 3, "keep": 9}
    files = [tmp_path / "seen0", tmp_path / "seen1"]
    ranks = start_ranks(
        command("run", "data.workers=1", training=training), tmp_path / "run.txt", [Plan(seen=file) for file in files]
    )
    assert [rank.wait() for rank in ranks] == [0, 0], ranks[0].text + ranks[1].text
    steps = [list(seen(file)) for file in files]
    assert steps[0] == steps[1] == list(range(9))
    assert {3, 6, 9} <= set(steps_of(tmp_path / "runs" / "run"))
    figure("B6", f"2 ranks: {len(steps[0])} and {len(steps[1])} steps")


def test_two_processes_evaluate_again_and_again(
    command: Words, tmp_path: Path, figure: Callable[[str, str], None]
) -> None:
    """Each evaluation forks loader processes right after a reduction, beside gloo's threads: what is locked at that
    moment would stay locked.
    """
    attempts, steps = (6, 60) if FULL else (1, 20)
    for attempt in range(attempts):
        words = command(
            f"run{attempt}",
            "data.workers=1",
            training={"steps": steps, "log_every": 100, "evaluate_every": 1, "save_every": 100},
        )
        ranks = start_ranks(words, tmp_path / f"run{attempt}.txt", [Plan(), Plan()])
        assert [rank.wait() for rank in ranks] == [0, 0], ranks[0].text + ranks[1].text
    figure("B6", f"{attempts * steps} evaluations by 2 ranks, a loader process for each domain and rank")


def test_an_error_in_one_process_ends_both_with_one_line_that_names_it(
    command: Words, two_domains: Path, tmp_path: Path, figure: Callable[[str, str], None]
) -> None:
    shards = shutil.copytree(two_domains, tmp_path / "shards")
    words = command("run", "data.workers=1", f"data.shards={shards}")
    recipe = read_recipe(Path(words[1]))
    streams = open_streams(read_domain(shards / "domains" / "shapes.yaml"), recipe.domains["shapes"], recipe.data)
    # The second process takes the second half of the first batch of 2.
    number = streams.labelled[Stream("shapes/labelled", 4, recipe.seed).at(1)[1]][1]
    record = streams.sources[0].read(number)
    tar = shards / "shapes" / "train-00000.tar"
    content = bytearray(tar.read_bytes())
    content[content.index(record.image) + 20] ^= 1
    tar.write_bytes(content)
    started = time.monotonic()
    ranks = start_ranks(words, tmp_path / "run.txt", [Plan(), Plan()])
    assert [rank.wait(WATCHDOG_SECONDS / 2) for rank in ranks] == [1, 2], ranks[0].text + ranks[1].text
    (line,) = ranks[1].errors
    assert line.startswith("error: rank 1: ")
    assert "shapes/train-00000.tar" in line
    assert f"key '{record.key}': the bytes differ" in line
    (other,) = ranks[0].errors
    assert other.startswith("error: another process of the run has ended; its own line says why.")
    assert "Traceback" not in ranks[0].text + ranks[1].text
    figure("B6", f"an error on rank 1 ended both after {time.monotonic() - started:.1f} s, start included")


@pytest.fixture
def remote(two_domains: Path, tmp_path: Path) -> Iterator[tuple[Server, list[str]]]:
    """A server of the training images of fields, and the settings of a run that reads them there."""
    served, local = tmp_path / "served", tmp_path / "local"
    shutil.copytree(two_domains / "fields", served)
    for name in ("shapes", "fields"):
        shutil.copytree(
            two_domains / name, local / name, ignore=shutil.ignore_patterns("train-*") if name == "fields" else None
        )
    assert main(["index", "--catalogue", str(served / "train-00000.tar")]) == 0
    with serving(served) as server:
        settings = [
            "data.remote=[http]",
            f"domains.fields.remote={server.address}",
            f"data.cache={tmp_path / 'cache'}",
            f"data.shards={local}",
        ]
        yield server, [*settings, "data.workers=1"]


@pytest.mark.parametrize("lost", ["train.catalogue", "train-00000.tar"])
def test_a_file_that_cannot_be_fetched_is_a_failed_run_and_not_a_mistake(
    command: Words, remote: tuple[Server, list[str]], tmp_path: Path, lost: str
) -> None:
    """In one process and in two; before the first step, and in it."""
    server, settings = remote
    server.faults[lost] = ["403"] * 99
    alone = start(command("alone", *settings), tmp_path / "alone.txt")
    assert alone.wait() == 1, alone.text
    message = f"{server.address}/{lost}: HTTP 403 Forbidden. Check the address and the right to read it."
    assert alone.errors == [f"error: {message}"]
    assert "Traceback" not in alone.text
    ranks = start_ranks(command("two", *settings), tmp_path / "two.txt", [Plan(), Plan()])
    assert [rank.wait() for rank in ranks] == [1, 1], ranks[0].text + ranks[1].text
    found = [line for rank in ranks for line in rank.errors if "403" in line]
    # A shard may have been asked for by either process, or by both.
    assert found
    assert all(line.endswith(message) for line in found)
    assert len(found) == 1 or lost != "train.catalogue"
    assert "Traceback" not in ranks[0].text + ranks[1].text


def test_an_address_that_the_recipe_does_not_allow_is_a_mistake(
    command: Words, remote: tuple[Server, list[str]], tmp_path: Path
) -> None:
    server, settings = remote
    refused = start(command("run", *settings, "data.remote=[https]"), tmp_path / "run.txt")
    assert refused.wait() == 2
    (line,) = refused.errors
    assert "domains.fields.remote" in line
    assert "data.remote=[http]" in line
    assert not server.requests
