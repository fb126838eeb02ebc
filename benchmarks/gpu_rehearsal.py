"""A miniature of an experiment on furniture, on drawn images: python benchmarks/gpu_rehearsal.py EXPERIMENT OUT

Writes OUT/<experiment> with the same rows, and the shards that it trains on.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import yaml
from PIL import Image

from multidomain_cct.data.packing.pack import pack
from multidomain_cct.data.specification import read_domain

SMALL = {
    "encoder": {"name": "test_resnet", "weights": "none", "width": 32},
    "data": {"crop": [64, 64], "labelled_batch": 2, "unlabelled_batch": 2, "workers": 0},
    "training": {"steps": 2, "log_every": 1, "evaluate_every": 2, "save_every": 2},
    "evaluation": {"batch": 2},
}


def main() -> None:
    experiment, out = Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve()
    domain = read_domain(experiment.parents[2] / "domains" / "furniture.yaml")
    rng = np.random.default_rng(0)
    for split, count in (("train", 16), ("val", 4)):
        for number in range(count):
            ids = np.zeros((64, 64), np.uint8)
            ids[16:48, 8:56] = 1 + number % (domain.num_classes - 1)
            pixels = np.clip(domain.palette[ids] + rng.normal(0, 20, (64, 64, 3)), 0, 255).astype(np.uint8)
            for folder, name, array in (("images", "jpg", pixels), ("masks", "png", ids)):
                path = out / "raw" / folder / split / f"{number:03d}.{name}"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(array).save(path)
        pack(domain, out / "raw", split, out / "shards")
    plain = yaml.safe_load(experiment.read_text(encoding="utf-8"))
    small = [f"{section}.{key}={value}" for section, values in SMALL.items() for key, value in values.items()]
    plain["recipe"] = str((experiment.parent / plain["recipe"]).resolve())
    plain["common"] += [*small, f"data.shards={out / 'shards'}"]
    plain["runs"] = str(out / "runs")
    (out / experiment.name).write_text(yaml.safe_dump(plain, sort_keys=False), encoding="utf-8")


if __name__ == "__main__":
    main()
