"""How many training images could not be used, and when those are too many."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from multidomain_cct.data.batches.loader import Batch, Skipped, TrainingSet
from multidomain_cct.errors import UserError

_LEAST_READ = 1000
"""Smallest number of images over which the share of bad ones is taken; one epoch where that is shorter."""


class TooManyBadImages(UserError):
    """More of a domain's images cannot be used than data.max_bad_fraction allows.

    All processes raise it at the same micro-batch, with the same message.
    """


class BadImages:
    """Counts, over all processes of a run, of images read and of images skipped, for each domain that may skip some."""

    def __init__(self, data: TrainingSet, counts: Mapping[str, Mapping[str, Any]] | None = None) -> None:
        """`counts`: those of the run that is resumed."""
        self._world = data.world
        self._streams = {stream.domain.name: stream for stream in data.streams if stream.max_bad is not None}
        earlier = {name: (counts or {}).get(name, {}) for name in self._streams}
        self._read = {name: int(count.get("read", 0)) for name, count in earlier.items()}
        self._skipped = {name: Counter[str](count.get("skipped", {})) for name, count in earlier.items()}
        self.untold: list[str] = []
        """A line for each skipped image that has not been printed; the caller prints and clears them."""

    def count(self, batches: Mapping[str, Batch], skipped: Sequence[tuple[str, Skipped]]) -> None:
        """Count this process's batches for all processes, and the images that were skipped in any of them, each with
        its domain.

        Raises TooManyBadImages. The share is checked only after a skipped image, since nothing else raises it.
        """
        for name in self._streams.keys() & batches.keys():
            self._read[name] += self._world * len(batches[name].keys)
        for name, bad in skipped:
            self._read[name] += 1
            self._skipped[name][bad.reason] += 1
            self.untold.append(f"{name}: skipped: {bad.message}")
        for name, bad in dict(skipped).items():
            self._judge(name, bad)

    def _judge(self, name: str, last: Skipped) -> None:
        stream, read, total = self._streams[name], self._read[name], self._skipped[name].total()
        # A single bad image among the first few must not look like half of them.
        least = min(_LEAST_READ, len(stream.labelled) + len(stream.unlabelled))
        if stream.max_bad is not None and total > stream.max_bad * max(read, least):
            reasons = ", ".join(f"{count} x {reason}" for reason, count in sorted(self._skipped[name].items()))
            raise TooManyBadImages(
                f"{name}: {total} of {read} images cannot be used ({reasons}), more than data.max_bad_fraction "
                f"{stream.max_bad} allows. The last: {last.message}"
            )

    @property
    def counts(self) -> dict[str, dict[str, Any]]:
        """Plain values from which a resumed run continues."""
        return {name: {"read": read, "skipped": dict(self._skipped[name])} for name, read in self._read.items()}

    @property
    def metrics(self) -> dict[str, int]:
        """Entries of metrics.jsonl: images skipped since the run's first step, by domain and reason."""
        return {
            f"data/{name}/skipped/{reason}": count
            for name, reasons in self._skipped.items()
            for reason, count in reasons.items()
        }


def skipped_in(batches: Mapping[str, Batch]) -> list[tuple[str, Skipped]]:
    """The images that were skipped in one process's batches, each with its domain."""
    return [(name, bad) for name, batch in batches.items() for bad in batch.skipped]
