"""How the weight of a loss rises with the progress of the run.

No state: progress is the step over the number of steps.
"""

from __future__ import annotations

import math

RAMPS = ("exp", "linear", "cosine", "log", "none")


def ramp_at(kind: str, fraction: float, progress: float) -> float:
    """Factor on a weight, 0 to 1, at `progress` (0 to 1) of a run; the ramp ends at `fraction` of it.

    With t the share of the ramp that is done: `exp` is exp(-5 (1 - t)^2) (Laine and Aila 2017), `linear` t, `cosine`
    (1 - cos(pi t)) / 2, `log` 1 - exp(-5 t) (the schedule of the annealed bootstrapped cross-entropy in the authors'
    code).
    """
    if kind == "none" or progress >= fraction:
        return 1.0
    t = progress / fraction
    if kind == "exp":
        return math.exp(-5 * (1 - t) ** 2)
    if kind == "log":
        return 1 - math.exp(-5 * t)
    return t if kind == "linear" else (1 - math.cos(math.pi * t)) / 2
