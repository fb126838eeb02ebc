"""How unlabelled images are used, one file per method.

All methods share encoder, heads, data and loop; only the losses differ. A new method is a subclass of Supervised in a
file of its own and a line in METHODS; a dataclass of settings becomes a field of Recipe.
"""

from __future__ import annotations

from multidomain_cct.methods.cct import CCT
from multidomain_cct.methods.cct_strong import CCTStrong
from multidomain_cct.methods.mean_teacher import MeanTeacher
from multidomain_cct.methods.supervised import Supervised
from multidomain_cct.methods.unimatch import UniMatch
from multidomain_cct.methods.usss import Usss

METHODS: dict[str, type[Supervised]] = {
    "cct": CCT,
    "cct_strong": CCTStrong,
    "supervised": Supervised,
    "mean_teacher": MeanTeacher,
    "unimatch": UniMatch,
    "usss": Usss,
}
"""The values of `method` in a recipe."""
