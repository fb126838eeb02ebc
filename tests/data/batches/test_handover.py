from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from multidomain_cct.data.batches.handover import Handover, received


@dataclass(frozen=True)
class Item:
    number: int
    image: Tensor
    ids: Tensor
    nothing: Tensor | None = None

    def map_tensors(self, change: Callable[[Tensor], Any]) -> Item:
        return Item(self.number, change(self.image), change(self.ids))


class Items(Dataset[Any]):
    """Of sizes that grow and shrink, of several types and strides; every seventh is only a text."""

    def __getitem__(self, number: int) -> Any:
        if number % 7 == 6:
            return f"item {number}"
        generator = torch.Generator().manual_seed(number)
        side = 1 + number * 5 % 9
        image = torch.randint(0, 256, (2, side, side + 1, 3), dtype=torch.uint8, generator=generator).permute(
            0, 3, 1, 2
        )
        return {
            "a": Item(number, image, torch.rand(side, generator=generator, dtype=torch.float64)),
            "b": Item(-number, torch.empty(0, 3, 2), image > 99),
        }


def loaded(count: int, *, workers: int, prefetch: int) -> DataLoader[Any]:
    data = Handover(Items(), prefetch=prefetch)
    return DataLoader(
        data, sampler=range(count), batch_size=None, num_workers=workers, prefetch_factor=prefetch if workers else None
    )


@pytest.mark.parametrize(("workers", "prefetch"), [(0, 2), (1, 1), (1, 2), (2, 1), (2, 2), (2, 4)])
def test_items_arrive_as_they_were_and_stay_so(workers: int, prefetch: int) -> None:
    found = list(received(loaded(60, workers=workers, prefetch=prefetch), pin_memory=False))
    for number, item in enumerate(found):
        expected = Items()[number]
        if isinstance(expected, str):
            assert item == expected
            continue
        for name, part in expected.items():
            assert item[name].number == part.number
            for got, sent in ((item[name].image, part.image), (item[name].ids, part.ids)):
                assert torch.equal(got, sent) and got.dtype == sent.dtype and got.stride() == sent.stride()


@pytest.mark.parametrize("workers", [0, 1])
def test_for_a_gpu_every_tensor_is_page_locked(workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    locked = []
    # Only a machine with a GPU can lock pages.
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: (locked.append(tensor.shape), tensor.clone())[1])
    (found,) = received(loaded(1, workers=workers, prefetch=2), pin_memory=True)
    expected = Items()[0]
    assert locked == [tensor.shape for part in expected.values() for tensor in (part.image, part.ids)]
    assert torch.equal(found["a"].image, expected["a"].image) and torch.equal(found["b"].ids, expected["b"].ids)


def test_memory_is_sent_once_for_each_slot() -> None:
    class Alike(Dataset[Any]):
        def __getitem__(self, number: int) -> Any:
            return Item(number, torch.full((4, 4), number), torch.ones(3))

    parcels = DataLoader(
        Handover(Alike(), prefetch=2), sampler=range(30), batch_size=None, num_workers=2, prefetch_factor=2
    )
    assert sum(parcel.memory is not None for parcel in parcels) == 2 * 3


def test_an_item_that_was_not_taken_in_time_is_noticed() -> None:
    parcels = list(loaded(12, workers=1, prefetch=1))
    with pytest.raises(AssertionError, match="wrote to a slot that was still read"):
        list(received(parcels, pin_memory=False))
