"""Draws docs/images/demo.png, the README's picture, from the two runs of `make demo`.

.venv/bin/python docs/picture.py
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from multidomain_cct.data.batches.views import decode
from multidomain_cct.data.shards.reader import Shards
from multidomain_cct.results.pictures import colored
from multidomain_cct.results.trained_run import TrainedRun

RUNS = ("runs/demo_supervised", "runs/demo")
TITLES = ("image", "1 label", "1 label + 239 unlabelled images", "truth")
ROWS = {"toy_street": (7, 31), "toy_room": (3, 22)}
"""Val images by domain and number; fixed, so that the picture cannot be chosen."""
SCALE, GAP, HEADING = 2, 6, 26


def main() -> None:
    runs = [TrainedRun.load(Path(run), device=torch.device("cpu")) for run in RUNS]
    rows = []
    for name, numbers in ROWS.items():
        domain = runs[0].domains[name]
        shards = Shards.open(Path(runs[0].recipe.data.shards) / name, "val")
        for number in numbers:
            image, mask = decode(shards.read(number), domain)
            assert mask is not None
            answers = [run.predict(image, name).overlay(0.75) for run in runs]
            rows.append([image, *answers, colored(np.asarray(mask), domain)])
    width, height = rows[0][0].width * SCALE, rows[0][0].height * SCALE
    sheet = Image.new("RGB", (len(TITLES) * (width + GAP) - GAP, HEADING + len(rows) * (height + GAP) - GAP), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=14)
    for column, title in enumerate(TITLES):
        pen.text((column * (width + GAP) + 2, 4), title, fill=(40, 40, 40), font=font)
        for row, pictures in enumerate(rows):
            picture = pictures[column].resize(
                (width, height), Image.Resampling.NEAREST if column == 3 else Image.Resampling.LANCZOS
            )
            sheet.paste(picture, (column * (width + GAP), HEADING + row * (height + GAP)))
    folder = Path(__file__).with_name("images")
    folder.mkdir(exist_ok=True)
    sheet.quantize(256, dither=Image.Dither.NONE).save(folder / "demo.png", optimize=True)


if __name__ == "__main__":
    main()
