"""Which of a split's labelled images a run may use the labels of."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath

from PIL import Image

from multidomain_cct.data.images import IMAGE_FORMATS
from multidomain_cct.data.shards.keys import unescape_key
from multidomain_cct.errors import UserError, did_you_mean
from multidomain_cct.files.seeds import seed_from


def labelled_subset(
    keys: Sequence[str],
    budget: str,
    *,
    seed: int,
    where: str,
    first: Callable[[list[str], int], list[str]] | None = None,
    origins: Callable[[], Iterable[str]] = tuple,
) -> list[str]:
    """The keys whose labels may be used.

    `budget` is a number, a fraction such as 1/16, `all`, or a text file with one image a line. Of a number, they are
    the first ones of a pseudo-random order that depends on keys and seed alone, not on shards or listing; or those that
    `first(keys in that order, number)` gives. Smaller budgets lie inside larger ones. `origins` gives the raw file of
    each key, by which a list may name images. Raises UserError, starting with `where`, for a budget that cannot be met.
    """
    if budget == "all":
        return sorted(keys)
    parts = budget.split("/")
    if len(parts) > 2 or not all(part.isascii() and part.isdigit() for part in parts):
        return _listed_keys(keys, Path(budget), where, origins)
    count = int(parts[0])
    if len(parts) == 2:
        if not 0 < count <= int(parts[1]):
            raise UserError(f"{where} is {budget}; a share lies above 0 and is at most 1.")
        count = max(1, round(len(keys) * count / int(parts[1])))
    if count > len(keys):
        raise UserError(
            f"{where} asks for {count} labelled images; there are {len(keys)}. Ask for at most {len(keys)}, or `all`."
        )
    ordered = sorted(keys, key=lambda key: (seed_from(seed, key, "budget"), key))
    return first(ordered, count) if first else ordered[:count]


def _listed_keys(keys: Sequence[str], path: Path, where: str, origins: Callable[[], Iterable[str]]) -> list[str]:
    if not path.is_file():
        raise UserError(
            f"{where} is {str(path)!r}, and there is no such file; it is a number, a share such as 1/16, `all`, or a "
            "text file with one image a line."
        )
    try:
        listed = {line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()} - {""}
    except UnicodeDecodeError:
        listed = {"\0"}
    if any("\0" in line for line in listed):
        raise UserError(f"{where}: {path} is not text in UTF-8. Save it as UTF-8.") from None
    if not listed:
        raise UserError(f"{where}: {path} lists no images.")
    named = _lookup({unescape_key(key): key for key in keys} | {key: key for key in keys})
    found = {line: named(line) for line in listed}
    if None in found.values():
        # In some layouts, keys are not the names of the files.
        named = _lookup({_without_ending(file): key for file, key in zip(origins(), keys, strict=False)})
        found = {line: key or named(line) for line, key in found.items()}
    if unknown := sorted(line for line, key in found.items() if key is None):
        name = _without_ending(unknown[0])
        raise UserError(
            f"{where}: {path} lists {unknown[0]!r}, which is not among the {len(keys)} labelled images"
            f"{f' ({len(unknown)} of {len(listed)} lines are not)' if len(unknown) > 1 else ''}."
            f"{did_you_mean(name, map(unescape_key, keys)) or f' One is {unescape_key(min(keys))!r}.'}"
        )
    return sorted({key for key in found.values() if key is not None})


def _lookup(names: dict[str, str]) -> Callable[[str], str | None]:
    """A function that gives the key that a line names: by its name, with or without ending and leading folders, which
    may be followed by the path of its mask. A name alone is enough when only one folder has it.
    """
    in_folders = Counter(PurePosixPath(name).name for name in names)
    short = {base: key for name, key in names.items() if in_folders[base := PurePosixPath(name).name] == 1}

    def key_of(line: str) -> str | None:
        if line in names:
            return names[line]
        for text in _images_in(line):
            folders = text.replace("\\", "/").split("/")
            tails = ["/".join(folders[start:]) for start in range(len(folders))]
            for known, tried in ((names, tails), (short, tails if len(tails) == 1 else [])):
                for name in (name for tail in tried for name in (tail, _without_ending(tail))):
                    if name in known:
                        return known[name]
        return None

    return key_of


def _images_in(line: str) -> Iterator[str]:
    """What may be the image in a line: what ends where an image's file name does, the first of two words, or all."""
    words = line.split()
    for separator in re.finditer(r"[\s,;]", line):
        if _without_ending(line[: separator.start()]) != line[: separator.start()]:
            yield line[: separator.start()]
    yield from words[:1] if len(words) == 2 else ()
    yield line


def _without_ending(name: str) -> str:
    """The name without the ending of an image file, if it has one."""
    stem, dot, ending = name.rpartition(".")
    return stem if Image.registered_extensions().get(f".{ending.lower()}") in IMAGE_FORMATS and dot else name
