"""The commands. A bare recipe path trains; exit codes: 0 done, 1 findings or a failed run, 2 the user's mistake."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from multidomain_cct import __version__
from multidomain_cct.data.domain import IGNORE, Domain
from multidomain_cct.data.specification import domain_folders, find_domain, known_domains, read_domain

if TYPE_CHECKING:
    from multidomain_cct.data.pack import Summary

DONE, FAILED, MISTAKE = 0, 1, 2
SHARDS = "data/shards"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser, commands = build_parser()
    if arguments and not arguments[0].startswith("-") and arguments[0] not in commands:
        arguments.insert(0, "train")
    options, extra = parser.parse_known_args(arguments)
    # Overrides may stand behind an option, where argparse does not look for them.
    if extra and (options.run is not run_train or not all("=" in word and not word.startswith("-") for word in extra)):
        parser.error(f"unknown argument {extra[0]!r}")
    options.extra = extra
    try:
        code: int = options.run(options)
        return code
    except (ValueError, FileNotFoundError) as error:
        # Every process of a run finds the same mistake; one of them says so.
        if os.environ.get("RANK", "0") == "0" or str(error).startswith("rank "):
            complain(str(error))
        return MISTAKE
    except OSError as error:
        # A full disk, a folder that may not be written: not what was asked, but where.
        complain(f"{error.filename or 'input or output'}: {error.strerror or error}. Make room or choose another place, then give the same command again.")
        return FAILED
    except KeyboardInterrupt:
        complain("stopped. A training run goes on from its last checkpoint with resume=auto; packing goes on with the same command.")
        return 130


def complain(message: str) -> None:
    """One line on standard error."""
    Console(stderr=True, soft_wrap=True).print(f"error: {' '.join(message.split())}", markup=False, highlight=False)


def build_parser() -> tuple[argparse.ArgumentParser, set[str]]:
    """The parser and the words that are commands."""
    parser = argparse.ArgumentParser(
        prog="multidomain_cct", description="Semi-supervised semantic segmentation over many domains. A bare recipe path trains it."
    )
    parser.add_argument("--version", action="version", version=f"multidomain_cct {__version__}")
    words = parser.add_subparsers(required=True, metavar="COMMAND")
    everywhere = argparse.ArgumentParser(add_help=False)
    everywhere.add_argument("--domains", metavar="DIR", type=Path, action="append", default=[], help="folder of domain files, looked at first; may be repeated")
    prediction = argparse.ArgumentParser(add_help=False)
    prediction.add_argument("--checkpoint", default="last", help="last, best or a checkpoint's folder (default: last)")
    prediction.add_argument("--window", type=_numbers(int, 2), metavar="W,H", help="sliding window for images larger than this")
    prediction.add_argument("--scales", type=_numbers(float), metavar="S,...", help="image scales to average over, for example 0.75,1,1.25")
    prediction.add_argument("--flip", action="store_true", help="average with the mirrored image")

    command = words.add_parser("train", parents=[everywhere], help="train a recipe (the word may be left out)")
    command.add_argument("recipe", type=Path, metavar="RECIPE")
    command.add_argument("overrides", nargs="*", metavar="key=value", help="settings that replace the recipe's")
    command.set_defaults(run=run_train)

    command = words.add_parser("pack", parents=[everywhere], help="raw data set -> shards")
    command.add_argument("domain", metavar="DOMAIN")
    command.add_argument("--raw", type=Path, metavar="DIR", help="folder of the raw data set (not needed for toy domains)")
    command.add_argument("--split", action="append", default=[], metavar="S", help="split to pack; may be repeated (default: all)")
    command.add_argument("--out", type=Path, default=Path(SHARDS), metavar="DIR", help=f"folder with one folder of shards per domain (default: {SHARDS})")
    command.add_argument("--workers", type=int, metavar="N", help="processes (default: one per core)")
    command.set_defaults(run=run_pack)

    command = words.add_parser("index", help="index WebDataset shards that somebody else wrote")
    command.add_argument("shards", nargs="+", type=Path, metavar="SHARD")
    command.add_argument("--image", default="jpg", metavar="ENDING", help="ending of the images (default: jpg)")
    command.add_argument("--mask", default="png", metavar="ENDING", help="ending of the masks, 8-bit train ids (default: png)")
    command.set_defaults(run=run_index)

    command = words.add_parser("evaluate", parents=[prediction], help="per-domain mIoU of a run")
    command.add_argument("folder", type=Path, metavar="RUN")
    command.add_argument("--domain", action="append", default=[], metavar="D", help="domain to score; may be repeated (default: all)")
    command.add_argument("--split", metavar="S", help="split to score (default: the recipe's val_split)")
    command.add_argument("--shards", type=Path, metavar="DIR", help="folder of shards (default: the recipe's)")
    command.add_argument("--json", action="store_true", help="print JSON instead of tables")
    command.set_defaults(run=run_evaluate)

    command = words.add_parser("predict", parents=[prediction], help="segment images")
    command.add_argument("folder", type=Path, metavar="RUN")
    command.add_argument("--domain", required=True, metavar="D", help="whose classes to predict")
    command.add_argument("--out", required=True, type=Path, metavar="DIR", help="receives index/, color/ and overlay/")
    command.add_argument("images", nargs="+", type=Path, metavar="IMAGE|FOLDER")
    command.set_defaults(run=run_predict)

    command = words.add_parser("report", help="one HTML page about one or several runs")
    command.add_argument("folders", nargs="+", type=Path, metavar="RUN")
    command.add_argument("--out", type=Path, metavar="FILE.html")
    command.set_defaults(run=run_report)

    command = words.add_parser("domains", parents=[everywhere], help="what domains are known, and whether their shards are there")
    command.add_argument("--shards", type=Path, default=Path(SHARDS), metavar="DIR")
    command.set_defaults(run=run_domains)
    return parser, set(words.choices)


def run_train(options: argparse.Namespace) -> int:
    from multidomain_cct.results.report import write_report
    from multidomain_cct.training.loop import RunFailed, train
    from multidomain_cct.training.recipe import read_recipe

    recipe = read_recipe(options.recipe, [*options.overrides, *options.extra])
    command = shlex.join(["multidomain_cct", *sys.argv[1:]])
    try:
        run = train(recipe, domain_folders(options.domains, options.recipe), command=command, named_by=str(options.recipe))
    except RunFailed as error:
        # All processes skip the same steps and give up together.
        if os.environ.get("RANK", "0") == "0":
            complain(str(error))
        return FAILED
    if os.environ.get("RANK", "0") == "0":
        Console().print(f"report: {write_report([run])}", markup=False, highlight=False, soft_wrap=True)
    return DONE


def run_pack(options: argparse.Namespace) -> int:
    from multidomain_cct.data.pack import pack
    from multidomain_cct.data.toy import render_toy

    domain = find_domain(options.domain, domain_folders(options.domains))
    if options.workers is not None and options.workers < 1:
        raise ValueError(f"--workers is {options.workers}; it is at least 1.")
    if options.raw is None and domain.layout != "toy":
        raise ValueError(f"--raw is missing: name the folder of the raw data set {domain.name} (layout {domain.layout}).")
    with tempfile.TemporaryDirectory() as folder:
        raw = options.raw or Path(folder)
        if domain.layout == "toy":
            render_toy(domain.name, raw)
        for split in options.split or _present_splits(domain, raw):
            with _progress(f"{domain.name}/{split}") as progress:
                summary = pack(domain, raw, split, options.out, workers=options.workers, progress=progress)
            _print_summary(domain, split, summary, options.out / domain.name)
    return DONE


def _present_splits(domain: Domain, raw: Path) -> list[str]:
    """The splits that the raw folder holds; those of a data set that was fetched in part are said to be missing."""
    from multidomain_cct.data.layouts import raw_samples

    if not raw.is_dir():
        raise FileNotFoundError(f"--raw: {raw}: there is no such folder.")
    present, errors = [], []
    for split in domain.splits:
        try:
            raw_samples(domain, raw, split)
            present.append(split)
        except FileNotFoundError as error:
            errors.append(str(error))
    if not present:
        raise FileNotFoundError(errors[0])
    for line in errors:
        Console(stderr=True, soft_wrap=True).print(f"left out: {line}", markup=False, highlight=False)
    return present


def _print_summary(domain: Domain, split: str, summary: Summary, folder: Path) -> None:
    from multidomain_cct.data.pack import ignored_share

    console = Console(highlight=False)
    sizes = ", ".join(f"{count} of {size}" for size, count in summary.sizes.most_common(3)) + (", ..." if len(summary.sizes) > 3 else "")
    console.print(
        f"{domain.name}/{split}: {summary.images} images ({summary.labelled} labelled) in {summary.shards} shard(s) under {folder}; {sizes} pixels, "
        f"{summary.image_bytes / max(1, summary.images) / 1024:.0f} KiB an image",
        markup=False,
        soft_wrap=True,
    )
    if not summary.labelled:
        return
    table = Table("train id", "class", "share of pixels")
    total = max(1, int(summary.pixels.sum()))
    for train_id, label in enumerate(domain.classes):
        table.add_row(str(train_id), escape(label.name), f"{100 * summary.pixels[train_id] / total:.2f} %")
    table.add_row(str(IGNORE), "ignored", f"{100 * ignored_share(summary):.2f} %")
    console.print(table)
    if summary.unknown:
        values = ", ".join(f"{value} ({count} px)" for value, count in summary.unknown.most_common(8)) + (" ..." if len(summary.unknown) > 8 else "")
        console.print(f"raw values that no class names, now {IGNORE}: {values}", markup=False, soft_wrap=True)


class _progress:
    """A bar with rate and time left, as the wrapper of an iteration that `pack` asks for."""

    def __init__(self, title: str) -> None:
        rate = TextColumn("{task.fields[rate]}")
        self._bar = Progress(TextColumn(title, markup=False), BarColumn(), MofNCompleteColumn(), rate, TimeRemainingColumn(), console=Console(stderr=True))

    def __enter__(self) -> _progress:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def __call__(self, items: Iterable[Any], total: int) -> Iterator[Any]:
        task = self._bar.add_task("", total=total, rate="")
        for item in items:
            yield item
            speed = self._bar.tasks[task].speed
            self._bar.update(task, advance=1, rate=f"{speed:.0f} images/s" if speed else "")


def run_index(options: argparse.Namespace) -> int:
    from multidomain_cct.data.shards import Extensions, index_path, index_shard

    for path in options.shards:
        index = index_shard(path, extensions=Extensions(image=options.image, mask=options.mask))
        masks = int((index.size[:, 1] >= 0).sum())
        Console().print(f"{index_path(path)}: {len(index.keys)} samples, {masks} with a mask", markup=False, highlight=False, soft_wrap=True)
    return DONE


def run_evaluate(options: argparse.Namespace) -> int:
    from multidomain_cct.results.evaluate import evaluate, override, print_scores, scores_as_json, write_scores
    from multidomain_cct.training.checkpoint import load_run

    run = load_run(options.folder, options.checkpoint)
    settings = override(run.recipe.evaluation, window=options.window, scales=options.scales, flip=options.flip)
    scores = evaluate(run, options.domain, options.split, settings, shards=options.shards)
    written = write_scores(run, scores)
    if options.json:
        print(json.dumps(scores_as_json(run, scores), indent=1))
    else:
        console = Console()
        print_scores(console, run, scores)
        console.print(f"written to {written}", markup=False, highlight=False, soft_wrap=True)
    return DONE


def run_predict(options: argparse.Namespace) -> int:
    import torch

    from multidomain_cct.results.evaluate import override
    from multidomain_cct.results.predict import predict
    from multidomain_cct.training.checkpoint import load_run

    run = load_run(options.folder, options.checkpoint)
    settings = override(run.recipe.evaluation, window=options.window, scales=options.scales, flip=options.flip)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with _progress("predict") as progress:
        summary = predict(run, options.domain, options.images, options.out, settings, device=device, progress=progress)
    for line in summary.unreadable:
        complain(f"skipped {line}")
    unreadable = f", {len(summary.unreadable)} skipped" if summary.unreadable else ""
    Console().print(f"{summary.written} image(s) written to {options.out}{unreadable}", markup=False, highlight=False, soft_wrap=True)
    return FAILED if summary.unreadable else DONE


def run_report(options: argparse.Namespace) -> int:
    from multidomain_cct.results.report import last_scores, write_report

    page = write_report(options.folders, options.out)
    scores = {folder: last_scores(folder) for folder in options.folders}
    table = Table("val mIoU", *(escape(folder.resolve().name) for folder in scores))
    for name in dict.fromkeys(name for found in scores.values() for name in found):
        table.add_row(name, *(f"{100 * found[name]:.1f}" if name in found else "" for found in scores.values()))
    console = Console(highlight=False)
    if table.row_count:
        console.print(table)
    console.print(f"report: {page}", markup=False, soft_wrap=True)
    return DONE


def run_domains(options: argparse.Namespace) -> int:
    from multidomain_cct.data.shards import shard_paths

    table = Table("domain", "classes", "title", "shards", "file")
    broken = []
    for name, path in known_domains(domain_folders(options.domains)).items():
        try:
            domain = read_domain(path)
        except ValueError as error:
            broken.append(str(error))
            continue
        packed = [f"{split} ({len(shard_paths(options.shards / name, split))})" for split in domain.splits if shard_paths(options.shards / name, split)]
        table.add_row(name, str(domain.num_classes), escape(domain.title), ", ".join(packed) or "none", escape(str(path)))
    Console().print(table)
    for line in broken:
        complain(line)
    return FAILED if broken else DONE


def _numbers(kind: type[int] | type[float], length: int | None = None) -> Any:
    def parse(text: str) -> list[Any]:
        values = [kind(part) for part in text.split(",")]
        if length is not None and len(values) != length:
            raise argparse.ArgumentTypeError(f"{text!r} is not {length} numbers with a comma between them")
        return values

    return parse


if __name__ == "__main__":
    sys.exit(main())
