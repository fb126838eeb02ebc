"""Where a run begins, and what its folder records."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from multidomain_cct.data.domain import Domain
from multidomain_cct.errors import UserError
from multidomain_cct.training.recipe import Recipe, differences, read_run_recipe
from multidomain_cct.training.run_folder import Start, find_start, write_run_folder

TinyRecipe = Callable[..., Recipe]


@pytest.fixture
def domains(tiny_domain: Callable[..., Domain]) -> dict[str, Domain]:
    return {name: tiny_domain(name) for name in ("fields", "shapes")}


def begun(recipe: Recipe, domains: dict[str, Domain]) -> Path:
    """The folder of a run that has logged its first step."""
    write_run_folder(recipe, domains, {"command": "first"})
    (recipe.folder / "metrics.jsonl").write_text('{"step": 1}\n')
    return recipe.folder


def test_a_run_begins_anew_where_nothing_is_or_nothing_has_begun(
    tiny_recipe: TinyRecipe, domains: dict[str, Domain]
) -> None:
    recipe = tiny_recipe()
    assert find_start(recipe, domains, []) == Start()
    write_run_folder(recipe, domains, {"command": "first"})
    assert find_start(recipe, domains, []) == Start()


def test_a_run_that_has_begun_is_not_overwritten(tiny_recipe: TinyRecipe, domains: dict[str, Domain]) -> None:
    begun(tiny_recipe(), domains)
    with pytest.raises(UserError, match="Continue it with resume=auto, or start another run with name=OTHER"):
        find_start(tiny_recipe(), domains, [])
    assert find_start(tiny_recipe(resume="auto"), domains, []) == Start()


def test_another_recipe_or_class_table_is_named_by_key(tiny_recipe: TinyRecipe, domains: dict[str, Domain]) -> None:
    begun(tiny_recipe(), domains)
    with pytest.raises(UserError, match="seed: 0 -> 1"):
        find_start(tiny_recipe(resume="auto", seed=1), domains, [])
    first, *others = domains["shapes"].classes
    changed = domains | {"shapes": replace(domains["shapes"], classes=(replace(first, name="disc"), *others))}
    with pytest.raises(UserError, match=r"shapes.classes\[0\].name: square -> disc"):
        find_start(tiny_recipe(resume="auto"), changed, [])
    forced = find_start(tiny_recipe(resume="force", seed=1), domains, [])
    assert forced.forced == ("seed: 0 -> 1",)
    assert forced.notices == ("resume=force goes on although seed: 0 -> 1",)


@pytest.mark.parametrize("content", ["{", "[1]", "3", '{"a": 1, "resumed": 5}'])
def test_a_damaged_record_of_starts_is_one_line(
    tiny_recipe: TinyRecipe, domains: dict[str, Domain], content: str
) -> None:
    folder = begun(tiny_recipe(), domains)
    (folder / "env.json").write_text(content)
    with pytest.raises(UserError, match=r"env.json: .*Remove it"):
        write_run_folder(tiny_recipe(), domains, {"command": "second"})


@pytest.mark.parametrize("content", ["classes: [", "3", "a: &b 1\nc: *b"])
def test_a_damaged_domain_in_a_run_is_one_line(
    tiny_recipe: TinyRecipe, domains: dict[str, Domain], content: str
) -> None:
    folder = begun(tiny_recipe(), domains)
    (folder / "domains" / "shapes.yaml").write_text(content)
    with pytest.raises(UserError, match=r"shapes.yaml: "):
        find_start(tiny_recipe(resume="auto"), domains, [])


def test_a_path_that_was_found_elsewhere_is_the_same_path(tiny_recipe: TinyRecipe) -> None:
    here, there = (tiny_recipe(domains={"shapes": {"labelled": path}}) for path in ("lists/a.txt", "/p/lists/a.txt"))
    other = tiny_recipe(domains={"shapes": {"labelled": "/p/lists/b.txt"}})
    assert differences(here, there) == []
    assert differences(here, other) == ["domains.shapes.labelled: lists/a.txt -> /p/lists/b.txt"]


def test_what_a_resumed_run_may_change_is_no_other_recipe(tiny_recipe: TinyRecipe, domains: dict[str, Domain]) -> None:
    begun(tiny_recipe(), domains)
    again = tiny_recipe(resume="auto", data__workers=3, training__keep=7, evaluation={"flip": True})
    assert find_start(again, domains, []) == Start()


def test_the_folder_holds_recipe_domains_and_every_start(tiny_recipe: TinyRecipe, domains: dict[str, Domain]) -> None:
    recipe = tiny_recipe()
    for command in ("first", "second", "third"):
        write_run_folder(recipe, domains, {"command": command})
    assert read_run_recipe(recipe.folder) == recipe
    assert (recipe.folder / "domains" / "shapes.yaml").read_text() == domains["shapes"].to_yaml()
    record = json.loads((recipe.folder / "env.json").read_text())
    assert record == {"command": "first", "resumed": [{"command": "second"}, {"command": "third"}]}
