"""Masks as shards hold them: PNG bytes -> train ids, to the bit."""

from __future__ import annotations

import numpy as np
from PIL import Image

from multidomain_cct.data.domain import IGNORE, Domain
from multidomain_cct.data.images import ID_MODES, load_mask
from multidomain_cct.data.shards.reader import BadSample
from multidomain_cct.errors import UserError


def stored_mask(content: bytes, domain: Domain, where: str) -> Image.Image:
    """The train ids of a mask in a shard, as an 8-bit picture: grey values of 1 to 16 bits, or palette indices,
    whatever the palette.

    Raises BadSample, starting with `where`, for bytes that are not such a PNG, for a picture too large to be safe, and
    for an id that the class table lacks.
    """
    try:
        mask, ids = load_mask(content, where, ("PNG",))
    except UserError as error:
        raise BadSample(str(error), "mask: cannot be read") from None
    if mask.mode not in ID_MODES:
        raise BadSample(
            f"{where}: the mask has the mode {mask.mode}; a mask in a shard is a PNG of train ids in one channel.",
            "mask: wrong mode",
        )
    if not _all_known(ids, domain.num_classes):
        wrong = ids[(ids >= domain.num_classes) & (ids != IGNORE)]
        raise BadSample(
            f"{where}: the mask holds the train id {int(wrong[0])}, but {domain.name} has the classes 0 to "
            f"{domain.num_classes - 1} and {IGNORE} for ignore. Pack it again with this class table.",
            "mask: id outside the class table",
        )
    return Image.fromarray(ids.astype(np.uint8, copy=False))


def _all_known(ids: np.ndarray, num_classes: int) -> bool:
    if ids.dtype == np.uint8:
        # Adding 1 in 8 bits turns 255 into 0, so the maximum decides: a third of the time of two comparisons.
        return int((ids + np.uint8(1)).max()) <= num_classes
    return not ((ids >= num_classes) & (ids != IGNORE)).any()
