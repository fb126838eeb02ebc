"""How unlabelled images are used, one file per method.

All methods share encoder, heads, data and loop; only the losses differ. A new method is a subclass of Segmenter in a
file of its own and a line in METHODS; a dataclass of settings becomes a field of Recipe.
"""

from __future__ import annotations

from multidomain_cct.methods.cct import CCT
from multidomain_cct.methods.mean_teacher import MeanTeacher
from multidomain_cct.methods.unimatch import UniMatch
from multidomain_cct.methods.usss import Usss
from multidomain_cct.model.network import Segmenter

METHODS: dict[str, type[Segmenter]] = {
    "cct": CCT,
    "supervised": Segmenter,
    "mean_teacher": MeanTeacher,
    "unimatch": UniMatch,
    "usss": Usss,
}
"""The values of `method` in a recipe."""
