"""`index`: index WebDataset shards that somebody else wrote."""

from __future__ import annotations

import argparse
import re
from collections import Counter
from pathlib import Path

from multidomain_cct.commands.terminal import DONE, Words, say
from multidomain_cct.errors import UserError


def register(words: Words) -> None:
    command = words.add_parser("index", help="index WebDataset shards that somebody else wrote")
    command.add_argument("shards", nargs="+", type=Path, metavar="SHARD")
    command.add_argument("--image", default="jpg", metavar="ENDING", help="ending of the images (default: jpg)")
    command.add_argument(
        "--mask", default="png", metavar="ENDING", help="ending of the masks, 8-bit train ids (default: png)"
    )
    command.add_argument(
        "--verify", action="store_true", help="read the shards whole and compare every byte with their index"
    )
    command.add_argument(
        "--catalogue",
        action="store_true",
        help="list the shards' splits in catalogues: for very many shards, or to offer them at an address",
    )
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from multidomain_cct.data.shards.catalogue import Catalogue, catalogue_path
    from multidomain_cct.data.shards.index import index_path, shard_paths
    from multidomain_cct.data.shards.scan import Extensions, index_shard, verify_shard

    for path in options.shards:
        if path.is_dir():
            raise UserError(f"{path} is a folder. Name its shards: {path}/train-*.tar")
        if not path.is_file():
            raise UserError(f"{path}: there is no such shard.")
        _require_usable_name(path)
    if options.verify:
        for path in options.shards:
            say(f"{path}: {len(verify_shard(path).keys)} samples, as they were indexed")
    if options.catalogue:
        for folder, split in dict.fromkeys((path.parent, path.name.rpartition("-")[0]) for path in options.shards):
            paths = shard_paths(folder, split)
            if not paths:
                raise UserError(f"{folder} has no {split} shards. A shard is named SPLIT-NUMBER.tar.")
            catalogue = Catalogue.of(paths)
            catalogue.save(catalogue_path(folder, split))
            say(f"{catalogue_path(folder, split)}: {int(catalogue.samples.sum())} samples in {len(paths)} shard(s)")
    if options.verify or options.catalogue:
        return DONE
    for path in options.shards:
        passed_over: Counter[str] = Counter()
        endings = Extensions(image=options.image, mask=options.mask)
        index = index_shard(path, extensions=endings, skipped=passed_over)
        masks = int((index.size[:, 1] >= 0).sum())
        skipped = ", ".join(f"{count} x {ending}" for ending, count in passed_over.items())
        more = f"; skipped: {skipped}" if skipped else ""
        say(f"{index_path(path)}: {len(index.keys)} samples, {masks} with a mask{more}")
    return DONE


def _require_usable_name(path: Path) -> None:
    """Raises UserError, with the name that is needed, for a shard that training would not find."""
    if not re.fullmatch(r".+-[0-9]+\.tar", path.name):
        split, number = re.match(r"([A-Za-z]*)\D*(\d*)", path.name.removesuffix(".tar")).groups()  # type: ignore[union-attr]
        needed = path.with_name(f"{split or 'train'}-{number or '00000'}.tar")
        raise UserError(f"{path} would not be found: a shard is named SPLIT-NUMBER.tar. Rename it, such as {needed}")
