"""Two gloo processes stand in for two GPUs."""

import json
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from multidomain_cct.training.checkpoints.checkpoint import checkpoints
from multidomain_cct.training.recipe import Recipe, recipe_from
from multidomain_cct.training.runlog import read_metrics

TinyRecipe = Callable[..., Recipe]
SCRIPT = """
import hashlib, json, sys
from pathlib import Path
from accelerate import Accelerator, PartialState
from multidomain_cct.data.batches import loader
from multidomain_cct.methods.cct import CCT
from multidomain_cct.training import loop, run
from multidomain_cct.training.recipe import read_recipe

count, domains, out, *recipes = int(sys.argv[1]), *map(Path, sys.argv[2:])
state = PartialState(cpu=True)
assert state.num_processes == count, f"world size {state.num_processes}"
# At the end of a run it takes the processes' group down; here another run follows.
Accelerator.end_training = lambda self: None
seen, models = [], []
inner = loader.TrainingSet.__getitem__
def remember(self, number):
    item = inner(self, number)
    seen.append([number, {name: list(batch.keys) for name, batch in item.items()}])
    return item
loader.TrainingSet.__getitem__ = remember
build = run.build_model
def keep(*arguments, **options):
    models.append(build(*arguments, **options))
    return models[-1]
run.build_model = keep
forward, passes = CCT.forward, []
def spoilt(self, batches, progress=1.0):
    passes.append(batches)
    losses = forward(self, batches, progress)
    # Step 2 of two micro-batches each: the fourth forward pass.
    if recipe.stem == "nan" and len(passes) == 4 and state.process_index == 1:
        (out / "spoilt.json").write_text(json.dumps(list(batches["shapes"].keys)))
        losses["shapes/supervised"] = losses["shapes/supervised"] * float("nan")
    return losses
CCT.forward = spoilt
for recipe in recipes:
    seen.clear()
    passes.clear()
    loop.train(read_recipe(recipe), [domains])
    tensors = models[-1].state_dict().values()
    digest = hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in tensors)).hexdigest()
    found = {"seen": seen, "weights": digest}
    (out / f"{recipe.stem}-{state.process_index}.json").write_text(json.dumps(found))
"""
"""Trains recipes one after the other; each process writes what it has seen of each and a digest of its model at the
end. In the recipe `nan` a loss is made nan on the second process.
"""

# Nothing random but the data: frozen norms and a perturbation without randomness. Draws of the other perturbations
# differ by process, as designed.
DETERMINISTIC: dict[str, Any] = {
    "encoder": {"name": "test_resnet", "stride": 8, "context": "fpn", "width": 32, "norm": "frozen"},
    "perturbations": {
        **{kind: {"count": 0} for kind in ("feature_noise", "dropout", "adversarial_noise")},
        "feature_drop": {"count": 2, "low": 0.7, "high": 0.7},
    },
    "training": {"steps": 5, "log_every": 1, "evaluate_every": 100, "save_every": 100},
}


def run_processes(
    count: int, recipes: Recipe | list[Recipe], shards: Path, folder: Path, *, command: bool = False
) -> subprocess.CompletedProcess[str]:
    """Train in `count` processes, by the script above or by the command itself."""
    paths = []
    for recipe in [recipes] if isinstance(recipes, Recipe) else recipes:
        paths.append(str(folder / f"{recipe.name}.yaml"))
        Path(paths[-1]).write_text(recipe.to_yaml())
    launcher = (
        [sys.executable]
        if count == 1
        else [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]
    )
    if command:
        arguments = [*launcher, "-m", "multidomain_cct", *paths, "--domains", str(shards / "domains")]
    else:
        (folder / "script.py").write_text(SCRIPT)
        arguments = [*launcher, str(folder / "script.py"), str(count), str(shards / "domains"), str(folder), *paths]
    return subprocess.run(arguments, capture_output=True, text=True, timeout=600)


# Without randomness of its own a method computes in two processes what it computes in one; the others draw for each
# process apart.
SAME = {
    "cct_together": {"schedule": "together"},
    "cct_alternate": {"schedule": "alternate"},
    "supervised": {"method": "supervised"},
    "usss": {"method": "usss"},
    # Without weight, what the strong views draw does not matter, and what is left is the teacher's average.
    "teacher_alone": {"method": "mean_teacher", "consistency": {"weight": 0}, "schedule": "alternate"},
    # Likewise; the statistics of the teacher's predictions are left too.
    "strong_alone": {"method": "cct_strong", "consistency": {"weight": 0}, "cct_strong": {"weight": 0}},
}
DRAWING = {
    "cct_strong": {"method": "cct_strong", "schedule": "alternate", "norm": "shared"},
    "mean_teacher": {"method": "mean_teacher", "schedule": "alternate", "norm": "shared"},
    "unimatch": {"method": "unimatch", "schedule": "alternate", "norm": "shared"},
    "usss_alternate": {"method": "usss", "schedule": "alternate", "norm": "shared"},
    "cct_drawing": {"perturbations": {"adversarial_noise": {"count": 1}, "dropout": {"count": 1}}, "norm": "shared"},
}
# Alternating domains and accumulated micro-batches, with the trouble in the last micro-batch, where a wrapped model
# waits for a backward pass.
SPOILT = {"nan": {"schedule": "alternate", "batch": 4, "training": DETERMINISTIC["training"] | {"accumulation": 2}}}


@dataclass(frozen=True)
class Worlds:
    """Runs of the same recipes by one process and by two."""

    folder: Path
    printed: str
    """By two processes."""

    def metrics(self, name: str, world: int) -> list[dict[str, Any]]:
        return read_metrics(self.folder / f"world{world}" / name / "metrics.jsonl")

    def weights(self, name: str, world: int) -> dict[str, torch.Tensor]:
        return load_file(checkpoints(self.folder / f"world{world}" / name / "checkpoints")[-1] / "model.safetensors")

    def of_process(self, name: str, world: int, rank: int) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / f"world{world}" / f"{name}-{rank}.json").read_text())
        return found


@pytest.fixture(scope="module")
def worlds(two_domains: Path, tmp_path_factory: pytest.TempPathFactory) -> Worlds:
    """All recipes in two launches: starting the processes takes longer than training in them."""
    folder = tmp_path_factory.mktemp("worlds")
    for world, chosen in ((1, SAME), (2, SAME | DRAWING | SPOILT)):
        (folder / f"world{world}").mkdir()
        recipes = [_recipe(name, folder / f"world{world}", two_domains, **changes) for name, changes in chosen.items()]
        done = run_processes(world, recipes, two_domains, folder / f"world{world}")
        assert done.returncode == 0, done.stderr[-2000:]
    return Worlds(folder, done.stdout)


def _recipe(
    name: str,
    runs: Path,
    shards: Path,
    *,
    schedule: str = "together",
    norm: str = "frozen",
    batch: int = 2,
    **changes: Any,
) -> Recipe:
    plain = DETERMINISTIC | {
        "name": name,
        "runs": str(runs),
        "domains": {"fields": {"labelled": "4", "unlabelled_splits": ["unlabelled"]}, "shapes": {"labelled": "4"}},
        "data": {
            "shards": str(shards),
            "crop": [64, 64],
            "labelled_batch": batch,
            "unlabelled_batch": batch,
            "workers": 0,
            "schedule": schedule,
        },
        "decoder": "bilinear",
    }
    return recipe_from(plain | {"encoder": DETERMINISTIC["encoder"] | {"norm": norm}} | changes, name)


@pytest.mark.parametrize("name", SAME)
def test_two_processes_see_and_compute_what_one_does(worlds: Worlds, name: str) -> None:
    one = worlds.of_process(name, 1, 0)["seen"]
    two = [worlds.of_process(name, 2, rank)["seen"] for rank in (0, 1)]
    assert len(one) == 5
    for step, (number, batches) in enumerate(one):
        assert [ranks[step][0] for ranks in two] == [number, number]
        for domain, keys in batches.items():
            # Each rank's keys are its labelled, then its unlabelled images; one process has two of each, two have one
            # of each.
            halves = [ranks[step][1][domain] for ranks in two]
            kinds = range(len(halves[0]))
            assert keys == [half[kind] for kind in kinds for half in halves]
            assert len(kinds) == (1 if name == "supervised" else 2)
    for alone, together in zip(worlds.metrics(name, 1), worlds.metrics(name, 2), strict=True):
        terms = [key for key in alone if key.startswith(("train/", "val/"))]
        assert terms
        assert terms == [key for key in together if key.startswith(("train/", "val/"))]
        for term in terms:
            assert together[term] == pytest.approx(alone[term], abs=1e-4), f"step {alone['step']}: {term}"
    first, second = (worlds.weights(name, world) for world in (1, 2))
    assert first.keys() == second.keys()
    for tensor, value in first.items():
        torch.testing.assert_close(second[tensor], value, rtol=0, atol=1e-4, msg=tensor)


@pytest.mark.parametrize("name", [*SAME, *DRAWING])
def test_processes_end_with_the_same_model(worlds: Worlds, name: str) -> None:
    # The last evaluation gives all processes the first one's statistics; parameters, teachers and class embeddings
    # agree by themselves.
    assert worlds.of_process(name, 2, 0)["weights"] == worlds.of_process(name, 2, 1)["weights"]
    losses = [value for line in worlds.metrics(name, 2) for key, value in line.items() if key.startswith("train/")]
    assert len(losses) >= 5
    assert all(math.isfinite(value) for value in losses)


@pytest.mark.parametrize("name", ["mean_teacher", "unimatch", "usss_alternate"])
def test_processes_take_the_domains_in_the_same_turns(worlds: Worlds, name: str) -> None:
    turns = [[list(batches) for _, batches in worlds.of_process(name, 2, rank)["seen"]] for rank in (0, 1)]
    assert turns[0] == turns[1] == [["fields"], ["shapes"], ["fields"], ["shapes"], ["fields"]]


def test_a_loss_that_is_not_finite_on_one_process_is_skipped_by_both(worlds: Worlds) -> None:
    (notice,) = [line for line in worlds.printed.splitlines() if "was skipped" in line]
    spoilt = json.loads((worlds.folder / "world2" / "spoilt.json").read_text())
    assert notice.startswith("step 2: shapes/supervised is nan; keys ")
    assert all(key in notice for key in spoilt)
    assert notice.count("train_") == len(spoilt)


def test_a_batch_that_does_not_divide_is_one_line_from_one_process(
    tiny_recipe: TinyRecipe, two_domains: Path, tmp_path: Path
) -> None:
    recipe = tiny_recipe(name="odd", data__labelled_batch=3, **DETERMINISTIC)
    done = run_processes(2, recipe, two_domains, tmp_path, command=True)
    assert done.returncode != 0
    # torchrun's summary repeats the line.
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "domains.fields.labelled_batch is 3" in line
    assert "Use a multiple of 2" in line
    assert not recipe.folder.exists()
