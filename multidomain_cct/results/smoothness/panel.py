"""One picture of a diagnosis: for each image the local variation of its patches, above that of each stage's features.

Lengths are inches until the figure is drawn.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from multidomain_cct.data.domain import IGNORE
from multidomain_cct.files.durable import replacing
from multidomain_cct.files.printable import printable
from multidomain_cct.results.pictures import colored
from multidomain_cct.results.smoothness.diagnosis import Diagnosis, Example

COLUMNS = 6
"""Stages that a picture shows; of more, as many evenly spaced ones, with the first and the last."""
_WIDTH, _GAP, _MARGIN, _TITLE, _HEAD = 2.3, 0.16, 0.2, 0.27, 1.65
_FLATTEST, _TALLEST = 0.4, 1.0
"""A map's place, height to width; maps of other shapes fill a part of theirs."""
_DPI = 110
_LINE, _OUTLINED = (0.2, 1.0, 1.0, 0.75), 8
"""Colour of class borders, and the stride from which a map shows them; they would hide a finer one."""
_KEY_LENGTH = 30
"""Characters of a key above its image."""


def write_panel(diagnosis: Diagnosis, examples: Sequence[Example], path: Path) -> None:
    """Write the PNG; it appears whole or not at all."""
    figure = draw_panel(diagnosis, examples)
    content = io.BytesIO()
    with warnings.catch_warnings():
        # The font lacks letters that a key or a title may have; it draws a box in their place.
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        FigureCanvasAgg(figure).print_png(content)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_bytes(content.getvalue())


def draw_panel(diagnosis: Diagnosis, examples: Sequence[Example]) -> Figure:
    """The figure: a column per stage headed by its AUCs over all images, two lines per example."""
    chosen = chosen_stages(len(diagnosis.stages))
    heights = [
        _WIDTH * min(_TALLEST, max(_FLATTEST, example.image.shape[0] / example.image.shape[1])) for example in examples
    ]
    width = 2 * _MARGIN + (len(chosen) + 1) * (_WIDTH + _GAP) - _GAP
    height = _HEAD + sum(2 * (own + _TITLE) + _GAP for own in heights) + _MARGIN
    figure = Figure(figsize=(width, height), dpi=_DPI)
    page = _Page(figure, width, height)
    _write_heading(page, diagnosis, chosen)
    top = height - _HEAD
    for example, own in zip(examples, heights, strict=True):
        lines = (top - _TITLE - own, top - 2 * (_TITLE + own))
        _draw_example(page, example, chosen, lines, own, diagnosis)
        top = lines[1] - _GAP
    return figure


def chosen_stages(count: int) -> list[int]:
    """Which of the stages are shown, by position."""
    return sorted({round(position) for position in np.linspace(0, count - 1, min(count, COLUMNS))})


class _Page:
    """A figure on which things are placed in inches from its lower left corner, so that nothing meets."""

    def __init__(self, figure: Figure, width: float, height: float) -> None:
        self.figure, self.width, self.height = figure, width, height

    def column(self, number: int) -> float:
        return _MARGIN + number * (_WIDTH + _GAP)

    def write(self, left: float, bottom: float, text: str, **style: Any) -> None:
        # Keys and names are not mathematics, whatever dollar signs they hold.
        self.figure.text(left / self.width, bottom / self.height, text, parse_math=False, **style)

    def show(
        self,
        column: int,
        bottom: float,
        height: float,
        values: np.ndarray,
        *,
        extent: tuple[float, float, float, float] | None = None,
        title: str = "",
    ) -> Any:
        place = (self.column(column) / self.width, bottom / self.height, _WIDTH / self.width, height / self.height)
        axes = self.figure.add_axes(place)
        # Pictures (H, W, 3) have no scale. In a map a few values lie beyond it: one lamp must not darken all else.
        low, high = (float(np.percentile(values, share)) for share in (2, 98)) if values.ndim == 2 else (None, None)
        axes.imshow(values, cmap="magma", vmin=low, vmax=high, interpolation="nearest", extent=extent)
        axes.set_anchor("NW")
        axes.set_axis_off()
        self.write(self.column(column), bottom + height + 0.06, title, fontsize=9)
        return axes


def _write_heading(page: _Page, diagnosis: Diagnosis, chosen: Sequence[int]) -> None:
    title = f"Local variation: {printable(diagnosis.subject)} on {diagnosis.domain.name}/{diagnosis.split}"
    page.write(_MARGIN, page.height - 0.38, title, fontsize=14, weight="bold")
    legend = (
        "Mean Euclidean distance to the 8 neighbours; dark: small, bright: large, each map on its own scale. Above: "
        "image patches; below: features."
        " Thin lines on coarse maps: class borders."
    )
    page.write(_MARGIN, page.height - 0.66, legend, fontsize=9, color="0.3")
    borders = "class borders of the labels" if diagnosis.borders == "labels" else "the model's own borders"
    page.write(
        _MARGIN,
        page.height - _HEAD + 0.12,
        f"AUC as a detector of\n{borders},\nmean of {diagnosis.images} images",
        fontsize=9.5,
        linespacing=1.35,
    )
    for column, number in enumerate(chosen, start=1):
        score = diagnosis.stages[number]
        lines = (
            f"stride {score.stride}, {score.channels} channels\nAUC {_figure(score.auc)}, patches "
            f"{_figure(score.patch_auc)}"
        )
        page.write(page.column(column), page.height - _HEAD + 0.54, score.name, fontsize=11, weight="bold")
        page.write(page.column(column), page.height - _HEAD + 0.12, lines, fontsize=9.5, linespacing=1.35)


def _draw_example(
    page: _Page,
    example: Example,
    chosen: Sequence[int],
    lines: tuple[float, float],
    height: float,
    diagnosis: Diagnosis,
) -> None:
    page.show(0, lines[0], height, example.image, title=_short(example.key))
    page.show(0, lines[1], height, np.asarray(colored(example.ids, diagnosis.domain)), title=diagnosis.borders)
    shown = 0
    for column, number in enumerate(chosen, start=1):
        result = example.measured[number]
        stride = result.stage.stride
        # Neighbours of one stride, such as the blocks of a ViT, share one map of the patches.
        if stride != shown:
            _draw_map(
                page,
                (column, lines[0], height),
                result.patches,
                stride,
                example,
                f"patches {stride} x {stride}, AUC {_figure(result.patch_area)}",
            )
        shown = stride
        _draw_map(
            page,
            (column, lines[1], height),
            result.features,
            stride,
            example,
            f"{result.stage.name}, AUC {_figure(result.area)}",
        )


def _draw_map(
    page: _Page, place: tuple[int, float, float], variation: Tensor, stride: int, example: Example, title: str
) -> None:
    """A map where its patches lie in the image; what no whole patch covers stays white."""
    rows, columns = variation.shape
    if not variation.numel():
        page.write(page.column(place[0]), place[1] + place[2] + 0.06, f"{title}: image too small", fontsize=9)
        return
    height, width = example.image.shape[:2]
    axes = page.show(*place, variation.numpy(), extent=(0, columns * stride, rows * stride, 0), title=title)
    if stride >= _OUTLINED:
        axes.imshow(outline(example.ids), extent=(0, width, height, 0), interpolation="antialiased")
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)


def outline(ids: np.ndarray) -> np.ndarray:
    """(H', W', 4) RGBA 0 to 1: a line where (H', W') train ids differ from those above or to the left, else
    transparent; none towards ignored pixels.
    """
    picture = np.zeros((*ids.shape, 4))
    for before, after, place in ((ids[:-1], ids[1:], picture[1:]), (ids[:, :-1], ids[:, 1:], picture[:, 1:])):
        place[(before != after) & (before != IGNORE) & (after != IGNORE)] = _LINE
    return picture


def _figure(value: float | None) -> str:
    return "none" if value is None else f"{value:.3f}"


def _short(key: str) -> str:
    text = printable(key)
    return text if len(text) <= _KEY_LENGTH else f"...{text[3 - _KEY_LENGTH :]}"
