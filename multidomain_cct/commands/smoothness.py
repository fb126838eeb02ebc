"""`smoothness`: on which stage of an encoder the cluster assumption holds, as a picture and a table."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from multidomain_cct.commands.terminal import DONE, SHARDS, Words, domain_options, progress_bar, say, show_table
from multidomain_cct.data.specification import domain_folders, find_domain
from multidomain_cct.errors import UserError, did_you_mean, require_number

if TYPE_CHECKING:
    from multidomain_cct.data.domain import Domain
    from multidomain_cct.results.smoothness.diagnosis import Diagnosis, Subject

MOST_IMAGES = 12
"""Images that fit into a picture one can look at."""


def register(words: Words) -> None:
    command = words.add_parser(
        "smoothness", parents=[domain_options()], help="do features change at class borders? a picture and AUCs"
    )
    command.add_argument("encoder", metavar="RUN|ENCODER", help="a run's folder, or any model of timm")
    command.add_argument("--domain", required=True, metavar="D", help="whose images and classes")
    command.add_argument("--out", required=True, type=Path, metavar="FILE.png")
    command.add_argument("--split", default="val", metavar="S", help="split of the images (default: val)")
    command.add_argument(
        "--images", type=int, default=6, metavar="N", help=f"images in the picture, 1 to {MOST_IMAGES} (default: 6)"
    )
    command.add_argument("--limit", type=int, metavar="N", help="images in the averages (default: all of the split)")
    command.add_argument(
        "--borders",
        choices=("labels", "prediction"),
        help="whose class borders (default: the labels', without masks the run's prediction)",
    )
    command.add_argument(
        "--weights", metavar="W", help="of an ENCODER: timm, lite, none or a .safetensors file (default: timm)"
    )
    command.add_argument(
        "--checkpoint", metavar="C", help="of a RUN: last, best or a checkpoint's folder (default: last)"
    )
    command.add_argument("--shards", type=Path, metavar="DIR", help=f"folder of shards (default: the run's; {SHARDS})")
    command.add_argument("--json", action="store_true", help="print JSON instead of the table")
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from multidomain_cct.data.shards.reader import Shards
    from multidomain_cct.results.smoothness.diagnosis import DiagnosisSettings, diagnose
    from multidomain_cct.results.smoothness.panel import write_panel

    if options.out.suffix.lower() != ".png" or options.out.is_dir():
        raise UserError(f"--out is {options.out}; it names the picture, a file that ends in .png.")
    require_number("--images", options.images, at_least=1, at_most=MOST_IMAGES)
    if options.limit is not None:
        require_number("--limit", options.limit, at_least=1)
    settings = DiagnosisSettings(options.split, options.borders, options.limit, options.images)
    subject, domain, root = _open(options)
    shards = Shards.open(root / domain.name, options.split)
    with progress_bar(f"{domain.name}/{options.split}") as progress:
        diagnosis, examples = diagnose(subject, domain, shards=shards, settings=settings, progress=progress)
    write_panel(diagnosis, examples, options.out)
    if options.json:
        print(json.dumps(diagnosis.as_json(), indent=1))
        return DONE
    print_diagnosis(diagnosis)
    say(diagnosis.verdict)
    say(f"picture: {options.out}")
    return DONE


def print_diagnosis(diagnosis: Diagnosis) -> None:
    """A row per stage: its grid, and the AUCs of its features and of image patches of the same size."""
    where = f"{diagnosis.subject} on {diagnosis.domain.name}/{diagnosis.split}"
    say(f"{where}: {diagnosis.images} images, borders of the {diagnosis.borders}")
    rows = []
    for score in diagnosis.stages:
        gain = "none" if score.gain is None else f"{score.gain:+.3f} ± {_number(score.gain_error)}"
        share = f"{100 * score.border_share:.0f} %"
        areas = (_number(score.auc), _number(score.patch_auc))
        rows.append((score.name, str(score.stride), str(score.channels), share, *areas, gain))
    heading = ("stage", "stride", "channels", "border\nshare", "AUC\nfeatures", "AUC\npatches", "difference")
    show_table(heading, rows, numbers=True)
    say("AUC: mean over images; difference: its mean over images ± standard error")


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.3f}"


def _open(options: argparse.Namespace) -> tuple[Subject, Domain, Path]:
    """The encoder to diagnose, the domain, and the folder of shards."""
    import timm

    from multidomain_cct.results.smoothness.diagnosis import published_encoder, trained_encoder
    from multidomain_cct.results.trained_run import TrainedRun, available_device

    named, folder = options.encoder, Path(options.encoder)
    if (folder / "recipe.yaml").is_file():
        if options.weights is not None:
            raise UserError(f"--weights is {options.weights}, but {named} is a run and has its own. Leave it out.")
        trained = TrainedRun.load(folder, options.checkpoint or "last")
        subject = trained_encoder(trained, options.domain)
        return subject, trained.domains[options.domain], options.shards or Path(trained.recipe.data.shards)
    if not timm.is_model(named):
        raise UserError(
            f"{named} is neither a run's folder (it has no recipe.yaml) nor a model of "
            f"timm.{did_you_mean(named, timm.list_models())}"
        )
    if options.checkpoint is not None:
        raise UserError(f"--checkpoint is {options.checkpoint}, but {named} is a model of timm. Leave it out.")
    domain = find_domain(options.domain, domain_folders(options.domains))
    subject = published_encoder(named, options.weights or "timm", available_device())
    return subject, domain, options.shards or Path(SHARDS)
