"""`domains`: which are known, and which are packed. `domains new`: a first file for a raw folder."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from multidomain_cct.commands.terminal import (
    DONE,
    FAILED,
    SHARDS,
    Words,
    complain,
    domain_options,
    program,
    say,
    show_table,
)
from multidomain_cct.data.specification import domain_folders, known_domain, known_domains, read_domain, valid_name
from multidomain_cct.errors import UserError
from multidomain_cct.files.durable import make_folder, replace_text
from multidomain_cct.files.printable import first_few


def register(words: Words) -> None:
    command = words.add_parser(
        "domains", parents=[domain_options()], help="which domains are known, and which are packed"
    )
    command.add_argument("--shards", type=Path, default=Path(SHARDS), metavar="DIR", help=f"default: {SHARDS}")
    command.add_argument(
        "words", nargs="*", metavar="new NAME", help="write a first file for the raw folder --raw, to be corrected"
    )
    command.add_argument("--raw", type=Path, metavar="DIR", help="with `new`: folder of the raw data set")
    command.add_argument(
        "--out", type=Path, metavar="FILE", help="with `new`: the file to write (default: domains/NAME.yaml)"
    )
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    new = options.words[:1] == ["new"] and len(options.words) == 2
    if new and options.raw:
        return _new(valid_name(options.words[1], "domains new: NAME is"), options.raw, options.out)
    if options.words or options.raw or options.out:
        given = " ".join(options.words) or "with --raw or --out"
        raise UserError(f"domains {given}: write `domains` for a list, or `domains new NAME --raw DIR [--out FILE]`.")
    return _list(options)


def _new(name: str, raw: Path, out: Path | None) -> int:
    from multidomain_cct.data.packing.first_domain import LOOK, first_domain, shown

    path = out or Path("domains") / f"{name}.yaml"
    if path.stem != name or path.suffix not in (".yaml", ".yml"):
        raise UserError(f"--out: {path}: a domain's file has its name. Write {path.parent / name}.yaml.")
    if path.exists():
        raise UserError(f"{path}: exists already. Remove it, or give another NAME or --out.")
    if not raw.is_dir():
        raise UserError(f"--raw: {raw}: there is no such folder.")
    text, findings = first_domain(name, raw)
    make_folder(path.parent)
    replace_text(path, text)
    domain = read_domain(path)
    show_table(("split", "images", "labels", "labelled"), shown(findings))
    say(f"{domain.num_classes} classes: {first_few([label.name for label in domain.classes], 30)}")
    say(f"{path} has {text.count(LOOK)} places to look at. Correct them, then:")
    elsewhere = "" if path.parent == Path("domains") else f" --domains {shlex.quote(str(path.parent))}"
    say(f"  {program()} pack {name} --raw {shlex.quote(str(raw))}{elsewhere}")
    return DONE


def _list(options: argparse.Namespace) -> int:
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
