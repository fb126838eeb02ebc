"""Label masks as they are published, read as train ids.

Shapes: H W size of the mask.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from multidomain_cct.data.domain import IGNORE, Domain
from multidomain_cct.data.images import ID_MODES, load_mask
from multidomain_cct.data.packing.raw_files import MaskFile
from multidomain_cct.errors import UserError

_FORMATS = ("PNG", "BMP", "TIFF", "GIF", "PPM", "JPEG")


def read_mask(mask: MaskFile, domain: Domain) -> tuple[np.ndarray, dict[str, int]]:
    """The (H, W) uint8 train ids of a mask, and the pixel count of each raw value that the class table lacks, by the
    printed value ("12", "#ff0080").

    Single-channel images hold raw ids; palette images hold them as indices, whatever the palette; RGB images hold raw
    colours, and transparency is ignored. Values without a class become IGNORE; those in the domain's ignore_ids and
    ignore_colors are not counted. Raises UserError, naming the file, when it cannot be read, when its format alters
    labels, and for unknown values when the domain has `unknown: error`.
    """
    values = _read_pixels(mask.path, domain) if mask.cell is None else _read_cell(mask.path, mask.cell)
    if values.ndim == 3:
        train_ids, known = _colors_to_train_ids(values, domain)
    elif mask.train_ids:
        known = (values >= 0) & ((values < domain.num_classes) | (values == IGNORE))
        train_ids = np.where(known, values, IGNORE).astype(np.uint8)
    else:
        train_ids, known = _ids_to_train_ids(values, domain)
    return train_ids, {} if known.all() else _count_unknown(values[~known], mask, domain)


def _ids_to_train_ids(ids: np.ndarray, domain: Domain) -> tuple[np.ndarray, np.ndarray]:
    """Train ids, and whether the table knows the id, both (H, W)."""
    train, known = domain.id_lookup
    if ids.dtype == np.uint8:
        # The usual case, in which packing spends its time: a short table stays in the fastest cache.
        return train[:256].take(ids), known[:256].take(ids)
    if ids.dtype.itemsize <= 2 and ids.dtype.kind == "u":
        return train[ids], known[ids]
    inside = (ids >= 0) & (ids < len(train))
    bounded = np.where(inside, ids, 0)
    return np.where(inside, train[bounded], IGNORE).astype(np.uint8), inside & known[bounded]


def _colors_to_train_ids(colors: np.ndarray, domain: Domain) -> tuple[np.ndarray, np.ndarray]:
    """Train ids, and whether the table knows the colour, both (H, W)."""
    codes, train = domain.color_lookup
    pixels = _codes(colors)
    nearest = np.searchsorted(codes, pixels).clip(max=len(codes) - 1)
    known = codes[nearest] == pixels
    return np.where(known, train[nearest], IGNORE).astype(np.uint8), known


def _count_unknown(values: np.ndarray, mask: MaskFile, domain: Domain) -> dict[str, int]:
    is_color = values.ndim == 2
    found, counts = np.unique(_codes(values) if is_color else values, return_counts=True)
    names = [f"#{value:06x}" if is_color else str(value) for value in found.tolist()]
    unknown = dict(zip(names, counts.tolist(), strict=True))
    if domain.unknown == "error":
        value, count = max(unknown.items(), key=lambda item: item[1])
        what, field = ("colour", "ignore_colors") if is_color else ("id", "ignore_ids")
        others = f", and {len(unknown) - 1} more such values" if len(unknown) > 1 else ""
        raise UserError(
            f"{mask.path}: {count} pixels have the {what} {value}, which no class of {domain.name} names{others}. Add "
            f"it to a class or to {field}."
        )
    return unknown


def _codes(colors: np.ndarray) -> np.ndarray:
    """(..., 3) colours as the integer codes of `Domain.color_lookup`."""
    red, green, blue = np.moveaxis(colors.astype(np.int64), -1, 0)
    codes: np.ndarray = red << 16 | green << 8 | blue
    return codes


def _read_pixels(path: Path, domain: Domain) -> np.ndarray:
    """Raw ids (H, W) or raw colours (H, W, 3) of an image file."""
    image, values = load_mask(path, str(path), _FORMATS)
    if image.format == "JPEG" or image.info.get("compression") in ("jpeg", "tiff_jpeg"):
        raise UserError(
            f"{path}: the mask is JPEG-compressed, which changes labels along every border. Export it as PNG."
        )
    if image.mode not in (*ID_MODES, "RGB", "RGBA"):
        raise UserError(
            f"{path}: the mask has pixels of Pillow's mode {image.mode}. Export it as 8- or 16-bit ids in one "
            "channel, palette indices or RGB colours."
        )
    if image.mode == "P":
        _refuse_two_readings(path, values, image.getpalette("RGB") or [], domain)
    if values.ndim == 2:
        return values
    _require_one_class_per_color(path, domain)
    return values[..., :3]


def _refuse_two_readings(path: Path, indices: np.ndarray, palette: list[int], domain: Domain) -> None:
    """Refuse indices of other classes than their colours in the palette, when the class table has all of these."""
    used = np.flatnonzero(np.bincount(indices.ravel()))
    colors = np.array(palette, dtype=np.uint8).reshape(-1, 3)
    by_id, _ = _ids_to_train_ids(used, domain)
    by_color, known = _colors_to_train_ids(colors[used[used < len(colors)]], domain)
    # One colour alone may agree by chance, such as black.
    if len(known) < len(used) or not known.all() or len(np.unique(by_color)) < 2 or (by_id == by_color).all():
        return
    first = int(np.flatnonzero(by_id != by_color)[0])
    names = {train_id: f'"{label.name}"' for train_id, label in enumerate(domain.classes)}
    number, color = (names.get(int(ids[first]), "no class") for ids in (by_id, by_color))
    raise UserError(
        f"{path}: the palette's entry {used[first]} is {number} by its number, and {color} by its colour "
        f"{colors[used[first]].tolist()}. Export the mask as RGB if colours are right, as grey ids if numbers are."
    )


def _require_one_class_per_color(path: Path, domain: Domain) -> None:
    codes, train = domain.color_lookup
    shared = np.flatnonzero((codes[1:] == codes[:-1]) & (train[1:] != train[:-1]))
    if len(shared):
        pair = " and ".join(domain.classes[train[place]].name for place in (shared[0], shared[0] + 1))
        raise UserError(
            f"{path}: the mask holds colours, and the classes {pair} of {domain.name} have the same color. Give each "
            "its own, or export masks of ids."
        )


def _read_cell(path: Path, cell: int) -> np.ndarray:
    """Raw ids (H, W) of one image in SUNRGBD2Dseg.mat."""
    import h5py

    # Opened for every mask: an open HDF5 file does not survive the fork of a worker.
    try:
        with h5py.File(path, "r") as table:
            ids: np.ndarray = table[table["SUNRGBD2Dseg"]["seglabel"][cell][0]][()]
    except (OSError, KeyError, IndexError, ValueError) as error:
        what = f"the labels of image {cell + 1} cannot be read ({error})"
        raise UserError(f"{path}: {what}. Fetch SUNRGBDtoolbox.zip again.") from None
    # MATLAB stores columns first.
    return np.ascontiguousarray(ids.T)
