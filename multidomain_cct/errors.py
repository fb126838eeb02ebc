"""The one exception that becomes one line, and the checks that settings have in common."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable


class UserError(Exception):
    """What a person has to change. The message is one line: where, what was found, what is allowed, what to do.

    It ends a command with exit code 2 and no traceback; every other exception is our own fault, or the machine's, and
    keeps its traceback.
    """


def is_out_of_memory(error: Exception) -> bool:
    """Whether Python or torch, on a GPU or a CPU, could not get memory."""
    text = r"CUDA (error: )?out of memory|(CUBLAS|CUDNN)_STATUS_ALLOC_FAILED|DefaultCPUAllocator"
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and bool(re.search(text, str(error))))


def death_of_loader(error: Exception) -> str | None:
    """What to say when torch tells of a loader process that was killed; None for any other error."""
    text = " ".join(str(error).split())
    if not isinstance(error, RuntimeError) or not text.startswith("DataLoader worker (pid"):
        return None
    return f"a loader process died: {text.split('. ')[0]}. Was it killed for want of memory?"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A closing question that names the nearest known word, or nothing."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f' Did you mean "{near[0]}"?' if near else ""


def require_choice(key: str, value: str, allowed: Iterable[str]) -> None:
    """Raises UserError, which lists what is allowed, when the value of a setting is not among it."""
    names = list(allowed)
    if value not in names:
        raise UserError(f"{key} is {value!r}; it is one of {', '.join(names)}.{did_you_mean(str(value), names)}")


def require_number(
    key: str,
    value: float,
    *,
    above: float = -math.inf,
    at_least: float = -math.inf,
    below: float = math.inf,
    at_most: float = math.inf,
) -> None:
    """Raises UserError, which gives the range, when the value of a setting lies outside it or is nan."""
    bounds = {"above": above, "at least": at_least, "below": below, "at most": at_most}
    if not (above < value < below and at_least <= value <= at_most):
        allowed = " and ".join(f"{word} {bound:g}" for word, bound in bounds.items() if math.isfinite(bound))
        raise UserError(f"{key} is {value}; it is {allowed or 'a number'}.")
