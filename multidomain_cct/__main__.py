"""The program: its commands, and what becomes of errors. A bare recipe path trains.

Exit codes: 0 done, 1 findings or a failed run, 2 the user's mistake, 130 stopped by Ctrl-C, 143 stopped by SIGTERM.
A mistake (UserError) is one line. A fault of this software keeps its traceback.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path

from multidomain_cct import __version__
from multidomain_cct.commands import (
    compare,
    domains,
    evaluate,
    export,
    index,
    pack,
    predict,
    report,
    smoothness,
    train,
    weaklabels,
)
from multidomain_cct.commands.kept_memory import keep_freed_memory
from multidomain_cct.commands.terminal import FAILED, MISTAKE, Parser, complain, program, report_error
from multidomain_cct.data.shards.download import SourceError
from multidomain_cct.errors import UserError, death_of_loader, did_you_mean, is_out_of_memory

TRACEBACK = "--traceback"
COMMANDS = (train, pack, index, evaluate, predict, export, report, compare, smoothness, weaklabels, domains)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    shows_traceback = TRACEBACK in words or os.environ.get("MDCCT_TRACEBACK") == "1"
    words = [word for word in words if word != TRACEBACK]
    parser, commands = build_parser()
    if "_ARGCOMPLETE" in os.environ:
        # Set by the shell when it asks for completions.
        import argcomplete

        argcomplete.autocomplete(parser)
    try:
        if not words or words[0] in ("-h", "--help", "--version"):
            parser.parse_args(words)
        command = _command(words, commands)
        # Overrides may come after options.
        options = commands[command].parse_intermixed_args(words)
        code: int = options.run(options)
        return code
    except UserError as error:
        if shows_traceback:
            traceback.print_exception(error)
        report_error(error)
        return MISTAKE
    except SourceError as error:
        complain(str(error))
    except OSError as error:
        # A full disk, a folder that may not be written: the command was right.
        complain(
            f"{error.filename or 'input or output'}: {error.strerror or error}. Make room or choose another place, "
            "then give the same command again."
        )
    except (MemoryError, RuntimeError) as error:
        if death := death_of_loader(error):
            complain(f"{death} Give the same command again, with more memory free.")
            return FAILED
        if not is_out_of_memory(error):
            raise
        complain(f"out of memory ({str(error)[:160]}). Where a command has --window, a smaller one takes less.")
    except KeyboardInterrupt:
        complain("stopped. Training goes on from its last checkpoint with resume=auto, packing with the same command.")
        return 130
    return FAILED


def build_parser() -> tuple[Parser, Mapping[str, argparse.ArgumentParser]]:
    """The parser, and those of the commands by name."""
    parser = Parser(
        prog=program(), description="Semi-supervised semantic segmentation over many domains. A bare recipe trains."
    )
    # `main` removes it from the words; it is here for --help and completion.
    parser.add_argument(
        TRACEBACK, action="store_true", help="show where a mistake was found (or set MDCCT_TRACEBACK=1)"
    )
    parser.add_argument("--version", action="version", version=f"multidomain_cct {__version__}")
    words = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=Parser)
    for command in COMMANDS:
        command.register(words)
    return parser, words.choices


def _command(words: list[str], commands: Mapping[str, argparse.ArgumentParser]) -> str:
    """The command that the words give, removed from them; `train` for a recipe.

    Raises UserError when the first word is neither a command nor like a recipe.
    """
    first = words[0]
    if first.startswith("-"):
        raise UserError(f"the option {first} has no command. Options come after the command or the recipe.")
    if first in commands:
        return words.pop(0)
    if not (first.endswith((".yaml", ".yml")) or Path(first).is_file()):
        raise UserError(
            f'"{first}" is neither a command nor a recipe (a .yaml file). Commands: '
            f"{', '.join(commands)}.{did_you_mean(first, commands)}"
        )
    return "train"


def run_program() -> int:
    """`main`, for a process of its own."""
    keep_freed_memory()
    return main()


if __name__ == "__main__":
    sys.exit(run_program())
