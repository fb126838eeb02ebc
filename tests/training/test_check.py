"""What is found out about a recipe before it is trained: each finding has a severity, a key and a remedy."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from multidomain_cct.data.domain import Domain, LabelClass
from multidomain_cct.errors import UserError
from multidomain_cct.training.check import check, check_recipe
from multidomain_cct.training.findings import Finding, require
from multidomain_cct.training.loop import train
from multidomain_cct.training.recipe import Recipe, read_recipe

TinyRecipe = Callable[..., Recipe]
SHIPPED = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
OBJECTS = {"object_mask": {"count": 1}, "context_mask": {"count": 1}, "guided_cutout": {"count": 3}}
WITHOUT_OBJECTS = {"dropout": {"count": 2}} | {kind: {"count": 0} for kind in OBJECTS}
NONE_OF_THE_REST = {kind: {"count": 0} for kind in ("feature_noise", "feature_drop", "dropout", "adversarial_noise")}


def only(findings: list[Finding], severity: str) -> Finding:
    """The one finding, of this severity."""
    (finding,) = findings
    assert finding.severity == severity
    return finding


@pytest.fixture
def findings(two_domains: Path, tiny_recipe: TinyRecipe) -> Callable[..., list[Finding]]:
    """A function that checks a tiny recipe with these changes, and with domains of its own if some are given."""

    def run(own: Mapping[str, Domain] | None = None, parts: int = 1, **changes: Any) -> list[Finding]:
        recipe = tiny_recipe(**{"perturbations": WITHOUT_OBJECTS} | changes)
        folder = Path(recipe.runs).parent / "own_domains"
        folder.mkdir(exist_ok=True)
        for domain in (own or {}).values():
            (folder / f"{domain.name}.yaml").write_text(domain.to_yaml(), encoding="utf-8")
        return check(recipe, [folder, two_domains / "domains"], parts=parts)[0]

    return run


@pytest.mark.parametrize("path", SHIPPED, ids=[path.stem for path in SHIPPED])
def test_the_settings_of_shipped_recipes_have_no_errors(path: Path) -> None:
    require(check_recipe(read_recipe(path)))


def test_a_recipe_that_can_be_trained_has_no_findings_and_its_data_are_open(
    two_domains: Path, tiny_recipe: TinyRecipe
) -> None:
    found, data = check(tiny_recipe(perturbations=WITHOUT_OBJECTS), [two_domains / "domains"])
    assert found == []
    assert list(data.domains) == ["fields", "shapes"]
    assert [len(stream.labelled) for stream in data.streams] == [4, 4]
    assert {name: len(shards) for name, shards in data.scored.items()} == {"fields": 3, "shapes": 5}


def test_the_first_error_is_raised_and_the_rest_is_returned() -> None:
    notice, error = Finding("notice", "a", "a is left out"), Finding("error", "b", "b is wrong")
    assert require([notice]) == [notice]
    with pytest.raises(UserError, match="^b is wrong$"):
        require([notice, error, Finding("error", "c", "c is wrong")])


# Settings


@pytest.mark.parametrize(
    ("domain", "key", "remedy"),
    [
        ({"crop": [100, 100]}, "crop", r"Use for example \[96, 96\]"),
        ({"crop": [64]}, "crop", r"it is \[width, height\]"),
        ({"val_split": "test"}, "val_split", "Use `val`"),
        ({"unlabelled_splits": ["train"]}, "unlabelled_splits", "Name each once"),
        ({"weak_split": "x_weak", "unlabelled_splits": ["x_weak"]}, "unlabelled_splits", "repeats a split"),
        ({"weak_split": "train"}, "weak_split", "end in _weak"),
        ({"unlabelled_splits": ["val"]}, "", "Name another split"),
        ({"consistency": {"stride": 3}}, "consistency.stride", "does not divide encoder.stride 8"),
    ],
)
def test_settings_that_contradict_each_other_are_an_error_with_key_and_remedy(
    findings: Callable[..., list[Finding]], domain: dict[str, Any], key: str, remedy: str
) -> None:
    finding = only(findings(domains={"shapes": domain}), "error")
    assert finding.key == f"domains.shapes.{key}".removesuffix(".")
    assert finding.message.startswith(finding.key)
    pytest.raises(UserError, require, [finding]).match(remedy)


def test_all_errors_are_found_at_once(findings: Callable[..., list[Finding]]) -> None:
    found = findings(domains={"feilds": {"val_split": "test"}, "shapes": {"crop": [60, 60]}}, data__crop=[1])
    assert [finding.key for finding in found] == [
        "domains.feilds.val_split",
        "data.crop",
        "domains.shapes.crop",
        "domains.feilds",
    ]


def test_norms_that_can_never_be_trained_are_a_warning(tiny_recipe: TinyRecipe) -> None:
    frozen = {"name": "test_resnet", "stride": 8, "context": "none", "width": 32, "weights": "none", "norm": "frozen"}
    assert only(list(check_recipe(tiny_recipe(encoder=frozen))), "warning").key == "encoder.norm"
    assert list(check_recipe(tiny_recipe(encoder=frozen, init_from="runs/other"))) == []


def test_a_frozen_backbone_without_weights_is_a_warning(tiny_recipe: TinyRecipe) -> None:
    encoder = {"name": "test_resnet", "stride": 8, "context": "none", "width": 32, "weights": "none", "freeze": True}
    assert only(list(check_recipe(tiny_recipe(encoder=encoder))), "warning").key == "encoder.freeze"
    assert list(check_recipe(tiny_recipe(encoder=encoder, init_from="runs/other"))) == []


@pytest.mark.parametrize(
    ("encoder", "severity", "words"),
    [
        ({"name": "test_resnet", "stride": 8}, "error", "timm tells no layers of test_resnet"),
        ({"norm": "per_domain"}, "error", "Use norm=shared or frozen"),
        ({"freeze": True, "weights": "timm"}, "warning", "it does nothing"),
    ],
)
def test_a_layer_decay_that_cannot_be_had_is_told(
    tiny_recipe: TinyRecipe, encoder: dict[str, object], severity: str, words: str
) -> None:
    settings = {"name": "test_vit", "stride": 16, "context": "none", "width": 32} | encoder
    recipe = tiny_recipe(encoder=settings, optimiser={"layer_decay": 0.8}, data={"shards": "x", "crop": [96, 96]})
    finding = only([each for each in check_recipe(recipe) if each.severity != "notice"], severity)
    assert finding.key == "optimiser.layer_decay"
    assert words in finding.message


@pytest.mark.parametrize(
    ("encoder", "words"),
    [
        ({"name": "resnet5"}, ("resnet50",)),
        ({"stride": 12}, ("encoder.stride is 12", "8, 16")),
        ({"context": "psp", "stride": 4}, ("encoder.stride is 4", "encoder.stride=8")),
        ({"name": "test_vit", "context": "fpn", "stride": 32}, ("encoder.stride is 32", "allow 16, 8, 4")),
    ],
)
def test_an_encoder_that_cannot_be_built_is_an_error(
    tiny_recipe: TinyRecipe, encoder: dict[str, object], words: tuple[str, ...]
) -> None:
    settings = {"name": "test_resnet", "stride": 8, "context": "fpn", "width": 32} | encoder
    found = check_recipe(tiny_recipe(encoder=settings, data={"shards": "x", "crop": [96, 96]}))
    finding = only([finding for finding in found if finding.key == "encoder"], "error")
    assert all(word in finding.message for word in words)


def test_image_labels_that_training_does_not_read_are_noticed(tiny_recipe: TinyRecipe) -> None:
    finding = only(list(check_recipe(tiny_recipe(domains={"shapes": {"image_labels": "masks"}}))), "notice")
    assert "domains.shapes.weak_split" in finding.message
    both = {"image_labels": "masks", "weak_split": "train_weak"}
    assert list(check_recipe(tiny_recipe(domains={"shapes": both}))) == []


# Domains


def test_a_domain_that_is_not_known_is_named_by_the_recipe(findings: Callable[..., list[Finding]]) -> None:
    finding = only(findings(domains={"feilds": {}}), "error")
    assert finding.key == "domains.feilds"
    assert 'Did you mean "fields"' in finding.message


@pytest.mark.parametrize("thing", [False, True], ids=["no_objects", "no_context"])
def test_auxiliary_decoders_that_a_class_table_does_not_allow_are_noticed_once(
    findings: Callable[..., list[Finding]], tiny_domain: Callable[..., Domain], thing: bool
) -> None:
    shapes = tiny_domain("shapes")
    shapes = replace(shapes, classes=tuple(replace(label, thing=thing) for label in shapes.classes))
    finding = only(findings({"shapes": shapes}, domains={"shapes": {"labelled": "4"}}, perturbations=OBJECTS), "notice")
    assert finding.key == "domains.shapes.perturbations"
    assert "5 auxiliary decoders" in finding.message
    assert "None is left" not in finding.message


def test_a_domain_without_auxiliary_decoders_does_not_use_its_unlabelled_images(
    findings: Callable[..., list[Finding]],
) -> None:
    finding = findings(domains={"shapes": {"labelled": "4"}}, perturbations=OBJECTS | NONE_OF_THE_REST)[0]
    assert finding.message.endswith("None is left, so its unlabelled images are not used.")


@pytest.mark.parametrize("changes", [{"method": "mean_teacher"}, {"consistency": {"weight": 0}}])
def test_decoders_that_would_not_be_used_are_not_noticed(
    findings: Callable[..., list[Finding]], changes: dict[str, Any]
) -> None:
    assert findings(perturbations=OBJECTS, **changes) == []


def test_a_lender_that_is_not_in_the_recipe_is_named_with_what_to_add(
    findings: Callable[..., list[Finding]], tiny_domain: Callable[..., Domain]
) -> None:
    dusk = replace(tiny_domain("shapes"), name="dusk", labels_of="shapes")
    finding = only(findings({"dusk": dusk}, domains={"dusk": {}}), "error")
    assert finding.message.endswith("Add it: domains.shapes.")


def test_comparing_label_spaces_takes_two(findings: Callable[..., list[Finding]]) -> None:
    finding = only(findings(method="usss", domains={"shapes": {}}), "error")
    assert finding.key == "method"
    assert "Add a domain" in finding.message


def test_a_table_of_one_class_is_a_warning(
    findings: Callable[..., list[Finding]], tiny_domain: Callable[..., Domain]
) -> None:
    single = replace(tiny_domain("shapes"), classes=tiny_domain("shapes").classes[:1])
    found = findings({"shapes": single}, domains={"shapes": {"labelled": "4"}})
    assert any(each.severity == "warning" and "one class" in each.message for each in found)


# Data


@pytest.mark.parametrize("key", ["val_split", "train_split"])
def test_a_split_that_the_domain_does_not_have_is_answered_with_its_splits(
    findings: Callable[..., list[Finding]], key: str
) -> None:
    finding = only(findings(domains={"shapes": {key: "valid"}}), "error")
    assert finding.key == f"domains.shapes.{key}"
    for word in ("'valid'", "train, val", 'Did you mean "val"'):
        assert word in finding.message
    assert ("write none" in finding.message) == (key == "val_split")


@pytest.mark.parametrize(("method", "consistency"), [("cct", 1.0), ("mean_teacher", 1.0), ("cct", 0.0)])
def test_a_method_for_unlabelled_images_without_any_is_a_warning_unless_they_are_turned_off(
    findings: Callable[..., list[Finding]], method: str, consistency: float
) -> None:
    found = findings(domains={"shapes": {}}, method=method, consistency={"weight": consistency})
    assert [finding.key for finding in found] == (["method"] if consistency else [])
    assert all("method=supervised" in finding.message for finding in found)


def test_a_batch_that_repeats_images_is_a_notice(findings: Callable[..., list[Finding]]) -> None:
    finding = only(findings(domains={"shapes": {"labelled": "4", "labelled_batch": 6}}), "notice")
    assert finding.key == "domains.shapes.labelled_batch"
    assert "there are 4 labelled images" in finding.message


@pytest.mark.parametrize(("crop", "larger"), [([96, 72], False), ([104, 72], True), ([96, 80], True)])
def test_a_crop_larger_than_the_images_is_one_notice(
    findings: Callable[..., list[Finding]], crop: list[int], larger: bool
) -> None:
    found = findings(domains={"shapes": {"labelled": "4", "crop": crop}})
    assert [finding.key for finding in found] == ["domains.shapes.crop"] * larger
    assert all("[96, 72]" in finding.message for finding in found)


@pytest.mark.parametrize(
    ("changes", "parts", "key"),
    [
        ({"labelled_batch": 1}, 1, "data.labelled_batch"),
        ({"labelled_batch": 4}, 4, "data.labelled_batch"),
        ({"labelled_batch": 2, "encoder__norm": "per_domain"}, 2, "domains.shapes.labelled_batch"),
        ({"labelled_batch": 1, "encoder__norm": "frozen"}, 1, None),
        ({"labelled_batch": 4}, 2, None),
    ],
)
def test_batch_norm_of_a_single_image_is_an_error(
    findings: Callable[..., list[Finding]], changes: dict[str, Any], parts: int, key: str | None
) -> None:
    batch = changes.pop("labelled_batch")
    domains = {"shapes": {"labelled": "4", "unlabelled": "none", "labelled_batch": batch}}
    found = findings(domains=domains, method="supervised", parts=parts, **changes)
    assert [finding.key for finding in found if finding.severity == "error"] == ([key] if key else [])
    for finding in found:
        for remedy in ("accumulation", "processes", "encoder.norm=frozen"):
            assert finding.severity != "error" or remedy in finding.message


def test_shards_are_looked_for_beside_the_recipe_and_both_places_are_shown(
    two_domains: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere, project = tmp_path / "elsewhere", tmp_path / "project"
    for folder in (elsewhere, project / "recipes", project / "lists"):
        folder.mkdir(parents=True)
    recipe = project / "recipes" / "mine.yaml"
    recipe.write_text("domains: {shapes: {labelled: lists/few.txt, unlabelled: none}}\nmethod: supervised\n")
    monkeypatch.chdir(elsewhere)
    settings = ["encoder.name=test_resnet", "encoder.width=32", "data.crop=[64,64]"]
    (missing,) = (each for each in check(read_recipe(recipe, settings), [two_domains / "domains"])[0][:1])
    assert str(elsewhere) in missing.message
    assert str(project) in missing.message
    (project / "lists" / "few.txt").write_text("train_000\ntrain_002\n")
    (project / "data").mkdir()
    (project / "data" / "shards").symlink_to(two_domains)
    found, data = check(read_recipe(recipe, settings), [two_domains / "domains"])
    assert [each.message for each in found if each.severity == "error"] == []
    assert len(data.streams[0].labelled) == 2
    assert read_recipe(recipe).runs == "runs"
    (project / "runs").mkdir()
    assert read_recipe(recipe).folder == project / "runs" / "mine"


def test_missing_shards_are_named_with_the_command_that_makes_them(findings: Callable[..., list[Finding]]) -> None:
    found = findings(data__shards="nowhere")
    assert {finding.severity for finding in found} == {"error"}
    assert found[0].key == "domains.fields"
    assert "python -m multidomain_cct pack fields" in found[0].message


def test_classes_that_the_labelled_images_do_not_show_are_noticed(
    findings: Callable[..., list[Finding]], tiny_domain: Callable[..., Domain]
) -> None:
    shapes = tiny_domain("shapes")
    taller = replace(shapes, classes=(*shapes.classes, LabelClass("tower", (9, 9, 9))))
    finding = only(findings({"shapes": taller}), "warning")
    assert finding.key == "domains.shapes.labelled"
    assert 'no pixel of the class "tower"' in finding.message


def test_a_crop_larger_than_every_image_is_noticed_once_for_each_domain(findings: Callable[..., list[Finding]]) -> None:
    found = findings(data__crop=[256, 256])
    assert [finding.key for finding in found if "larger than every image" in finding.message] == [
        "domains.fields.crop",
        "domains.shapes.crop",
    ]
    assert {finding.severity for finding in found} == {"notice"}


def test_loader_processes_without_room_are_an_error(
    findings: Callable[..., list[Finding]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_bavail=1, f_frsize=1))
    assert findings(data__workers=0) == []
    finding = only(findings(data__workers=1), "error")
    assert finding.key == "data.workers"
    assert "--shm-size" in finding.message


@pytest.mark.parametrize(("key", "accumulation", "parts"), [("labelled_batch", 1, 4), ("unlabelled_batch", 3, 6)])
def test_a_batch_that_does_not_divide_is_an_error_with_the_multiple(
    findings: Callable[..., list[Finding]], key: str, accumulation: int, parts: int
) -> None:
    sizes = {"labelled_batch": 12, "unlabelled_batch": 12} | {key: 10}
    found = findings(domains={"shapes": {"labelled": "4"} | sizes}, training__accumulation=accumulation, parts=parts)
    finding = only([finding for finding in found if finding.severity == "error"], "error")
    assert finding.key == f"domains.shapes.{key}"
    assert finding.message.endswith(f"Use a multiple of {parts}.")


def test_a_run_without_training_images_is_an_error(findings: Callable[..., list[Finding]]) -> None:
    found = findings(domains={"shapes": {"labelled": "none"}}, method="supervised")
    assert [finding.key for finding in found] == ["domains", "domains.shapes"]


def test_a_label_space_that_nothing_labels_is_an_error(findings: Callable[..., list[Finding]]) -> None:
    finding = only(findings(domains={"fields": {}, "shapes": {"labelled": "none"}}), "error")
    assert finding.key == "domains.shapes"
    assert "domains.shapes.labelled" in finding.message


def test_a_method_for_unlabelled_images_needs_some(findings: Callable[..., list[Finding]]) -> None:
    none = {"unlabelled": "none"}
    finding = only(findings(domains={"fields": none, "shapes": none}, method="usss"), "error")
    assert finding.key == "method"
    assert "method=supervised" in finding.message


def test_more_decoders_than_there_are_cannot_be_drawn(findings: Callable[..., list[Finding]]) -> None:
    finding = only(findings(domains={"shapes": {"labelled": "4", "consistency": {"sample": 99}}}), "error")
    assert finding.key == "domains.shapes.consistency.sample"


@pytest.mark.parametrize("method", ["mean_teacher", "unimatch"])
def test_a_single_image_that_cannot_be_mixed_is_a_warning(findings: Callable[..., list[Finding]], method: str) -> None:
    domains = {"shapes": {"labelled": "4", "labelled_batch": 4, "unlabelled_batch": 4}}
    finding = only(findings(method=method, domains=domains, parts=4), "warning")
    assert finding.key == "domains.shapes.unlabelled_batch"
    assert "cutmix does nothing" in finding.message


def test_init_from_something_that_is_no_run_is_an_error(findings: Callable[..., list[Finding]]) -> None:
    assert only(findings(init_from="nowhere"), "error").key == "init_from"


def test_fp16_on_a_cpu_is_an_error(findings: Callable[..., list[Finding]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    found = findings(training__precision="fp16")
    assert found[0].severity == "error"
    assert found[0].key == "training.precision"


def test_a_run_prints_its_notices_once(
    tiny_recipe: TinyRecipe, two_domains: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"domains": {"shapes": {"labelled": "4", "val_split": ""}}, "perturbations": OBJECTS}
    train(tiny_recipe(training__steps=1, **settings), [two_domains / "domains"])
    assert capsys.readouterr().out.count("5 auxiliary decoders") == 1
