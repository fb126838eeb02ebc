"""`weaklabels`: image-level labels -> shards of pseudo-labels."""

from __future__ import annotations

import argparse
import math
from typing import TYPE_CHECKING

from multidomain_cct.commands.terminal import (
    DONE,
    FAILED,
    Words,
    complain,
    progress_bar,
    recipe_options,
    say,
    show_table,
)
from multidomain_cct.data.specification import domain_folders

if TYPE_CHECKING:
    from multidomain_cct.results.weaklabels import WeakSummary


def register(words: Words) -> None:
    command = words.add_parser(
        "weaklabels", parents=[recipe_options()], help="image-level labels -> pseudo-label shards"
    )
    command.add_argument(
        "--domain",
        action="append",
        default=[],
        metavar="D",
        help="domain to label; may be repeated (default: all with image_labels)",
    )
    command.add_argument("--force", action="store_true", help="replace existing pseudo-labels")
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from multidomain_cct.results.trained_run import available_device
    from multidomain_cct.results.weaklabels import (
        loss_ends,
        tagged_domains,
        too_common,
        train_classifier,
        write_pseudo_labels,
    )
    from multidomain_cct.training.loop import RunFailed
    from multidomain_cct.training.recipe import read_recipe

    recipe = read_recipe(options.recipe, options.overrides)
    folders = domain_folders(options.domains, options.recipe)
    tagged = tagged_domains(recipe, folders, options.domain, named_by=str(options.recipe), force=options.force)
    try:
        with progress_bar("classifier") as progress:
            model, losses = train_classifier(recipe, tagged, device=available_device(), progress=progress)
    except RunFailed as error:
        complain(str(error))
        return FAILED
    first, last = loss_ends(losses)
    images = sum(len(each.samples) for each in tagged)
    say(f"classifier: {len(losses)} steps on {images} images, loss {first:.3f} -> {last:.3f}")
    most_common = recipe.pseudo_labels.most_common
    for each in tagged:
        common = [each.domain.classes[train_id].name for train_id in sorted(too_common(each, most_common))]
        if common:
            share = f"{100 * most_common:.0f} % of the images (pseudo_labels.most_common)"
            say(f"{each.domain.name}: no pseudo-labels for {', '.join(common)}, which more than {share} show.")
        with progress_bar(each.domain.name) as progress:
            summary = write_pseudo_labels(recipe, each, model, progress=progress)
        _print_summary(summary)
    return DONE


def _print_summary(summary: WeakSummary) -> None:
    """What was written for a domain, how much of it is labelled, and, where true masks exist, how much is right."""
    name = summary.domain.name
    rows = []
    for title, tally in (("activation maps", summary.maps), ("written, after the random field", summary.refined)):
        quality = ("" if value is None else f"{100 * value:.1f}" for value in (tally.precision, tally.miou))
        rows.append((title, str(summary.images), f"{100 * tally.labelled:.1f} %", *quality))
    heading = ("pseudo-labels", "images", "pixels labelled", "precision %", "mIoU %")
    show_table(heading, rows, title=f"{name}/{summary.split}")
    total = max(1, int(summary.refined.pixels[: summary.domain.num_classes].sum()))
    classes = [
        (
            label.name,
            str(summary.shown[train_id] or ""),
            _percent(summary.precision[train_id]),
            f"{100 * summary.refined.pixels[train_id] / total:.2f} %",
        )
        for train_id, label in enumerate(summary.domain.classes)
    ]
    show_table(("class", "images that show it", "average precision", "share of labelled pixels"), classes)
    mean = _percent(summary.mean_precision) or "none, for every class is in all of them or in none"
    say(f"{name}: mean average precision of the classifier on these images: {mean}")
    say(f"{name}: {summary.images} images in {len(summary.shards)} shard(s) under {summary.shards[0].parent}")
    say(f"{name}: look at them: {summary.sheet}")
    say(f"{name}: train with them: domains.{name}.weak_split={summary.split}")


def _percent(value: float) -> str:
    return "" if math.isnan(value) else f"{100 * value:.1f}"
