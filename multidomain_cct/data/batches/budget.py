"""Which images a labelled budget takes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from multidomain_cct.errors import UserError
from multidomain_cct.files.seeds import seed_from


def labelled_subset(keys: Sequence[str], budget: str, *, seed: int, where: str) -> list[str]:
    """The keys whose labels may be used: the first n of a fixed pseudo-random order, so that smaller budgets lie inside
    larger ones.

    `budget` is a number, a fraction such as 1/16, `all`, or a text file with one key a line. The order hangs on the
    keys alone, not on shards or listing. Raises UserError, starting with `where`, for a budget that cannot be met.
    """
    if budget == "all":
        return sorted(keys)
    if _is_number(budget):
        count = int(budget)
    elif budget.count("/") == 1 and all(_is_number(part) for part in budget.split("/")):
        numerator, denominator = (int(part) for part in budget.split("/"))
        if not 0 < numerator <= denominator:
            raise UserError(f"{where} is {budget}; a share lies above 0 and is at most 1.")
        count = max(1, round(len(keys) * numerator / denominator))
    else:
        return _listed_keys(keys, Path(budget), where)
    if count > len(keys):
        raise UserError(
            f"{where} asks for {count} labelled images; there are {len(keys)}. Ask for at most {len(keys)}, or `all`."
        )
    return sorted(keys, key=lambda key: (seed_from(seed, key, "budget"), key))[:count]


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit()


def _listed_keys(keys: Sequence[str], path: Path, where: str) -> list[str]:
    if not path.is_file():
        raise UserError(
            f"{where} is {str(path)!r}; it is a number, a share such as 1/16, `all`, or a text file with one key a "
            "line."
        )
    try:
        listed = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError:
        raise UserError(f"{where}: {path} is not text in UTF-8; it is a text file with one key a line.") from None
    known = set(keys)
    for key in listed:
        if key not in known:
            raise UserError(
                f"{where}: {path} lists the key {key!r}, which is not among the {len(keys)} labelled images."
            )
    if not listed:
        raise UserError(f"{where}: {path} lists no keys.")
    return sorted(set(listed))
