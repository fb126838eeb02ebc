"""`train`: the word that may be left out."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from pathlib import Path

from multidomain_cct.commands.terminal import DONE, FAILED, Words, complain, domain_options, leave, say, speaks
from multidomain_cct.data.specification import domain_folders


def register(words: Words) -> None:
    command = words.add_parser("train", parents=[domain_options()], help="train a recipe (the word may be left out)")
    command.add_argument("recipe", type=Path, metavar="RECIPE")
    command.add_argument("overrides", nargs="*", metavar="key=value", help="settings that replace the recipe's")
    command.set_defaults(run=run, takes_overrides=True)


def run(options: argparse.Namespace) -> int:
    from multidomain_cct.results.report import write_report
    from multidomain_cct.training.loop import train
    from multidomain_cct.training.processes.failures import RunFailed
    from multidomain_cct.training.processes.stopping import STOPPED, RunStopped
    from multidomain_cct.training.recipe import read_recipe

    recipe = read_recipe(options.recipe, options.overrides)
    command = shlex.join(["multidomain_cct", *sys.argv[1:]])
    try:
        folder = train(
            recipe, domain_folders(options.domains, options.recipe), command=command, named_by=str(options.recipe)
        )
    except (RunFailed, RunStopped) as error:
        if speaks(error):
            complain(str(error))
        return leave(STOPPED if isinstance(error, RunStopped) else FAILED)
    if os.environ.get("RANK", "0") == "0":
        say(f"report: {write_report([folder])}")
    return DONE
