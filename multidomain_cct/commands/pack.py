"""`pack`: a raw data set -> shards."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from multidomain_cct.commands.terminal import (
    DONE,
    SHARDS,
    Words,
    complain,
    domain_options,
    progress_bar,
    say,
    show_table,
)
from multidomain_cct.data.domain import IGNORE, Domain
from multidomain_cct.data.label_findings import pixel_findings, shared_findings, table_findings
from multidomain_cct.data.specification import domain_folders, find_domain
from multidomain_cct.errors import UserError, require_number
from multidomain_cct.files.lock import locked

if TYPE_CHECKING:
    from multidomain_cct.data.packing.pack import Summary


def register(words: Words) -> None:
    command = words.add_parser("pack", parents=[domain_options()], help="raw data set -> shards")
    command.add_argument("domain", metavar="DOMAIN")
    command.add_argument(
        "--raw", type=Path, metavar="DIR", help="folder of the raw data set (not needed for toy domains)"
    )
    command.add_argument(
        "--split", action="append", default=[], metavar="S", help="split to pack; may be repeated (default: all)"
    )
    command.add_argument(
        "--out",
        type=Path,
        default=Path(SHARDS),
        metavar="DIR",
        help=f"folder with one folder of shards per domain (default: {SHARDS})",
    )
    command.add_argument("--workers", type=int, metavar="N", help="processes (default: one per core)")
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from multidomain_cct.data.packing.pack import pack
    from multidomain_cct.data.packing.raw_files import Glob
    from multidomain_cct.data.toy.scenes import render_toy

    domain = find_domain(options.domain, domain_folders(options.domains))
    if options.workers is not None:
        require_number("--workers", options.workers, at_least=1)
    if options.raw is None and domain.layout != "toy":
        raise UserError(
            f"--raw is missing: name the folder of the raw data set {domain.name} (layout {domain.layout})."
        )
    folder = options.out / domain.name
    with tempfile.TemporaryDirectory() as drawn, locked(folder, "packing"):
        raw = options.raw or Path(drawn)
        if domain.layout == "toy":
            render_toy(domain.name, raw)
        summaries = {}
        for split in options.split or _present_splits(domain, raw):
            with progress_bar(f"{domain.name}/{split}") as progress:
                summaries[split] = pack(domain, raw, split, options.out, workers=options.workers, progress=progress)
            _print_summary(domain, split, summaries[split], folder)
            images = domain.splits[split].images if domain.layout == "folder" else ""
            others = Glob(raw, images, "").others() if images and not images.endswith(".txt") else ""
            if others:
                say(f"left out, as they are not images that can be read: {others}")
    if any(summary.labelled for summary in summaries.values()):
        for line in (*table_findings(domain), *_shared_images(domain, folder, summaries)):
            complain(f"{domain.name}: {line}", "warning")
    return DONE


def _present_splits(domain: Domain, raw: Path) -> list[str]:
    """The splits that the raw folder holds. Of a data set that was fetched in part, the missing ones are named."""
    from multidomain_cct.data.packing.layouts import raw_samples
    from multidomain_cct.data.packing.raw_files import MissingRawFiles

    if not raw.is_dir():
        raise UserError(f"--raw: {raw}: there is no such folder.")
    present, errors = [], []
    for split in domain.splits:
        try:
            raw_samples(domain, raw, split)
            present.append(split)
        except MissingRawFiles as error:
            errors.append(str(error))
    if not present:
        raise UserError(errors[0])
    for line in errors:
        complain(line, "left out")
    return present


def _print_summary(domain: Domain, split: str, summary: Summary, folder: Path) -> None:
    from multidomain_cct.data.packing.encode import TURNED_ALONE

    sizes = ", ".join(f"{count} of {size}" for size, count in summary.sizes.most_common(3))
    say(
        f"{domain.name}/{split}: {summary.images} images ({summary.labelled} labelled) in {summary.shards} shard(s) "
        f"under {folder}; {sizes}{', ...' if len(summary.sizes) > 3 else ''} pixels, "
        f"{summary.image_bytes / max(1, summary.images) / 1024:.0f} KiB an image"
    )
    for remark, count in summary.remarks.items():
        if remark == TURNED_ALONE:
            complain(f"{domain.name}/{split}: {count} {remark}.", "warning")
        else:
            say(f"{count} {remark}")
    if not summary.labelled:
        return
    share = 100 * summary.pixels / max(1, summary.pixels.sum())
    names = {**dict(enumerate(label.name for label in domain.classes)), IGNORE: "ignored"}
    rows = [(str(train_id), name, f"{share[train_id]:.2f} %") for train_id, name in names.items()]
    show_table(("train id", "class", "share of pixels"), rows)
    if summary.unknown:
        values = ", ".join(f"{value} ({count} px)" for value, count in summary.unknown.most_common(8))
        say(f"raw values that no class names, now {IGNORE}: {values}{' ...' if len(summary.unknown) > 8 else ''}")
    for line in pixel_findings(domain, summary.pixels.tolist(), summary.unknown):
        complain(f"{domain.name}/{split}: {line}", "warning")


def _shared_images(domain: Domain, folder: Path, splits: Iterable[str]) -> list[str]:
    """What to say about images that a scored split shares with another one."""
    from multidomain_cct.data.shards.index import IMAGE, ShardIndex, index_path, shard_paths
    from multidomain_cct.data.shards.keys import unescape_key

    scored: dict[str, dict[tuple[int, int], str]] = {}
    others: dict[str, dict[tuple[int, int], str]] = {}
    for split in splits:
        contents = (scored if split in domain.score_at_full_size else others).setdefault(split, {})
        for index in (ShardIndex.load(index_path(path)) for path in shard_paths(folder, split)):
            facts = zip(index.size[:, IMAGE].tolist(), index.crc32[:, IMAGE].tolist(), strict=True)
            contents.update(zip(facts, map(unescape_key, index.keys), strict=True))
    return shared_findings(scored, others)
