import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from multidomain_cct.data.batches.loader import TrainingSet
from multidomain_cct.data.batches.streams import open_streams
from multidomain_cct.data.shards.index import ShardIndex, index_path
from multidomain_cct.data.specification import read_domain
from multidomain_cct.errors import UserError
from multidomain_cct.files.seeds import seed_from
from multidomain_cct.results.evaluate import evaluate
from multidomain_cct.results.trained_run import TrainedRun
from multidomain_cct.training import loop
from multidomain_cct.training.build import build_model
from multidomain_cct.training.checkpoints.checkpoint import checkpoints, load_run
from multidomain_cct.training.checkpoints.state import read_state
from multidomain_cct.training.loop import RunFailed, train
from multidomain_cct.training.recipe import Recipe
from multidomain_cct.training.runlog import read_metrics
from multidomain_cct.training.step import take_step

TinyRecipe = Callable[..., Recipe]
DETERMINISTIC = {kind: {"count": 0} for kind in ("feature_noise", "dropout", "adversarial_noise")} | {
    "feature_drop": {"count": 2, "low": 0.7, "high": 0.7}
}
FROZEN = {"name": "test_resnet", "stride": 8, "context": "fpn", "width": 32, "norm": "frozen"}


def start(recipe: Recipe, shards: Path) -> Path:
    return train(recipe, [shards / "domains"])


def logged(run: Path, key: str) -> list[float]:
    return [line[key] for line in read_metrics(run / "metrics.jsonl") if key in line]


def weights(run: Path, which: int = -1) -> dict[str, torch.Tensor]:
    return load_file(checkpoints(run / "checkpoints")[which] / "model.safetensors")


def largest_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max((one[name].float() - other[name].float()).abs().max().item() for name in one)


def test_a_run_leaves_its_folder_complete(tiny_run: Path) -> None:
    assert {path.name for path in tiny_run.iterdir()} >= {
        "recipe.yaml",
        "domains",
        "env.json",
        "metrics.jsonl",
        "checkpoints",
    }
    assert sorted(path.name for path in (tiny_run / "domains").iterdir()) == ["fields.yaml", "shapes.yaml"]
    assert json.loads((tiny_run / "env.json").read_text())["command"] == "multidomain_cct train tiny.yaml"
    lines = read_metrics(tiny_run / "metrics.jsonl")
    keys = {key for line in lines for key in line}
    assert {"step", "lr", "sys/images_per_s", "sys/peak_mib", "sys/data_wait_fraction", "val/mean_miou"} <= keys
    for name, last in (("fields", "barn"), ("shapes", "ground")):
        assert {
            f"train/{name}/supervised",
            f"train/{name}/consistency",
            f"val/{name}/miou",
            f"val/{name}/iou/{last}",
        } <= keys


def test_logged_terms_are_the_terms_of_the_forward_pass(tiny_recipe: TinyRecipe, two_domains: Path) -> None:
    recipe = tiny_recipe()
    run = start(recipe, two_domains)
    domains = {name: read_domain(two_domains / "domains" / f"{name}.yaml") for name in recipe.domains}
    streams = [open_streams(domain, recipe.domains[name], recipe.data) for name, domain in domains.items()]
    batches = TrainingSet(streams, seed=recipe.seed, augment=recipe.data.augment)[0]
    assert isinstance(batches, dict)
    model = build_model(recipe, domains, unlabelled={name: True for name in domains}).train()
    torch.manual_seed(seed_from(recipe.seed, 0, 0, "step"))
    losses = model(batches, progress=0.0)
    assert set(losses) == {"fields/supervised", "fields/consistency", "shapes/supervised", "shapes/consistency"}
    for term, value in losses.items():
        assert logged(run, f"train/{term}")[0] == pytest.approx(value.item(), rel=1e-6)


def test_every_step_has_its_own_noise_and_the_learning_rate_of_its_place(
    tiny_recipe: TinyRecipe, two_domains: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds: list[int] = []

    def watched(*arguments: Any, **options: Any) -> Any:
        seeds.append(torch.initial_seed())
        return take_step(*arguments, **options)

    monkeypatch.setattr(loop, "take_step", watched)
    run = start(tiny_recipe(training__steps=3, optimiser__lr=0.2), two_domains)
    assert len(set(seeds)) == 3
    assert logged(run, "lr") == pytest.approx([0.2 * (1 - step / 3) ** 0.9 for step in range(3)])


@pytest.mark.parametrize(
    "supervised_only", [{"method": "supervised"}, {"consistency": {"weight": 0}}], ids=["method", "weight"]
)
def test_supervised_runs_see_the_same_images_and_start_from_the_same_weights(
    tiny_recipe: TinyRecipe, two_domains: Path, supervised_only: dict[str, object]
) -> None:
    cct = start(tiny_recipe(name="cct", encoder=FROZEN), two_domains)
    supervised = start(tiny_recipe(name="supervised", encoder=FROZEN, **supervised_only), two_domains)
    terms = {
        key.split("/")[2]
        for line in read_metrics(supervised / "metrics.jsonl")
        for key in line
        if key.startswith("train/")
    }
    assert terms == {"supervised"}
    assert not any(".auxiliaries." in name for name in weights(supervised))
    # In the first step only images and weights decide the loss.
    assert logged(cct, "train/shapes/supervised")[0] == logged(supervised, "train/shapes/supervised")[0]


@pytest.mark.parametrize("method", ["supervised", "mean_teacher", "unimatch", "usss"])
def test_every_method_starts_from_the_encoder_and_main_decoders_of_cct(
    tiny_recipe: TinyRecipe, two_domains: Path, method: str
) -> None:
    domains = {name: read_domain(two_domains / "domains" / f"{name}.yaml") for name in ("fields", "shapes")}
    cct, own = (
        build_model(tiny_recipe(method=name), domains, unlabelled={name: True for name in domains}).state_dict()
        for name in ("cct", method)
    )
    shared = [name for name in cct if ".auxiliaries." not in name]
    assert len(shared) > 20
    assert {name for name in own if name.startswith(("encoder.", "heads."))} == set(shared)
    assert all(torch.equal(cct[name], own[name]) for name in shared)


def test_accumulation_keeps_the_global_batch(tiny_recipe: TinyRecipe, two_domains: Path) -> None:
    runs = []
    for parts in (1, 2):
        recipe = tiny_recipe(
            name=f"parts{parts}",
            encoder=FROZEN,
            perturbations=DETERMINISTIC,
            training={"steps": 3, "log_every": 1, "accumulation": parts},
        )
        runs.append(start(recipe, two_domains))
    for term in ("fields/supervised", "shapes/consistency"):
        assert logged(runs[0], f"train/{term}") == pytest.approx(logged(runs[1], f"train/{term}"), abs=1e-5)
    assert largest_difference(weights(runs[0]), weights(runs[1])) < 1e-5


@pytest.fixture
def restart() -> Callable[[], None]:
    """Forget the settings of the process's first run, as a new process would."""
    return lambda: AcceleratorState._reset_state(reset_partial_state=True)


def test_mixed_precision_is_not_left_out_in_silence(
    tiny_recipe: TinyRecipe, two_domains: Path, restart: Callable[[], None]
) -> None:
    losses = []
    for precision in ("no", "bf16"):
        restart()
        run = start(tiny_recipe(name=precision, training__precision=precision), two_domains)
        losses.append(logged(run, "train/fields/supervised")[0])
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)


def test_a_tracker_receives_the_metrics(tiny_recipe: TinyRecipe, two_domains: Path) -> None:
    run = start(tiny_recipe(training__trackers=["tensorboard"]), two_domains)
    assert any(path.name.startswith("events.out.tfevents") and path.stat().st_size > 500 for path in run.rglob("*"))


def test_a_tracker_that_is_not_installed_is_refused(tiny_recipe: TinyRecipe, two_domains: Path) -> None:
    with pytest.raises(
        UserError, match="training.trackers names 'tensorbored'.*Installed: .*Did you mean .tensorboard"
    ):
        start(tiny_recipe(training__trackers=["tensorbored"]), two_domains)


def test_alternating_domains_take_turns(tiny_recipe: TinyRecipe, two_domains: Path) -> None:
    run = start(tiny_recipe(data__schedule="alternate", training__steps=4), two_domains)
    lines = [line for line in read_metrics(run / "metrics.jsonl") if "lr" in line]
    assert [sorted({key.split("/")[1] for key in line if key.startswith("train/")}) for line in lines] == [
        ["fields"],
        ["shapes"],
    ] * 2


@pytest.mark.parametrize(
    "changes",
    [
        {"training__precision": "bf16"},
        {"optimiser": {"name": "adamw", "lr": 1e-3}},
        {"encoder__norm": "per_domain"},
        {"training__clip": 0.1},
    ],
)
def test_other_settings_train_and_can_be_loaded(
    tiny_recipe: TinyRecipe, two_domains: Path, changes: dict[str, object]
) -> None:
    run = start(tiny_recipe(**changes), two_domains)
    assert len(losses := logged(run, "train/fields/supervised")) == 2
    assert min(losses) > 0
    state = load_run(run).state
    assert state.step == 2
    assert state.recipe == (run / "recipe.yaml").read_text()
    assert set(state.domains) == {"fields", "shapes"}


@pytest.mark.parametrize(
    ("method", "optimiser"),
    [
        ("cct", {"name": "adamw", "lr": 1e-3}),
        ("cct", {"name": "sgd"}),
        ("mean_teacher", {}),
        ("unimatch", {}),
        ("usss", {}),
    ],
)
def test_resuming_restores_the_optimiser_and_what_a_method_remembers(
    tiny_recipe: TinyRecipe, two_domains: Path, method: str, optimiser: dict[str, object]
) -> None:
    settings = {
        "method": method,
        "optimiser": optimiser,
        "training": {"steps": 4, "save_every": 2, "log_every": 1, "keep": 9},
    }
    again = start(tiny_recipe(name="again", **settings), two_domains)
    last = checkpoints(again / "checkpoints")[-1]
    straight = {path.name: path.read_bytes() for path in last.iterdir() if path.suffix == ".safetensors"}
    shutil.rmtree(last)
    start(tiny_recipe(name="again", resume="auto", **settings), two_domains)
    assert len(straight) == 2
    assert {name: (last / name).read_bytes() for name in straight} == straight


def test_what_a_mean_teacher_run_scores_saves_and_restores_is_the_teacher(
    tiny_recipe: TinyRecipe, two_domains: Path
) -> None:
    recipe = tiny_recipe(
        method="mean_teacher", optimiser={"lr": 0.1}, training={"steps": 3, "log_every": 1, "evaluate_every": 3}
    )
    run = start(recipe, two_domains)
    restored = TrainedRun.load(run)
    tensors = weights(run)
    assert tensors["updates"] == 3
    assert not torch.equal(
        tensors["teacher.heads.shapes.main.classify.weight"], tensors["heads.shapes.main.classify.weight"]
    )
    for result in evaluate(restored, [], None, workers=0):
        assert result.miou == logged(run, f"val/{result.domain.name}/miou")[-1]
    images = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)
    before = restored.model.logits(images, "shapes")
    with torch.no_grad():
        for parameter in (*restored.model.encoder.parameters(), *restored.model.heads.parameters()):
            parameter.zero_()
    assert torch.equal(restored.model.logits(images, "shapes"), before)


def test_a_damaged_newest_checkpoint_is_passed_over_with_a_warning(
    tiny_recipe: TinyRecipe, two_domains: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    training = {"steps": 4, "save_every": 2, "keep": 9}
    run = start(tiny_recipe(training=training), two_domains)
    whole = (checkpoints(run / "checkpoints")[-1] / "model.safetensors").read_bytes()
    (checkpoints(run / "checkpoints")[-1] / "model.safetensors").write_bytes(whole[:-1])
    start(tiny_recipe(training=training, resume="auto"), two_domains)
    printed = capsys.readouterr().out
    assert "step-00000004 is damaged" in printed
    assert "going on from step 2" in printed
    assert (checkpoints(run / "checkpoints")[-1] / "model.safetensors").read_bytes() == whole


def test_a_damaged_later_checkpoint_does_not_push_out_a_new_one(tiny_recipe: TinyRecipe, two_domains: Path) -> None:
    training = {"steps": 4, "save_every": 2, "keep": 9}
    run = start(tiny_recipe(training=training), two_domains)
    (checkpoints(run / "checkpoints")[-1] / "model.safetensors").write_bytes(b"")
    start(tiny_recipe(training=training | {"keep": 1, "save_every": 1}, resume="auto"), two_domains)
    assert load_run(run).state.step == 4


@pytest.mark.parametrize("optimiser", [{"name": "adamw", "lr": 1e-3}, {"name": "sgd"}])
def test_a_run_resumes_before_every_domain_had_its_turn(
    tiny_recipe: TinyRecipe, two_domains: Path, optimiser: dict[str, object]
) -> None:
    settings = {
        "optimiser": optimiser,
        "data__schedule": "alternate",
        "training": {"steps": 4, "save_every": 1, "keep": 9, "log_every": 1},
    }
    again = start(tiny_recipe(name="again", **settings), two_domains)
    straight = weights(again)
    for checkpoint in checkpoints(again / "checkpoints")[1:]:
        shutil.rmtree(checkpoint)
    start(tiny_recipe(name="again", resume="auto", **settings), two_domains)
    assert largest_difference(straight, weights(again)) == 0


def test_other_labelled_images_are_noticed_on_resuming(
    tiny_recipe: TinyRecipe, two_domains: Path, tmp_path: Path
) -> None:
    keys = tmp_path / "keys.txt"
    keys.write_text("train_000\ntrain_001\n")
    settings = {"domains": {"shapes": {"labelled": str(keys)}}, "resume": "auto"}
    start(tiny_recipe(**settings), two_domains)
    keys.write_text("train_000\ntrain_002\n")
    with pytest.raises(UserError, match="was trained on other data in shapes/labelled"):
        start(tiny_recipe(**settings), two_domains)


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), RunFailed, "Tried to allocate"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), RunFailed, "can't allocate"),
        (MemoryError("Unable to allocate 3 GiB"), RunFailed, "Unable to allocate"),
        (RuntimeError("shapes cannot be multiplied"), RuntimeError, "^shapes"),
    ],
)
def test_a_start_that_failed_does_not_stand_in_the_way_and_memory_is_one_line(
    tiny_recipe: TinyRecipe,
    two_domains: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    kind: type[Exception],
    words: str,
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    recipe = tiny_recipe()
    with monkeypatch.context() as broken, pytest.raises(kind, match=words) as caught:
        broken.setattr("multidomain_cct.training.loop.take_step", fail)
        start(recipe, two_domains)
    if kind is RunFailed:
        places = [
            str(caught.value).find(way) for way in ("encoder.checkpoint=true", "accumulation", "bf16", "No check")
        ]
        assert places == sorted(places)
        assert places[0] > 0
        assert "\n" not in str(caught.value)
    assert start(recipe, two_domains) == recipe.folder


def test_out_of_memory_names_the_checkpoint_that_is_safe(
    tiny_recipe: TinyRecipe, two_domains: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = start(tiny_recipe(training__steps=1), two_domains)
    shutil.rmtree(run)
    monkeypatch.setattr("multidomain_cct.training.loop.validate", lambda *_: (_ for _ in ()).throw(MemoryError("gone")))
    with pytest.raises(RunFailed, match=r"out of memory \(gone\).*step-00000001 is safe.*resume=auto"):
        start(tiny_recipe(training={"steps": 3, "save_every": 1, "evaluate_every": 2}), two_domains)


@pytest.mark.parametrize("resume", ["never", "auto"])
def test_a_run_in_use_is_left_alone(tiny_recipe: TinyRecipe, two_domains: Path, resume: str) -> None:
    recipe = tiny_recipe(resume=resume)
    code = f"""
import sys, time
from pathlib import Path
from multidomain_cct.files.lock import locked
with locked(Path({str(recipe.folder)!r}), "training"):
    print("held", flush=True)
    sys.stdin.read()
"""
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(UserError, match=rf"in use by process {other.pid} on .*training"):
            start(recipe, two_domains)
        assert not recipe.folder.exists()
        other.communicate()
    assert start(recipe, two_domains) == recipe.folder
    assert [path.name for path in recipe.folder.parent.iterdir()] == [recipe.name]


def test_a_run_shows_what_it_trains_on_what(
    tiny_recipe: TinyRecipe, two_domains: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start(tiny_recipe(training__steps=4), two_domains)
    lines = capsys.readouterr().out.splitlines()
    words = next(line.split() for line in lines if line.strip().startswith("fields "))
    # 4 of 10 labelled, the other 6 and 6 of another split not; 4 steps of 2 see 8 of these 12.
    assert words == ["fields", "4", "12", "3", "3", "none", "2+2", "64x64", "0.667"]
    facts = "\n".join(lines)
    for fact in ("method cct", "test_resnet", "million parameters", "1 process", "precision no", "4 steps"):
        assert fact in facts


def test_a_run_whose_every_step_is_skipped_has_failed(tiny_recipe: TinyRecipe, two_domains: Path) -> None:
    recipe = tiny_recipe(optimiser={"lr": 1e30, "schedule": "constant"}, training={"steps": 2, "max_skipped": 9})
    broken = tiny_recipe(name="broken", supervised={"loss": "ce"}, optimiser={"lr": 1e30}, training={"steps": 1})
    assert start(broken, two_domains) == broken.folder, "one finite step is no failed run"
    domains = {"shapes": {"labelled": "4", "weight": 3e38, "unlabelled": "none"}}
    with pytest.raises(RunFailed, match="2 steps in a row were skipped. Lower optimiser.lr"):
        start(replace(recipe, domains=tiny_recipe(domains=domains).domains, method="supervised"), two_domains)
    assert not checkpoints(recipe.folder / "checkpoints")


def test_resuming_keeps_the_record_of_the_first_start(tiny_recipe: TinyRecipe, two_domains: Path) -> None:
    run = train(tiny_recipe(), [two_domains / "domains"], command="first")
    train(tiny_recipe(resume="auto"), [two_domains / "domains"], command="second")
    written = json.loads((run / "env.json").read_text())
    assert written["command"] == "first"
    assert [later["command"] for later in written["resumed"]] == ["second"]


def test_an_existing_run_is_never_overwritten(tiny_recipe: TinyRecipe, two_domains: Path) -> None:
    run = start(tiny_recipe(), two_domains)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=r"exists. Continue it with resume=auto, or start another run with name=OTHER"):
        start(tiny_recipe(), two_domains)
    with pytest.raises(UserError, match=r"is a run of another recipe: seed: 0 -> 1"):
        start(tiny_recipe(resume="auto", seed=1), two_domains)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_folder_that_is_no_run_is_left_alone(tiny_recipe: TinyRecipe, two_domains: Path) -> None:
    recipe = tiny_recipe(resume="auto")
    recipe.folder.mkdir(parents=True)
    (recipe.folder / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="is not a run"):
        start(recipe, two_domains)
    assert [path.name for path in recipe.folder.iterdir()] == ["thesis.txt"]


def test_auto_starts_a_run_that_does_not_exist_and_finishes_one_that_is_done(
    tiny_recipe: TinyRecipe, two_domains: Path
) -> None:
    run = start(tiny_recipe(resume="auto"), two_domains)
    before = weights(run)
    start(tiny_recipe(resume="auto"), two_domains)
    assert largest_difference(before, weights(run)) == 0


@pytest.mark.parametrize("method", ["cct", "mean_teacher", "usss"])
def test_a_loss_that_is_not_finite_is_skipped_named_and_ends_the_run(
    tiny_recipe: TinyRecipe, two_domains: Path, capsys: pytest.CaptureFixture[str], method: str
) -> None:
    training = {"steps": 9, "log_every": 1, "max_skipped": 2, "save_every": 1}
    recipe = tiny_recipe(method=method, optimiser={"lr": 1e30, "schedule": "constant"}, training=training)
    with pytest.raises(
        RunFailed, match=r"step 4: (fields|shapes)/\w+ is nan; keys .*train_\d.*; 3 steps in a row were skipped"
    ):
        start(recipe, two_domains)
    assert "step 2: " in capsys.readouterr().out
    # The checkpoints of skipped steps hold the weights of the last good one, a teacher's and class embeddings too.
    kept = checkpoints(recipe.folder / "checkpoints")
    assert read_state(kept[-1]).step == 3
    assert (kept[-1] / "model.safetensors").read_bytes() == (kept[-2] / "model.safetensors").read_bytes()


def test_init_from_takes_the_encoder_and_the_heads_that_match(
    tiny_recipe: TinyRecipe, two_domains: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = start(tiny_recipe(name="old"), two_domains)
    new = start(
        tiny_recipe(name="new", init_from=str(old), domains={"shapes": {"labelled": "4"}}, optimiser={"lr": 1e-12}),
        two_domains,
    )
    assert "head fields: not in this run" in capsys.readouterr().out
    before, after = weights(old), weights(new)
    shared = [name for name in after if not name.endswith(("running_mean", "running_var", "num_batches_tracked"))]
    assert any(name.startswith("heads.shapes.") for name in shared)
    assert max((before[name] - after[name]).abs().max().item() for name in shared) < 1e-6


def test_init_from_another_encoder_is_refused(tiny_run: Path, tiny_recipe: TinyRecipe, two_domains: Path) -> None:
    recipe = tiny_recipe(init_from=str(tiny_run), encoder__width=64)
    with pytest.raises(UserError, match="the encoder of .* differs in"):
        start(recipe, two_domains)
    assert not recipe.folder.exists()


def test_other_shards_are_noticed_on_resuming(tiny_recipe: TinyRecipe, two_domains: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(two_domains, tmp_path / "shards")
    recipe = tiny_recipe(data__shards=str(copy), resume="auto")
    start(recipe, two_domains)
    for path in (copy / "shapes").glob("train-*"):
        path.unlink()
    for path in (copy / "shapes").glob("val-*"):
        path.rename(path.with_name(path.name.replace("val", "train")))
    shutil.copytree(
        two_domains / "shapes", copy / "shapes", dirs_exist_ok=True, ignore=shutil.ignore_patterns("train*")
    )
    with pytest.raises(UserError, match="was trained on other data in shapes/train"):
        start(recipe, two_domains)


def test_checkpoints_beyond_the_newest_and_the_best_are_removed(tiny_recipe: TinyRecipe, two_domains: Path) -> None:
    run = start(
        tiny_recipe(training={"steps": 6, "save_every": 1, "evaluate_every": 2, "keep": 1, "log_every": 1}), two_domains
    )
    state = load_run(run, "best").state
    assert {path.name for path in checkpoints(run / "checkpoints")} == {"step-00000006", f"step-{state.best_step:08d}"}
    means = {
        line["step"]: line["val/mean_miou"] for line in read_metrics(run / "metrics.jsonl") if "val/mean_miou" in line
    }
    assert means[state.best_step] == max(means.values()) == state.best_miou


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"domains": {"fields": {"labelled": "11"}}},
            r"domains.fields.labelled asks for 11 labelled images; there are 10",
        ),
        (
            {"data__labelled_batch": 3, "training": {"steps": 1, "accumulation": 2}},
            r"domains.fields.labelled_batch is 3.*multiple of 2",
        ),
        ({"domains": {"feilds": {}}}, r'names the domain "feilds".*Did you mean "fields"'),
        ({"domains": {"fields": {"val_split": "hard"}}}, r"domains.fields.val_split is .hard.*Its splits: train, val"),
        ({"encoder__name": "resnet5"}, r"which timm does not know"),
        pytest.param(
            {"training__precision": "fp16"},
            r"Use `bf16` or `no`",
            marks=pytest.mark.skipif(torch.accelerator.is_available(), reason="fp16 works here"),
        ),
    ],
)
def test_mistakes_are_found_before_anything_is_written(
    tiny_recipe: TinyRecipe, two_domains: Path, changes: dict[str, object], message: str
) -> None:
    recipe = tiny_recipe(**changes)
    with pytest.raises(UserError, match=message):
        start(recipe, two_domains)
    assert not recipe.folder.exists()


def test_a_run_is_loaded_from_its_folder_alone(tiny_recipe: TinyRecipe, two_domains: Path, tmp_path: Path) -> None:
    folder = start(tiny_recipe(), two_domains).rename(tmp_path / "elsewhere")
    run = TrainedRun.load(folder)
    assert run.recipe == tiny_recipe()
    assert run.model.heads.keys() == {"fields", "shapes"}
    assert not run.model.training


def test_images_that_were_skipped_are_told_and_counted(
    tiny_recipe: TinyRecipe, two_domains: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "data"
    shutil.copytree(two_domains, root)
    shard = root / "fields" / "unlabelled-00000.tar"
    content, index = bytearray(shard.read_bytes()), ShardIndex.load(index_path(shard))
    content[index.offset[0, 0] + 50] ^= 1
    shard.write_bytes(content)
    # Six images of this split and six unlabelled ones of train: six steps of two see each once.
    bad = {"on_bad": "skip", "max_bad_fraction": 0.5}
    run = start(
        tiny_recipe(
            training__steps=6,
            training__log_every=1,
            data__shards=str(root),
            **{f"data__{key}": value for key, value in bad.items()},
        ),
        root,
    )
    counts = logged(run, "data/fields/skipped/image: bytes differ from the index")
    told = [
        line
        for line in capsys.readouterr().out.splitlines()
        if "fields: skipped: " in line and "unlabelled-00000.tar" in line
    ]
    assert counts[-1] == 1
    assert len(told) == 1
