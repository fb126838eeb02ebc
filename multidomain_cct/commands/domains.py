"""`domains`: what is known, and whether its shards are there."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from multidomain_cct.commands.terminal import DONE, FAILED, SHARDS, Words, complain, domain_options
from multidomain_cct.data.specification import domain_folders, find_domain, known_domains
from multidomain_cct.errors import UserError


def register(words: Words) -> None:
    command = words.add_parser(
        "domains", parents=[domain_options()], help="what domains are known, and whether their shards are there"
    )
    command.add_argument("--shards", type=Path, default=Path(SHARDS), metavar="DIR")
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from multidomain_cct.data.shards.index import shard_paths

    table = Table("domain", "classes", "title", "shards", "file")
    broken = []
    folders = domain_folders(options.domains)
    for name, path in known_domains(folders).items():
        try:
            domain = find_domain(name, folders)
        except UserError as error:
            broken.append(str(error))
            continue
        packed = [
            f"{split} ({len(shard_paths(options.shards / name, split))})"
            for split in domain.splits
            if shard_paths(options.shards / name, split)
        ]
        table.add_row(
            name, str(domain.num_classes), escape(domain.title), ", ".join(packed) or "none", escape(str(path))
        )
    Console().print(table)
    for line in broken:
        complain(line)
    return FAILED if broken else DONE
