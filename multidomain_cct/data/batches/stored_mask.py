"""Masks as shards hold them: PNG bytes -> train ids, to the bit."""

from __future__ import annotations

import io
import struct
import warnings
import zlib

import numpy as np
from PIL import Image

from multidomain_cct.data.domain import IGNORE, Domain
from multidomain_cct.data.images import grey_step
from multidomain_cct.data.shards.reader import BadSample

_ID_MODES = ("1", "L", "P", "I", "I;16", "I;16B")


def stored_mask(content: bytes, domain: Domain, where: str) -> Image.Image:
    """The train ids of a mask in a shard, as an 8-bit picture: grey values of 1 to 16 bits, or palette indices,
    whatever the palette.

    Raises BadSample, starting with `where`, for bytes that are no such PNG, for a picture too large to be safe, and for
    an id that the class table lacks.
    """
    try:
        with warnings.catch_warnings():
            # The size is read before the pixels; Pillow only warns of a file that would fill the memory until it is
            # twice as large.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(content), formats=("PNG",)) as mask:
                if mask.mode not in _ID_MODES:
                    raise BadSample(
                        f"{where}: the mask has the mode {mask.mode}; a mask in a shard is a PNG of train ids in one "
                        "channel.",
                        "mask: wrong mode",
                    )
                step = grey_step(mask)
                # In a palette PNG the indices are the ids; converting would give the brightness of their colours.
                stored = np.asarray(mask)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise BadSample(f"{where}: the mask is too large to be read safely ({error}).", "mask: too large") from None
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error) as error:
        raise BadSample(f"{where}: the mask cannot be read ({error}).", "mask: cannot be read") from None
    ids = stored // step if step > 1 else stored
    if not _all_known(ids, domain.num_classes):
        wrong = ids[(ids >= domain.num_classes) & (ids != IGNORE)]
        raise BadSample(
            f"{where}: the mask holds the train id {int(wrong[0])}, but {domain.name} has the classes 0 to "
            f"{domain.num_classes - 1} and {IGNORE} for ignore. "
            "The shard was made with another class table: pack it again.",
            "mask: id outside the class table",
        )
    return mask if mask.mode == "L" and step == 1 else Image.fromarray(ids.astype(np.uint8, copy=False))


def _all_known(ids: np.ndarray, num_classes: int) -> bool:
    if ids.dtype == np.uint8:
        # One more than each id, in 8 bits: 255 becomes 0, and the largest tells all. A third of the time of comparing
        # every pixel twice.
        return int((ids + np.uint8(1)).max()) <= num_classes
    return not ((ids >= num_classes) & (ids != IGNORE)).any()
