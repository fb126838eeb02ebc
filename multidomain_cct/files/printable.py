"""Texts from files, made fit to be shown."""

from collections.abc import Sequence


def printable(text: str) -> str:
    r"""The text with line breaks, other control characters and lone surrogates as escapes, such as \x07, so that it
    cannot control a terminal.
    """
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode("ascii") for letter in text
    )


def first_few(items: Sequence[str], count: int = 4) -> str:
    """The first of the items, and how many more there are."""
    return ", ".join(items[:count]) + (f", and {len(items) - count} more" if len(items) > count else "")
