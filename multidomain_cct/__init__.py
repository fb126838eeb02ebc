"""Semi-supervised semantic segmentation over many domains by cross-consistency training.

The public functions import what they need when they are called: `import multidomain_cct` loads no torch. docs/python.md
shows them at work.
"""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from multidomain_cct.errors import UserError as UserError

if TYPE_CHECKING:
    from multidomain_cct.data.domain import Domain
    from multidomain_cct.results.trained_run import TrainedRun
    from multidomain_cct.training.recipe import Recipe

__version__ = "0.3.0"
__all__ = ["UserError", "__version__", "evaluate", "load_domain", "load_recipe", "load_run", "train"]


def __dir__() -> list[str]:
    return __all__


def load_recipe(path: str | PathLike[str], overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a YAML file, or the one of that name that is installed, with `key=value` overrides applied.

    Raises UserError for anything in it that cannot be used.
    """
    from multidomain_cct.training.recipe import read_recipe

    return read_recipe(Path(path), overrides)


def load_domain(name: str | PathLike[str]) -> Domain:
    """The domain in a YAML file, or the known one of that name: in ./domains, or among those installed.

    Raises UserError for an unknown name and for anything in the file that cannot be used.
    """
    from multidomain_cct.data.specification import domain_folders, find_domain

    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        return find_domain(path.stem, [path.parent, *domain_folders()])
    return find_domain(str(name), domain_folders())


def train(recipe: Recipe, *, domains: Sequence[str | PathLike[str]] = ()) -> Path:
    """Train as the recipe says and return the run's folder.

    Domains are looked for in the folders `domains`, then where the command looks: in `domains/` beside the recipe's
    file and above it, in ./domains, and among those installed. Raises UserError, before anything is written, for what
    has to be changed, RunFailed when the run cannot go on, and RunStopped when it was asked to stop and has saved.
    """
    from multidomain_cct.data.specification import domain_folders
    from multidomain_cct.training.loop import train as train_in

    return train_in(recipe, domain_folders([Path(folder) for folder in domains], recipe.file))


def load_run(
    folder: str | PathLike[str], checkpoint: str | PathLike[str] = "last", *, weights: str | None = None
) -> TrainedRun:
    """A trained run, on the GPU when there is one: `run.predict(image, domain=...)`.

    `checkpoint` is `last`, `best` or a checkpoint's folder. `weights` is `ema`, the running average, or `student`, the
    weights that were trained; None: the running average, if the run keeps one. Raises UserError when the folder is not
    a run, the checkpoint is absent or damaged, or the run does not have these weights.
    """
    from multidomain_cct.results.trained_run import TrainedRun

    return TrainedRun.load(Path(folder), str(checkpoint), weights=weights)


def evaluate(
    run: TrainedRun,
    domains: str | Sequence[str] = (),
    split: str | None = None,
    *,
    shards: str | PathLike[str] | None = None,
    window: Sequence[int] | None = None,
    scales: Sequence[float] | None = None,
    flip: bool = False,
) -> dict[str, Any]:
    """The run's scores as the command `evaluate --json` prints them: `domains.<name>.miou` and `.iou.<class>`, 0 to 1.

    No domains: all. `split` None: each domain's val split. `window` (width, height), `scales` and `flip` replace the
    recipe's. Raises UserError for a domain without a head and for a split without shards.
    """
    from multidomain_cct.results.evaluate import evaluate as score_domains
    from multidomain_cct.results.evaluate import scores_as_json

    names = [domains] if isinstance(domains, str) else domains
    settings = run.settings(window=window, scales=scales, flip=flip)
    scores = score_domains(run, names, split, settings, shards=None if shards is None else Path(shards))
    return scores_as_json(run, scores)
