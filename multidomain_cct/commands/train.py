"""`train`: the word that may be left out."""

from __future__ import annotations

import argparse
import os
import shlex
import sys

from multidomain_cct.commands.terminal import DONE, FAILED, Words, leave, program, recipe_options, report_error, say
from multidomain_cct.data.specification import domain_folders


def register(words: Words) -> None:
    command = words.add_parser("train", parents=[recipe_options()], help="train a recipe (the word may be left out)")
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from multidomain_cct.results.report.page import write_report
    from multidomain_cct.training.loop import train
    from multidomain_cct.training.processes.failures import RunFailed
    from multidomain_cct.training.processes.stopping import RunStopped
    from multidomain_cct.training.recipe import read_recipe

    recipe = read_recipe(options.recipe, options.overrides)
    folders = domain_folders(options.domains, options.recipe)
    try:
        folder = train(recipe, folders, command=f"{program()} {shlex.join(sys.argv[1:])}", named_by=str(options.recipe))
    except (RunFailed, RunStopped) as error:
        report_error(error)
        return leave(error.exit_code if isinstance(error, RunStopped) else FAILED)
    if os.environ.get("RANK", "0") == "0":
        say(f"report: {write_report([folder])}")
    return DONE
