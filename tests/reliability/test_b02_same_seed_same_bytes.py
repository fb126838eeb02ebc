import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from processes import FULL, WATCHDOG_SECONDS, Plan, seen, start
from run_files import logged, tensors_of


def test_neither_loader_processes_nor_prefetch_nor_hash_seed_change_a_byte(
    command: Callable[..., list[str]], tmp_path: Path, figure: Callable[[str, str], None]
) -> None:
    training = {"steps": 4, "log_every": 1, "evaluate_every": 2, "save_every": 100}
    pairs = [(0, 1), (1, 4), (2, 1), (4, 4), *([(1, 1), (2, 4), (4, 1)] if FULL else [])]
    variants = {f"w{workers}p{prefetch}": (workers, prefetch) for workers, prefetch in pairs}
    for name, (workers, prefetch) in variants.items():
        words = command(
            name, training=training, data={**_data(tmp_path, command), "workers": workers, "prefetch": prefetch}
        )
        run = start(words, tmp_path / f"{name}.txt", Plan(seen=tmp_path / f"seen-{name}"))
        assert run.wait() == 0, run.text
    # A hash seed is read when the interpreter starts; the runs before have the random one of the fork server.
    seeds = ("0", "1") if FULL else ("1",)
    for seed in seeds:
        words = [sys.executable, "-m", "multidomain_cct", *command(f"hash{seed}", training=training)]
        subprocess.run(
            words,
            check=True,
            timeout=2 * WATCHDOG_SECONDS,
            capture_output=True,
            env=os.environ | {"PYTHONHASHSEED": seed},
        )
    names = [*variants, *(f"hash{seed}" for seed in seeds)]
    reference = tmp_path / "runs" / names[0]
    for name in names[1:]:
        assert tensors_of(tmp_path / "runs" / name) == tensors_of(reference), name
        assert logged(tmp_path / "runs" / name) == logged(reference), name
    for name in variants:
        assert seen(tmp_path / f"seen-{name}") == seen(tmp_path / f"seen-{names[0]}")
    hashes = f"hash seeds random {' '.join(seeds)}"
    figure("B2", f"{len(names)} runs, workers 0 1 2 4, prefetch 1 4, {hashes}: all bytes equal")


def _data(tmp_path: Path, command: Callable[..., list[str]]) -> dict[str, object]:
    """The data section of the tiny recipe."""
    from multidomain_cct.training.recipe import read_recipe

    data = read_recipe(Path(command("plain")[1])).data
    return {
        "shards": data.shards,
        "crop": data.crop,
        "labelled_batch": data.labelled_batch,
        "unlabelled_batch": data.unlabelled_batch,
    }
