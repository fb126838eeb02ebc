"""`index`: the index of WebDataset shards that somebody else wrote."""

from __future__ import annotations

import argparse
from pathlib import Path

from multidomain_cct.commands.terminal import DONE, Words, say


def register(words: Words) -> None:
    command = words.add_parser("index", help="index WebDataset shards that somebody else wrote")
    command.add_argument("shards", nargs="+", type=Path, metavar="SHARD")
    command.add_argument("--image", default="jpg", metavar="ENDING", help="ending of the images (default: jpg)")
    command.add_argument("--mask", default="png", metavar="ENDING", help="ending of the masks, 8-bit train ids (default: png)")
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from multidomain_cct.data.shard_index import index_path
    from multidomain_cct.data.tar_index import Extensions, index_shard

    for path in options.shards:
        index = index_shard(path, extensions=Extensions(image=options.image, mask=options.mask))
        masks = int((index.size[:, 1] >= 0).sum())
        say(f"{index_path(path)}: {len(index.keys)} samples, {masks} with a mask")
    return DONE
