"""The program: its words, and what becomes of errors. A bare recipe path trains.

Exit codes: 0 done, 1 findings or a failed run, 2 the user's mistake, 130 stopped by Ctrl-C, 143 stopped by SIGTERM.
A mistake (UserError) is one line. What is our own fault keeps its traceback.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Sequence

from multidomain_cct import __version__
from multidomain_cct.commands import (
    compare,
    domains,
    evaluate,
    index,
    pack,
    predict,
    report,
    smoothness,
    train,
    weaklabels,
)
from multidomain_cct.commands.kept_memory import keep_freed_memory
from multidomain_cct.commands.terminal import FAILED, MISTAKE, complain, speaks
from multidomain_cct.data.shards.download import SourceError
from multidomain_cct.errors import UserError

TRACEBACK = "--traceback"
COMMANDS = (train, pack, index, evaluate, predict, report, compare, smoothness, weaklabels, domains)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    shows_traceback = TRACEBACK in arguments or os.environ.get("MDCCT_TRACEBACK") == "1"
    arguments = [word for word in arguments if word != TRACEBACK]
    parser, commands = build_parser()
    if arguments and not arguments[0].startswith("-") and arguments[0] not in commands:
        arguments.insert(0, "train")
    options, extra = parser.parse_known_args(arguments)
    # Overrides may stand behind an option, where argparse does not look for them.
    if extra and (not options.takes_overrides or not all("=" in word and not word.startswith("-") for word in extra)):
        parser.error(f"unknown argument {extra[0]!r}")
    if options.takes_overrides:
        options.overrides = [*options.overrides, *extra]
    try:
        code: int = options.run(options)
        return code
    except UserError as error:
        if speaks(error):
            if shows_traceback:
                traceback.print_exception(error)
            complain(str(error))
        return MISTAKE
    except SourceError as error:
        complain(str(error))
        return FAILED
    except OSError as error:
        # A full disk, a folder that may not be written: not what was asked, but where.
        complain(
            f"{error.filename or 'input or output'}: {error.strerror or error}. Make room or choose another place, "
            "then give the same command again."
        )
        return FAILED
    except KeyboardInterrupt:
        complain(
            "stopped. A training run goes on from its last checkpoint with resume=auto; packing goes on with the same "
            "command."
        )
        return 130


def build_parser() -> tuple[argparse.ArgumentParser, set[str]]:
    """The parser and the words that are commands."""
    parser = argparse.ArgumentParser(
        prog="multidomain_cct",
        description="Semi-supervised semantic segmentation over many domains. A bare recipe path trains it.",
    )
    # `main` takes it out before the command is known, so that it may be anywhere.
    parser.add_argument(
        TRACEBACK, action="store_true", help="also show where a mistake was found (or set MDCCT_TRACEBACK=1)"
    )
    parser.add_argument("--version", action="version", version=f"multidomain_cct {__version__}")
    parser.set_defaults(takes_overrides=False)
    words = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.register(words)
    return parser, set(words.choices)


if __name__ == "__main__":
    keep_freed_memory()
    sys.exit(main())
