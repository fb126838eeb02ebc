from dataclasses import replace
from pathlib import Path

import pytest

from multidomain_cct.data.specification import domain_folders, find_domain
from multidomain_cct.errors import UserError
from multidomain_cct.training.recipe import differences, read_recipe, read_run_recipe

SHIPPED = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
BASE = "domains:\n  camvid: {labelled: 50}\n  cityscapes:\n"


def write(folder: Path, text: str) -> Path:
    path = folder / "mine.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("path", SHIPPED, ids=[path.stem for path in SHIPPED])
def test_every_shipped_recipe_loads_with_its_domains_and_says_what_it_is(path: Path) -> None:
    recipe = read_recipe(path)
    assert recipe.name == path.stem
    for name, choice in recipe.domains.items():
        domain = find_domain(name, domain_folders(recipe=path))
        assert {
            choice.train_split,
            *choice.unlabelled_splits,
            *([choice.val_split] if choice.val_split else []),
        } <= set(domain.splits)
        assert choice.val_split != "test" or "val" not in domain.splits
    header = path.read_text().split("domains:")[0]
    assert "accelerate launch -m multidomain_cct" in header
    for word in ("What:", "Takes:", "Reaches:", "Command:"):
        assert word in header, f"{path.name} does not say {word}"
    assert "@" not in header, f"{path.name} has a place that was not filled in"


def test_a_recipe_survives_being_written_and_read(tmp_path: Path) -> None:
    recipe = read_recipe(
        write(tmp_path, BASE), ["domains.camvid.crop=[96,64]", "optimiser.lr=2e-2", "training.precision=no"]
    )
    assert read_recipe(write(tmp_path, recipe.to_yaml())) == recipe
    assert recipe.name == "mine"
    assert recipe.optimiser.lr == 0.02
    assert recipe.training.precision == "no"
    assert recipe.domains["camvid"].labelled == "50"
    assert recipe.domains["cityscapes"].labelled == "all"


def test_an_override_can_add_a_domain(tmp_path: Path) -> None:
    assert list(read_recipe(write(tmp_path, BASE), ["domains.ccp.labelled=1/16"]).domains) == [
        "camvid",
        "cityscapes",
        "ccp",
    ]


@pytest.mark.parametrize("text", ["", "none", "null"])
def test_a_domain_may_have_no_val_split(tmp_path: Path, text: str) -> None:
    overridden = read_recipe(write(tmp_path, BASE), [f"domains.camvid.val_split={text}"])
    assert overridden.domains["camvid"].val_split == ""
    assert overridden.domains["cityscapes"].val_split == "val"
    written = read_recipe(write(tmp_path, f"domains: {{camvid: {{val_split: {text}}}}}"))
    assert written.domains["camvid"].val_split == ""


def test_null_drops_a_domain(tmp_path: Path) -> None:
    assert list(read_recipe(write(tmp_path, BASE), ["domains.camvid=null"]).domains) == ["cityscapes"]
    with pytest.raises(UserError, match="domains is empty"):
        read_recipe(write(tmp_path, BASE), ["domains.camvid=null", "domains.cityscapes=null"])
    with pytest.raises(UserError, match='no such domain. Did you mean "camvid"'):
        read_recipe(write(tmp_path, BASE), ["domains.camvd=null"])


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("lr=0.1", "optimiser.lr"),
        ("steps=9", "training.steps"),
        ("batch_size=4", "data.labelled_batch"),
        ("crop=[64,64]", "data.crop"),
        ("training.lr=1", "optimiser.lr"),
    ],
)
def test_a_short_key_is_answered_with_the_full_one(tmp_path: Path, override: str, key: str) -> None:
    with pytest.raises(UserError, match=rf"unknown key .*{key}\b"):
        read_recipe(write(tmp_path, BASE), [override])


def test_a_replaced_recipe_keeps_its_file(tmp_path: Path) -> None:
    recipe = read_recipe(write(tmp_path, BASE))
    assert replace(recipe, seed=3).file == tmp_path / "mine.yaml"
    assert "file" not in recipe.to_yaml().split("\n")[0]
    with pytest.raises(UserError, match='unknown key "file"'):
        read_recipe(write(tmp_path, BASE), ["file=x.yaml"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.crpo=3", 'unknown key "data.crpo".*Did you mean "crop"'),
        ("domains.camvid.labeled=3", 'unknown key "domains.camvid.labeled".*Did you mean "labelled"'),
        ("perturbation.dropout.count=3", 'Did you mean "perturbations"'),
        ("training.steps=many", "training.steps is 'many'.*could not be converted to Integer"),
        ("data.crop=abc", "data.crop is 'abc': a list is expected"),
        ("seed=${oc.env:HOME}", "plain values, without"),
        ("encoder.context=pspp", "encoder.context is 'pspp'; it is one of psp, fpn, none"),
        ("data=3", "data is 3; it is a section"),
        ("seed.x=3", "seed is"),
        ("training.clip=null", "training.clip is None"),
        ("training.precision=fp8", "no, bf16, fp16"),
        ("training.steps=0", "at least 1"),
        ("resume=yes", "it is one of never, auto, force"),
        ("decoder=big", "pixelshuffle, bilinear"),
        ("training.clip=-1", "training.clip is -1.0; it is at least 0"),
        ("optimiser.warmup=-1", "optimiser.warmup is -1; it is at least 0"),
        ("optimiser.momentum=2", "at least 0 and below 1"),
        ("domains.camvid.weight=-3", "weight is -3.0; it is at least 0"),
        ("name=../elsewhere", r"name is '../elsewhere'; it holds letters"),
        ("nonsense", "'nonsense' is not an override; write key=value"),
        ("data.crop=[1", "not valid YAML"),
        ("domains.camvid.unlabelled=some", "rest, all, none"),
        ("domains.camvid.labelled=0", "labelled is 0; write `none`"),
        ("domains.camvid.weight=.nan", "weight is nan; it is at least 0"),
        ("optimiser.lr=.inf", "optimiser.lr is inf; it is above 0"),
        ("data.augment.scale=[0.5,.inf]", r"data.augment.scale is \[0.5, inf\]; it is a finite number."),
        ("method=mean_techer", "method is .mean_techer.; it is one of cct, .* Did you mean .mean_teacher"),
        ("method=fixmatch", "it is one of cct, .*supervised, mean_teacher, unimatch, usss"),
        (
            "domains.camvid.consistency.confidnce=0.9",
            r'unknown key "domains.camvid.consistency.confidnce".*Did you mean "confidence"',
        ),
        (
            "domains.camvid.perturbations.dropot.count=0",
            r'unknown key "domains.camvid.perturbations.dropot".*Did you mean "dropout"',
        ),
        (
            "domains.camvid.perturbations.dropout.cuont=0",
            r"Allowed in domains.camvid.perturbations.dropout: count, probability. Did you mean .count",
        ),
        ("perturbations.dropout.needs_objects=true", 'unknown key "perturbations.dropout.needs_objects"'),
        ("domains.camvid.consistency=3", "domains.camvid.consistency is 3; it is a section with the keys weight"),
        (
            "domains.camvid.perturbations=[dropout]",
            "domains.camvid.perturbations is .*; it is a section with the keys feature_noise",
        ),
        (
            "domains.camvid.consistency.weight=much",
            "domains.camvid.consistency.weight is 'much'.*could not be converted to Float",
        ),
        (
            "domains.camvid.consistency.confidence=${oc.env:HOME}",
            "domains.camvid.consistency.confidence is .* plain values, without",
        ),
        ("consistency.confidence=1", "consistency.confidence is 1.0; it is at least 0 and below 1"),
        ("domains.camvid.consistency.confidence=-0.1", "consistency.confidence is -0.1"),
        ("perturbations.adversarial_noise.xi=1e-6", "perturbations.adversarial_noise.xi is 1e-06; it is at least 0.01"),
        ("domains.camvid.perturbations.adversarial_noise.xi=1e-6", "perturbations.adversarial_noise.xi is 1e-06"),
        ("mean_teacher.decay=1", "mean_teacher.decay is 1.0; it is at least 0 and below 1"),
        ("mean_teacher.cutmix=2", "mean_teacher.cutmix is 2.0; it is at least 0 and at most 1"),
        ("unimatch.confidence=1", "unimatch.confidence is 1.0; it is at least 0 and below 1"),
        ("unimatch.weight=-1", "unimatch.weight is -1.0; it is at least 0"),
        ("unimatch.dropout=0", "unimatch.dropout is 0.0; it is above 0 and below 1"),
        ("unimatch.cutmix=-1", "unimatch.cutmix is -1.0; it is at least 0"),
        ("usss.across=-1", "usss.across is -1.0; it is at least 0"),
        ("usss.within=-1", "usss.within is -1.0; it is at least 0"),
        ("usss.channels=0", "usss.channels is 0; it is at least 1"),
        ("usss.temperature=0", "usss.temperature is 0.0; it is above 0"),
        ("usss.momentum=1", "usss.momentum is 1.0; it is at least 0 and below 1"),
        ("consistency.sample=-1", "consistency.sample is -1; it is at least 0"),
        ("consistency.stride=0", "consistency.stride is 0; it is at least 1"),
        ("data.schedule=both", "together, alternate"),
        ("evaluation.window=[1]", r"\[width, height\]"),
    ],
)
def test_each_mistake_is_one_line_with_the_key(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        read_recipe(write(tmp_path, BASE), override.split(" "))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 3", "domains is empty"),
        ("domains: [a, b]", "it is a mapping"),
        (BASE + "seed: 1\nseed: 2\n", "line 5: the key 'seed' appears twice"),
        ("domains: {a", "not valid YAML"),
        ("- 1", "a mapping of keys to values is expected"),
        ("domains: !!python/object/apply:os.system [ls]", "not valid YAML"),
    ],
)
def test_a_broken_file_is_one_line_with_its_path(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(UserError, match=message) as error:
        read_recipe(path)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)


def test_an_absent_recipe_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no such recipe"):
        read_recipe(tmp_path / "none.yaml")


def test_a_shipped_recipe_is_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert read_recipe(Path("recipes/demo.yaml")).name == "demo"


def test_differences_name_what_makes_another_run_and_not_what_may_change(tmp_path: Path) -> None:
    path = write(tmp_path, BASE)
    old = read_recipe(path)
    assert (
        differences(
            old, read_recipe(path, ["data.workers=7", "resume=auto", "training.log_every=3", "training.accumulation=2"])
        )
        == []
    )
    assert differences(old, read_recipe(path, ["optimiser.lr=0.5", "domains.camvid.labelled=3"])) == [
        "domains.camvid.labelled: 50 -> 3",
        "optimiser.lr: 0.01 -> 0.5",
    ]


# Sections of a domain's own


OWN = """\
consistency: {weight: 2, distance: js}
perturbations:
  dropout: {count: 3, probability: 0.3}
  object_mask: {count: 1}
domains:
  camvid:
    consistency: {confidence: 0.9}
    perturbations: {dropout: {probability: 0.7}}
  cityscapes:
"""


def test_a_domains_sections_replace_single_keys_and_inherit_the_others(tmp_path: Path) -> None:
    recipe = read_recipe(write(tmp_path, OWN))
    own, general = recipe.consistency_of("camvid"), recipe.consistency_of("cityscapes")
    assert general == recipe.consistency
    assert (general.weight, general.distance, general.confidence) == (2, "js", 0)
    assert own == replace(general, confidence=0.9)
    mix, common = recipe.perturbations_of("camvid"), recipe.perturbations_of("cityscapes")
    assert common == recipe.perturbations
    assert (common.dropout.count, common.dropout.probability, common.object_mask.count) == (3, 0.3, 1)
    assert mix == replace(common, dropout=replace(common.dropout, probability=0.7))


@pytest.mark.parametrize("text", [BASE, OWN])
def test_overrides_reach_a_domains_own_sections(tmp_path: Path, text: str) -> None:
    before = read_recipe(write(tmp_path, text))
    overrides = [
        "domains.camvid.perturbations.dropout.count=0",
        "domains.camvid.consistency.confidence=0.8",
        "domains.cityscapes.consistency.weight=7",
    ]
    recipe = read_recipe(write(tmp_path, text), overrides)
    mix = before.perturbations_of("camvid")
    assert recipe.perturbations_of("camvid") == replace(mix, dropout=replace(mix.dropout, count=0))
    assert recipe.consistency_of("camvid") == replace(before.consistency_of("camvid"), confidence=0.8)
    assert recipe.consistency_of("cityscapes") == replace(before.consistency_of("cityscapes"), weight=7)
    assert recipe.consistency == before.consistency
    assert recipe.perturbations == before.perturbations


def test_a_domain_inherits_what_an_override_changes_in_the_recipes_section(tmp_path: Path) -> None:
    recipe = read_recipe(
        write(tmp_path, OWN), ["consistency.distance=kl", "consistency.confidence=0.5", "perturbations.dropout.count=9"]
    )
    assert (recipe.consistency_of("camvid").distance, recipe.consistency_of("camvid").confidence) == ("kl", 0.9)
    assert recipe.perturbations_of("camvid").dropout == replace(recipe.perturbations.dropout, probability=0.7)
    assert recipe.perturbations.dropout.count == 9


def test_sections_of_a_domains_own_survive_being_written_and_read(tmp_path: Path) -> None:
    recipe = read_recipe(
        write(tmp_path, OWN),
        ["method=mean_teacher", "domains.cityscapes.weak_split=train_weak", "domains.camvid.labelled=none"],
    )
    assert read_recipe(write(tmp_path, recipe.to_yaml())) == recipe
    assert differences(recipe, read_recipe(write(tmp_path, OWN))) == [
        "method: mean_teacher -> cct",
        "domains.camvid.labelled: none -> all",
        "domains.cityscapes.weak_split: train_weak -> ",
    ]


def test_consistency_weight_zero_turns_every_domain_off(tmp_path: Path) -> None:
    recipe = read_recipe(write(tmp_path, BASE), ["domains.camvid.consistency.weight=5"])
    assert recipe.consistency_of("camvid").weight == 5
    assert recipe.consistency_of("cityscapes").weight == pytest.approx(30 / 21)
    off = read_recipe(write(tmp_path, BASE), ["domains.camvid.consistency.weight=5", "consistency.weight=0"])
    assert off.consistency_of("camvid").weight == 0
    assert off.consistency_of("cityscapes").weight == 0


def test_a_run_of_an_earlier_version_chose_its_labels_in_random_order(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("domains: {fields: {labelled: 3}}\n")
    assert read_run_recipe(tmp_path).domains["fields"].order == "random"
    assert read_recipe(tmp_path / "recipe.yaml").domains["fields"].order == "covering"
