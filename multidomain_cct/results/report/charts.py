"""Curves of runs as inline SVG."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from multidomain_cct.results.report.facts import RunFacts

_CURVE_POINTS = 400
_INK = "#0b0c0d"
"""Drawn by matplotlib, then replaced by the page's own text colour."""
_INKED = ("text.color", "xtick.color", "ytick.color", "axes.edgecolor", "axes.labelcolor", "grid.color")
_STYLE: dict[str, Any] = dict.fromkeys(_INKED, _INK) | {
    "font.size": 8.5,
    "font.sans-serif": ["DejaVu Sans"],
    "svg.fonttype": "none",
    "svg.hashsalt": "report",
    "axes.linewidth": 0.6,
    "lines.linewidth": 1.4,
    "lines.markersize": 3,
}


def charts(name: str, runs: Sequence[RunFacts]) -> Iterator[tuple[str, str]]:
    """(title, SVG) of each loss term of a domain and of its val mIoU."""
    prefix, score = f"train/{name}/", f"val/{name}/miou"
    keys = dict.fromkeys(key for run in runs for line in run.metrics for key in line)
    for key in keys:
        # What else is recorded of a domain has a name in two parts: pseudo_labels/<class>.
        if key.startswith(prefix) and "/" not in key.removeprefix(prefix):
            yield f"{key.removeprefix(prefix)} loss", _chart(key, runs)
    if score in keys:
        yield "val mIoU, %", _chart(score, runs, factor=100)


def _chart(key: str, runs: Sequence[RunFacts], *, factor: float = 1) -> str:
    """An inline SVG of one metric over the steps, a line per run."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(3.5, 2.1), layout="constrained")
        axes = figure.add_subplot()
        for run in runs:
            steps, values = _thinned(*run.series(key))
            marker = "o" if len(steps) < 25 else ""
            axes.plot(steps, np.array(values) * factor, color=run.color, marker=marker, clip_on=False)
        end = max(max(run.steps, run.recipe.training.steps) for run in runs)
        axes.set(xlabel="step", xlim=(0, end), ylim=(0, 1.05 * max(axes.get_ylim()[1], 1e-6)))
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.grid(alpha=0.15, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        buffer = io.StringIO()
        # Without a date and names of software, equal runs give equal pages.
        none = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=none)
    svg = buffer.getvalue()
    return svg[svg.index("<svg") :].replace(_INK, "currentColor").replace("'DejaVu Sans'", "system-ui")


def _thinned(*series: Sequence[float]) -> list[list[float]]:
    """At most _CURVE_POINTS points of each; where there are more, each is the mean of its neighbours."""
    parts = min(len(series[0]), _CURVE_POINTS)
    return [[float(part.mean()) for part in np.array_split(values, parts)] if parts else [] for values in series]
