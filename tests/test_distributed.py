"""Two gloo processes stand in for two GPUs."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from multidomain_cct.data.loader import open_streams
from multidomain_cct.data.order import Stream
from multidomain_cct.data.specification import read_domain
from multidomain_cct.training.recipe import Recipe
from multidomain_cct.training.runlog import read_metrics

TinyRecipe = Callable[..., Recipe]
SCRIPT = """
import json, os, sys
from pathlib import Path
import torch
from accelerate import PartialState
from multidomain_cct.data import loader
from multidomain_cct.training.loop import train
from multidomain_cct.training.recipe import read_recipe

recipe, domains, out = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])
state = PartialState(cpu=True)
assert state.num_processes == int(sys.argv[4]), f"world size {state.num_processes}"
seen = []
inner = loader.TrainingSet.__getitem__
def remember(self, number):
    item = inner(self, number)
    seen.append([number, {name: list(batch.keys) for name, batch in item.items()}])
    return item
loader.TrainingSet.__getitem__ = remember
train(read_recipe(recipe), [domains])
(out / f"keys-{state.num_processes}-{state.process_index}.json").write_text(json.dumps(seen))
"""


BATCH_OF_FOUR = {"crop": [64, 64], "labelled_batch": 4, "unlabelled_batch": 4, "workers": 0}
SPOIL = """
from multidomain_cct.model.network import CCT
forward, calls = CCT.forward, [0]
def spoilt(self, batches, ramp=1.0):
    calls[0] += 1
    losses = forward(self, batches, ramp)
    # Step 2 of two micro-batches each: the fourth forward pass.
    if calls[0] == 4 and state.process_index == 1:
        (out / "spoilt.json").write_text(json.dumps(list(batches["shapes"].keys)))
        losses["shapes/supervised"] = losses["shapes/supervised"] * float("nan")
    return losses
CCT.forward = spoilt
"""


def run_processes(count: int, recipe: Recipe, shards: Path, folder: Path, *, spoil: bool = False, command: bool = False) -> subprocess.CompletedProcess[str]:
    """Train in `count` processes: by the script above, with a loss made nan on the second process, or by the command itself."""
    if command:
        (folder / f"{recipe.name}.yaml").write_text(recipe.to_yaml())
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count), "-m", "multidomain_cct"]
        arguments = [*launcher, str(folder / f"{recipe.name}.yaml"), "--domains", str(shards / "domains")]
        return subprocess.run(arguments, capture_output=True, text=True, timeout=300)
    (folder / "script.py").write_text(SCRIPT.replace("train(read_recipe", SPOIL + "train(read_recipe") if spoil else SCRIPT)
    (folder / f"{recipe.name}.yaml").write_text(recipe.to_yaml())
    launcher = [sys.executable] if count == 1 else [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]
    command = [*launcher, str(folder / "script.py"), str(folder / f"{recipe.name}.yaml"), str(shards / "domains"), str(folder), str(count)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.fixture
def settings() -> dict[str, Any]:
    """Nothing random but the data: frozen norms and a perturbation without randomness. Draws of the other perturbations differ by process, as designed."""
    return {
        "encoder": {"name": "test_resnet", "stride": 8, "context": "fpn", "width": 32, "norm": "frozen"},
        "perturbations": {"feature_noise": {"count": 0}, "dropout": {"count": 0}, "feature_drop": {"count": 2, "low": 0.7, "high": 0.7}},
        "training": {"steps": 5, "log_every": 1, "evaluate_every": 100, "save_every": 100},
    }


@pytest.mark.parametrize("schedule", ["together", "alternate"])
def test_two_processes_see_and_compute_what_one_does(
    tiny_recipe: TinyRecipe, two_domains: Path, tmp_path: Path, settings: dict[str, Any], schedule: str
) -> None:
    metrics = {}
    for count in (1, 2):
        recipe = tiny_recipe(name=f"world{count}", data__schedule=schedule, **settings)
        done = run_processes(count, recipe, two_domains, tmp_path)
        assert done.returncode == 0, done.stderr[-2000:]
        metrics[count] = read_metrics(recipe.folder / "metrics.jsonl")
    one = json.loads((tmp_path / "keys-1-0.json").read_text())
    two = [json.loads((tmp_path / f"keys-2-{rank}.json").read_text()) for rank in (0, 1)]
    for step, (number, batches) in enumerate(one):
        assert [ranks[step][0] for ranks in two] == [number, number]
        for name, keys in batches.items():
            # Each rank's keys are its labelled, then its unlabelled images; one process has two of each, two have one of each.
            halves = [ranks[step][1][name] for ranks in two]
            assert keys == [halves[0][0], halves[1][0], halves[0][1], halves[1][1]]
    for alone, together in zip(metrics[1], metrics[2], strict=True):
        terms = [key for key in alone if key.startswith(("train/", "val/"))]
        assert terms and terms == [key for key in together if key.startswith(("train/", "val/"))]
        for term in terms:
            assert together[term] == pytest.approx(alone[term], abs=1e-4), f"step {alone['step']}: {term}"


def test_a_bad_sample_on_one_process_is_named(tiny_recipe: TinyRecipe, two_domains: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    shards = shutil.copytree(two_domains, tmp_path / "shards")
    tar = shards / "shapes" / "train-00000.tar"
    content = bytearray(tar.read_bytes())
    order = Stream("shapes/labelled", 4, 0)
    recipe = tiny_recipe(name="bad", data__shards=str(shards), **settings)
    streams = open_streams(read_domain(shards / "domains" / "shapes.yaml"), recipe.domains["shapes"], recipe.data)
    # The second process takes the second half of the first batch.
    number = streams.labelled[order.at(1)[1]][1]
    record = streams.sources[0].read(number)
    content[content.index(record.image) + 20] ^= 1
    tar.write_bytes(content)
    done = run_processes(2, recipe, shards, tmp_path, command=True)
    assert done.returncode != 0
    line = next(line for line in done.stderr.splitlines() if line.startswith("error: "))
    assert line.startswith("error: rank 1: ") and f"key '{record.key}': the bytes differ" in line


def test_a_loss_that_is_not_finite_on_one_process_is_skipped_by_both(
    tiny_recipe: TinyRecipe, two_domains: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    """Alternating domains and accumulated micro-batches, with the trouble in the last micro-batch, where a wrapped model waits for a backward pass."""
    settings["training"] = settings["training"] | {"accumulation": 2}
    recipe = tiny_recipe(name="nan", data={**BATCH_OF_FOUR, "shards": str(two_domains), "schedule": "alternate"}, **settings)
    done = run_processes(2, recipe, two_domains, tmp_path, spoil=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (notice,) = [line for line in done.stdout.splitlines() if "was skipped" in line]
    spoilt = json.loads((tmp_path / "spoilt.json").read_text())
    assert notice.startswith("step 2: shapes/supervised is nan; keys ") and all(key in notice for key in spoilt)
    assert notice.count("train_") == len(spoilt)


def test_a_batch_that_does_not_divide_is_one_line_from_one_process(
    tiny_recipe: TinyRecipe, two_domains: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    recipe = tiny_recipe(name="odd", data__labelled_batch=3, **settings)
    (tmp_path / "odd.yaml").write_text(recipe.to_yaml())
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "multidomain_cct"]
    done = subprocess.run([*launcher, str(tmp_path / "odd.yaml"), "--domains", str(two_domains / "domains")], capture_output=True, text=True, timeout=200)
    assert done.returncode != 0
    assert done.stderr.count("error: fields: labelled_batch is 3") == 1
    assert not recipe.folder.exists()
