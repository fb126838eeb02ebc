from collections.abc import Callable
from pathlib import Path

import pytest
from forgetful import train_with_a_forgetful_transform

from multidomain_cct.errors import UserError
from multidomain_cct.testing import assert_resumes_exactly
from multidomain_cct.training.recipe import Recipe

TinyRecipe = Callable[..., Recipe]


def test_a_recipe_as_it_should_be_passes(tiny_recipe: TinyRecipe, two_domains: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(training__steps=4, data__workers=1)
    assert_resumes_exactly(recipe, [two_domains / "domains"], tmp_path / "comparison")
    with pytest.raises(UserError, match="straight exists. Give a workspace without"):
        assert_resumes_exactly(recipe, [two_domains / "domains"], tmp_path / "comparison")


def test_a_transform_with_a_state_of_its_own_is_found(
    tiny_recipe: TinyRecipe, two_domains: Path, tmp_path: Path
) -> None:
    with pytest.raises(AssertionError, match=r"step 3: train/\w+/\w+ is .* after the interruption, .* without it"):
        assert_resumes_exactly(
            tiny_recipe(training__steps=4), [two_domains / "domains"], tmp_path, start=train_with_a_forgetful_transform
        )


def test_runs_that_cannot_be_compared_say_why(tiny_recipe: TinyRecipe, two_domains: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="training.steps is 1; a run that is interrupted needs 2 or more"):
        assert_resumes_exactly(tiny_recipe(training__steps=1), [two_domains / "domains"], tmp_path)
