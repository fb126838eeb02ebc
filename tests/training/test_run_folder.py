"""Where a run begins, and what its folder records."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from multidomain_cct.data.domain import Domain
from multidomain_cct.errors import UserError
from multidomain_cct.training.recipe import Recipe, read_run_recipe
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
