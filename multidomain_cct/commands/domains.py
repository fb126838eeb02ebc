"""`domains`: which are known, and which are packed."""

from __future__ import annotations

import argparse
from pathlib import Path

from multidomain_cct.commands.terminal import DONE, FAILED, SHARDS, Words, complain, domain_options, show_table
from multidomain_cct.data.specification import domain_folders, known_domain, known_domains
from multidomain_cct.errors import UserError


def register(words: Words) -> None:
    command = words.add_parser(
        "domains", parents=[domain_options()], help="which domains are known, and which are packed"
    )
    command.add_argument("--shards", type=Path, default=Path(SHARDS), metavar="DIR", help=f"default: {SHARDS}")
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from multidomain_cct.data.shards.index import shard_paths

    rows, broken = [], []
    known = known_domains(domain_folders(options.domains))
    for name, path in known.items():
        try:
            domain = known_domain(name, known)
        except UserError as error:
            broken.append(str(error))
            continue
        counts = {split: len(shard_paths(options.shards / name, split)) for split in domain.splits}
        packed = ", ".join(f"{split} ({count})" for split, count in counts.items() if count)
        rows.append((name, str(domain.num_classes), domain.title, packed or "none", str(path)))
    show_table(("domain", "classes", "title", "shards", "file"), rows)
    for line in broken:
        complain(line)
    return FAILED if broken else DONE
