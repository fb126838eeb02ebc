"""`weaklabels`: image-level labels -> shards of pseudo-labels."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from multidomain_cct.commands.terminal import DONE, FAILED, Words, complain, domain_options, progress_bar, say
from multidomain_cct.data.specification import domain_folders

if TYPE_CHECKING:
    from multidomain_cct.results.weaklabels import WeakSummary


def register(words: Words) -> None:
    command = words.add_parser(
        "weaklabels", parents=[domain_options()], help="image-level labels -> pseudo-label shards"
    )
    command.add_argument("recipe", type=Path, metavar="RECIPE")
    command.add_argument("overrides", nargs="*", metavar="key=value", help="settings that replace the recipe's")
    command.add_argument(
        "--domain",
        action="append",
        default=[],
        metavar="D",
        help="domain to label; may be repeated (default: all with image_labels)",
    )
    command.add_argument("--force", action="store_true", help="replace pseudo-labels that are there already")
    command.set_defaults(run=run, takes_overrides=True)


def run(options: argparse.Namespace) -> int:
    import torch

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
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        with progress_bar("classifier") as progress:
            model, losses = train_classifier(recipe, tagged, device=device, progress=progress)
    except RunFailed as error:
        complain(str(error))
        return FAILED
    first, last = loss_ends(losses)
    say(
        f"classifier: {len(losses)} steps on {sum(len(images.samples) for images in tagged)} images, loss {first:.3f} "
        f"-> {last:.3f}"
    )
    for images in tagged:
        common = [
            images.domain.classes[train_id].name
            for train_id in sorted(too_common(images, recipe.pseudo_labels.most_common))
        ]
        if common:
            share = (
                f"more than {100 * recipe.pseudo_labels.most_common:.0f} % of the images (pseudo_labels.most_common)"
            )
            say(
                f"{images.domain.name}: no pseudo-labels for {', '.join(common)}, which {share} show: there is "
                "nothing to tell them by."
            )
        with progress_bar(images.domain.name) as progress:
            summary = write_pseudo_labels(recipe, images, model, progress=progress)
        print_summary(Console(highlight=False), summary)
    return DONE


def print_summary(console: Console, summary: WeakSummary) -> None:
    """What was written for a domain, how much of it is labelled, and how right that is where true masks tell."""
    name = summary.domain.name
    quality = Table("pseudo-labels", "images", "pixels labelled", "precision", "mIoU", title=f"{name}/{summary.split}")
    for title, tally in (("activation maps", summary.maps), ("written, after the random field", summary.refined)):
        found = tally.quality
        judged = ("", "") if found is None else (f"{100 * found.precision:.1f} %", f"{100 * found.miou:.1f}")
        quality.add_row(title, str(summary.images), f"{100 * tally.labelled:.1f} %", *judged)
    console.print(quality)
    classes = Table("class", "images that show it", "average precision", "share of labelled pixels")
    total = max(1, int(summary.refined.pixels[: summary.domain.num_classes].sum()))
    for train_id, label in enumerate(summary.domain.classes):
        value = summary.precision[train_id]
        share = summary.refined.pixels[train_id] / total
        classes.add_row(
            escape(label.name),
            str(summary.shown[train_id] or ""),
            "" if math.isnan(value) else f"{100 * value:.1f}",
            f"{100 * share:.2f} %",
        )
    console.print(classes)
    mean = (
        "no class is in some images and not in others"
        if math.isnan(summary.mean_precision)
        else f"{100 * summary.mean_precision:.1f}"
    )
    say(f"{name}: mean average precision of the classifier on these images: {mean}")
    say(
        f"{name}: {summary.images} images in {len(summary.shards)} shard(s) under {summary.shards[0].parent}; look at "
        f"them: {summary.sheet}"
    )
    say(f"{name}: train with them: domains.{name}.weak_split={summary.split}")
