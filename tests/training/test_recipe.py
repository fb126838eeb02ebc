from pathlib import Path

import pytest

from multidomain_cct.data.specification import domain_folders, find_domain
from multidomain_cct.training.recipe import differences, read_recipe

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
        assert {choice.train_split, *choice.unlabelled_splits, *([choice.val_split] if choice.val_split else [])} <= set(domain.splits)
        assert choice.val_split != "test" or "val" not in domain.splits
    header = path.read_text().split("domains:")[0]
    assert "accelerate launch -m multidomain_cct" in header
    for word in ("What:", "Takes:", "Reaches:", "Command:"):
        assert word in header, f"{path.name} does not say {word}"


def test_a_recipe_survives_being_written_and_read(tmp_path: Path) -> None:
    recipe = read_recipe(write(tmp_path, BASE), ["domains.camvid.crop=[96,64]", "optimiser.lr=2e-2", "training.precision=no"])
    assert read_recipe(write(tmp_path, recipe.to_yaml())) == recipe
    assert recipe.name == "mine" and recipe.optimiser.lr == 0.02 and recipe.training.precision == "no"
    assert recipe.domains["camvid"].labelled == "50" and recipe.domains["cityscapes"].labelled == "all"


def test_an_override_can_add_a_domain(tmp_path: Path) -> None:
    assert list(read_recipe(write(tmp_path, BASE), ["domains.ccp.labelled=1/16"]).domains) == ["camvid", "cityscapes", "ccp"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.crpo=3", 'unknown key "data.crpo".*Did you mean "crop"'),
        ("domains.camvid.labeled=3", 'unknown key "domains.camvid.labeled".*Did you mean "labelled"'),
        ("perturbation.dropout.count=3", 'Did you mean "perturbations"'),
        ("training.steps=many", "training.steps is 'many'.*could not be converted to Integer"),
        ("data.crop=abc", "data.crop is 'abc': a list is expected"),
        ("data.crop=[100,100]", r"data.crop is \[100, 100\], which encoder.stride 8 does not divide. Use for example \[96, 96\]"),
        ("domains.camvid.crop=[64]", r"domains.camvid.crop is \[64\]; it is \[width, height\]"),
        ("seed=${oc.env:HOME}", "plain values, without"),
        ("encoder.context=pspp", "encoder.context is 'pspp'; it is one of psp, fpn, none"),
        ("data=3", "data is 3; it is a section"),
        ("seed.x=3", "seed is"),
        ("training.clip=null", "training.clip is None"),
        ("training.precision=fp8", "no, bf16, fp16"),
        ("training.steps=0", "at least 1"),
        ("resume=yes", "`never` or `auto`"),
        ("decoder=big", "pixelshuffle, bilinear"),
        ("training.clip=-1", "training.clip is -1.0; it is 0 or more"),
        ("optimiser.warmup=-1", "optimiser.warmup is -1; it is 0 or more"),
        ("optimiser.momentum=2", "0 to below 1"),
        ("domains.camvid.weight=-3", "a domain's weight is -3.0; it is 0 or more"),
        ("domains.camvid.val_split=test", "nothing is chosen on a test split"),
        ("domains.camvid.unlabelled_splits=[train]", "names a split twice, or the train_split"),
        ("name=../elsewhere", r"name is '../elsewhere'; a run's name holds letters"),
        ("nonsense", "'nonsense' is not an override; write key=value"),
        ("data.crop=[1", "not valid YAML"),
        ("domains.camvid.unlabelled=some", "rest, all, none"),
        ("domains.camvid.labelled=0", "at least one labelled image"),
        ("data.schedule=both", "together, alternate"),
        ("evaluation.window=[1]", r"\[width, height\]"),
    ],
)
def test_each_mistake_is_one_line_with_the_key(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        read_recipe(write(tmp_path, BASE), [override])
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
    with pytest.raises(ValueError, match=message) as error:
        read_recipe(path)
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)


def test_an_absent_recipe_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no such recipe"):
        read_recipe(tmp_path / "none.yaml")


def test_a_shipped_recipe_is_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert read_recipe(Path("recipes/demo.yaml")).name == "demo"


def test_differences_name_what_makes_another_run_and_not_what_may_change(tmp_path: Path) -> None:
    path = write(tmp_path, BASE)
    old = read_recipe(path)
    assert differences(old, read_recipe(path, ["data.workers=7", "resume=auto", "training.log_every=3", "training.accumulation=2"])) == []
    assert differences(old, read_recipe(path, ["optimiser.lr=0.5", "domains.camvid.labelled=3"])) == [
        "domains.camvid.labelled: 50 -> 3",
        "optimiser.lr: 0.01 -> 0.5",
    ]


def test_consistency_weight_zero_turns_every_domain_off(tmp_path: Path) -> None:
    recipe = read_recipe(write(tmp_path, BASE), ["domains.camvid.consistency_weight=5"])
    assert recipe.consistency_weight("camvid") == 5 and recipe.consistency_weight("cityscapes") == pytest.approx(30 / 21)
    off = read_recipe(write(tmp_path, BASE), ["domains.camvid.consistency_weight=5", "consistency.weight=0"])
    assert not off.uses_consistency("camvid") and not off.uses_consistency("cityscapes")
