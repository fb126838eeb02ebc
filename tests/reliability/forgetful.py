"""A transform as it should not be: it draws from numpy's global generator, whose state no resume restores."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from multidomain_cct.training.recipe import Recipe


def train_with_a_forgetful_transform(recipe: Recipe, folders: Sequence[Path]) -> None:
    import numpy as np

    from multidomain_cct.data.batches import loader
    from multidomain_cct.data.batches.views import View
    from multidomain_cct.training.loop import train

    np.random.seed(0)
    view = loader.training_view

    def brightened(*arguments: Any) -> View:
        found = view(*arguments)
        return replace(found, image=found.image + np.random.randint(0, 20))

    loader.training_view = brightened
    train(recipe, folders)
