"""Items of loader processes, handed to the training process in memory that both keep.

torch shares each tensor in memory of its own, whose pages the system has to clear: some milliseconds for a batch of a few megabytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

_ALIGNMENT = 64
"""Bytes that each tensor begins at a multiple of; the first of them hold the slot's stamp."""


@runtime_checkable
class HasTensors(Protocol):
    """What is handed over."""

    def map_tensors(self, change: Callable[[Tensor], Any]) -> Any:
        """The same with each tensor replaced."""


@dataclass(frozen=True)
class _Place:
    """Where a tensor lies in a slot."""

    start: int
    """Bytes."""
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def of(self, slot: Tensor) -> Tensor:
        return slot[self.start : self.start + self.num_bytes].view(self.dtype).as_strided(self.shape, self.strides)


@dataclass(frozen=True)
class _Parcel:
    """An item whose tensors lie in a slot."""

    content: Any
    """The item, a _Place for each of its tensors."""
    slot: tuple[int, int]
    """Number of the loader process, and of the slot among its own."""
    stamp: int
    """What stands at the slot's beginning until it is written anew."""
    memory: Tensor | None
    """The slot, when it is new."""


class Handover(Dataset[Any]):
    """A data set whose items, in a loader process, are written to slots of shared memory that take turns. `received` makes them whole again.

    A slot is written anew after `prefetch` further items of its process. A DataLoader asks a process for the next item when it gives one of its items to the
    training process, and has by then given out all that came `prefetch` items before that one: whoever takes each item before asking for another, as `received`
    does, is done with the slot.
    """

    def __init__(self, data: Dataset[Any], *, prefetch: int) -> None:
        self.data = data
        self._num_slots = prefetch + 1
        self._slots: dict[int, Tensor] = {}
        self._sent = 0

    def __getitem__(self, number: int) -> Any:
        item, process = self.data[number], get_worker_info()
        if process is None:
            return item
        tensors: list[tuple[Tensor, _Place]] = []
        end = _ALIGNMENT

        def place(tensor: Tensor) -> _Place:
            nonlocal end
            dense = torch.empty_like(tensor, device="meta").stride()
            found = _Place(end, tuple(tensor.shape), dense, tensor.dtype)
            end += -(-found.num_bytes // _ALIGNMENT) * _ALIGNMENT
            tensors.append((tensor, found))
            return found

        content = _mapped(item, place)
        if not tensors:
            return item
        turn, self._sent = self._sent % self._num_slots, self._sent + 1
        slot, memory = self._slots.get(turn), None
        if slot is None or len(slot) < end:
            slot = self._slots[turn] = memory = torch.empty(end, dtype=torch.uint8).share_memory_()  # type: ignore[no-untyped-call]
        _stamp(slot).fill_(self._sent)
        for tensor, where in tensors:
            where.of(slot).copy_(tensor)
        return _Parcel(content, (process.id, turn), self._sent, memory)


def received(items: Iterable[Any], *, pin_memory: bool) -> Iterator[Any]:
    """The items of a DataLoader over a Handover, their tensors in memory of their own: page-locked, so that a GPU fetches them while others compute, or not."""
    slots: dict[tuple[int, int], Tensor] = {}
    keep = Tensor.pin_memory if pin_memory else Tensor.clone
    for item in items:
        if isinstance(item, _Parcel):
            if item.memory is not None:
                slots[item.slot] = item.memory
            yield _unpacked(item, slots[item.slot], keep)
        else:
            yield _mapped(item, keep) if pin_memory else item


def _unpacked(parcel: _Parcel, slot: Tensor, keep: Callable[[Tensor], Tensor]) -> Any:
    item = _mapped(parcel.content, lambda place: keep(place.of(slot)))
    assert _stamp(slot).item() == parcel.stamp, "a loader process wrote to a slot that was still read"
    return item


def _stamp(slot: Tensor) -> Tensor:
    return slot[:8].view(torch.int64)


def _mapped(item: Any, change: Callable[[Any], Any]) -> Any:
    """The item with each of its tensors replaced; of a dict, those of its values. What has no tensors stays as it is."""
    if isinstance(item, dict):
        return {key: _mapped(value, change) for key, value in item.items()}
    return item.map_tensors(change) if isinstance(item, HasTensors) else item
