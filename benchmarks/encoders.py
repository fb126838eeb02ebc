"""Which encoders of timm train and predict: the smallest model of every family, with random weights, in recipes.

    python benchmarks/encoders.py [--only NAME ...] [--seconds 300] [--memory 8] [--out docs/encoders.md]

A family is a module of timm; `--only` takes families and models, whose rows replace those that the page has. With each
context that reads other levels (`none` reads what `psp` reads), the strides 8, 16 and 32 and whatever the answer to a
stride that does not fit advises are tried, until one fits. With it a run of the whole program takes two steps of CCT
and scores images of two odd sizes. What is refused is refused in one line. Any other exception, advice that does not
fit, and a process that dies are faults, and the exit code is 1. Each model has a process of its own, with a limit on
time and memory.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import platform
import re
import resource
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import date
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import yaml
from photographs import draw

from multidomain_cct import UserError, load_recipe, train
from multidomain_cct.__main__ import main as multidomain_cct
from multidomain_cct.model.backbone import BackbonePlan, plan_backbone
from multidomain_cct.training.processes.failures import RunFailed

CONTEXTS, STRIDES, CROP = ("fpn", "psp"), (8, 16, 32), (96, 64)
ASKED_FOR = ("botnet26t_256", "halonet26t", "lambda_resnet26t", "coatnet_nano_rw_224")
"""Tried besides the smallest models, which are of other kinds."""
SIZES = {"train": (128, 96), "val_wide": (291, 97), "val_high": (61, 75)}
"""(width, height) of the images by folder."""
COLORS = ((80, 180, 70), (200, 180, 140), (220, 60, 60))
ADVICE = re.compile(r" Use(?: encoder\.context=(\w+) encoder\.stride=(\d+))?(?: data\.crop=\[(\d+), (\d+)\])?\.$")
PAGE = """# Encoders

`encoder.name` takes any model of timm that gives feature maps. This page lists what the smallest model of each family \
gives, tried with random weights: {summary}.

`fpn` and `psp` give the finest stride of at least 8 that works with that `encoder.context`: trained with CCT for two \
steps, and scored on images of two odd sizes. Of models with several levels, coarser strides up to 32 fit too, and, \
with `fpn`, 4 where there is such a level; `none` takes the strides of `psp`. Images are padded to the multiples \
listed; a model that takes one size takes that of the crop (for all domains), and predicts other images by overlapping \
windows. The pretrained weights of some of these fit the crop that they were trained at only. Any other setting or \
model is answered before training, in one line, with settings that fit.

{date}, {machine}, timm {timm}, torch {torch}; `python benchmarks/encoders.py --out docs/encoders.md`.

| family | model | parameters | `fpn` | `psp` | sides of images | crop | why not |
|---|---|---|---|---|---|---|---|
{rows}
"""

Setting = tuple[str, int, tuple[int, ...]]
"""Context, stride and crop (width, height)."""


@dataclass
class Row:
    """What is known of a model."""

    family: str
    model: str
    parameters: int = 0
    works: dict[Setting, BackbonePlan] = field(default_factory=dict)
    reason: str = ""
    """Why the first setting that was tried does not fit, or why no other could be tried."""
    fault: str = ""
    """A traceback, or what else should not be."""

    def line(self) -> str:
        """Of the page's table."""
        units = sorted({plan.unit for plan in self.works.values() if plan.size is None})
        sides = [f"multiples of {unit}" for unit in units] + ["the crop's"] * (
            len(units) < len(self.works) and not units
        )
        crops = dict.fromkeys("x".join(map(str, crop)) for _, _, crop in self.works)
        strides = [", ".join(str(each[1]) for each in self.works if each[0] == context) for context in CONTEXTS]
        why = f"fault: {self.fault.strip().splitlines()[-1][:200]}" if self.fault else self.reason
        size = f"{self.parameters / 1e6:.1f} M" if self.parameters else ""
        cells = [self.family, f"`{self.model}`", size, *strides, ", ".join(sides), ", ".join(crops), why]
        return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def count_parameters(model: str) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in timm.create_model(model).parameters())


def try_context(context: str, row: Row) -> None:
    """Train and score with the first setting that fits; what is advised has to fit."""
    todo: list[Setting] = [(context, stride, CROP) for stride in STRIDES]
    advised: dict[Setting, str] = {}
    for setting in todo:
        _, stride, crop = setting
        try:
            plan = plan_backbone(row.model, *setting[:2], (crop[::-1],))
        except UserError as error:
            row.reason = str(error).removeprefix(f"encoder.name is {row.model!r}: ")
            if setting in advised:
                row.fault = f"advice that does not fit: {advised[setting]}"
            found = ADVICE.search(str(error))
            if found is not None and found[1] in (None, context):
                better = (context, int(found[2] or stride), (int(found[3]), int(found[4])) if found[3] else crop)
                advised[better] = str(error)
                todo += [better] if better not in todo else []
            continue
        train_and_score(row.model, setting)
        row.works[setting] = plan
        return


def work(folder: Path, row: Row, models: list[str], limit: int, pipe: Connection) -> None:
    """Send the row each time that more of it is known; in a process of its own."""
    os.chdir(folder)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    with Path("log").open("w") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        try:
            row.model = min(models, key=count_parameters) if len(models) > 1 else models[0]
            row.parameters = count_parameters(row.model)
            for context in CONTEXTS:
                pipe.send(row)
                try_context(context, row)
                row.reason = "" if row.works else row.reason
        except (UserError, RunFailed) as error:
            row.reason = str(error)
        except Exception:
            row.fault = traceback.format_exc()
        pipe.send(row)


def train_and_score(model: str, setting: Setting) -> None:
    context, stride, (width, height) = setting
    changes = {"name": model, "context": context, "stride": stride}
    overrides = [f"encoder.{key}={value}" for key, value in changes.items()]
    train(load_recipe("recipe.yaml", [*overrides, f"data.crop=[{width},{height}]"]))
    shutil.rmtree("runs")


def prepare() -> None:
    """Packed images and a recipe, in the working directory."""
    for name, size in SIZES.items():
        count = 1 if name.startswith("val") else 8
        draw(Path("raw", name), count, size, colors=np.array(COLORS), regions=(5, 5), grain=20, ending="jpg")
    classes = [{"name": f"c{i}", "color": list(color), "thing": i == 2} for i, color in enumerate(COLORS)]
    splits = {name: {"images": f"{name}*/images/*", "masks": f"{name}*/masks/*"} for name in ("train", "val")}
    domain = {"name": "drawn", "layout": "folder", "splits": splits, "classes": classes}
    Path("domains").mkdir()
    Path("domains/drawn.yaml").write_text(yaml.safe_dump(domain))
    kinds = ("feature_noise", "feature_drop", "dropout", "object_mask", "context_mask", "guided_cutout")
    recipe: dict[str, Any] = {"domains": {"drawn": {"labelled": 4}}, "method": "cct", "decoder": "bilinear"}
    recipe["data"] = {"labelled_batch": 2, "unlabelled_batch": 2, "workers": 0}
    recipe["encoder"] = {"weights": "none", "width": 32}
    recipe["perturbations"] = {kind: {"count": 1} for kind in (*kinds, "adversarial_noise")}
    recipe["training"] = {"steps": 2, "evaluate_every": 2, "save_every": 2, "log_every": 1}
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe))
    with Path("log").open("w") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        assert multidomain_cct(["pack", "drawn", "--raw", "raw", "--workers", "1"]) == 0


def survey(chosen: list[tuple[str, list[str]]], template: Path, *, seconds: float, memory: float) -> Iterator[Row]:
    """A row for each family, by a process for each."""
    fork = multiprocessing.get_context("fork")
    for family, models in chosen:
        with tempfile.TemporaryDirectory() as folder:
            shutil.copytree(template, folder, dirs_exist_ok=True)
            pipe, sending = fork.Pipe(duplex=False)
            row = Row(family, models[0])
            process = fork.Process(target=work, args=(Path(folder), row, models, int(memory * 2**30), sending))
            process.start()
            sending.close()
            end = time.monotonic() + seconds
            try:
                while pipe.poll(max(0.0, end - time.monotonic())):
                    row = pipe.recv()
                row.reason = f"no answer within {seconds:.0f} s"
                process.kill()
            except EOFError:
                process.join()
                if process.exitcode:
                    row.fault = f"its process ended with exit code {process.exitcode}"
            process.join()
            yield row


def page(lines: list[str]) -> str:
    """The page with these lines of its table."""
    faults = sum("| fault: " in line for line in lines)
    works = sum(bool(line.split(" | ")[-2]) and "| fault: " not in line for line in lines)
    unknown = sum(not line.split(" | ")[-2] and "| no answer within " in line for line in lines)
    families = len({line.split(" | ")[0] for line in lines})
    summary = f"of {len(lines)} models of {families} families, {works} train and predict, "
    summary += f"{len(lines) - works - faults - unknown} are refused in one line, {unknown} took too long to be tried, "
    return PAGE.format(
        summary=f"{summary}and {faults} fail otherwise",
        rows="\n".join(sorted(lines)),
        date=date.today(),
        machine=f"{platform.machine()}, {os.cpu_count()} cores",
        timm=timm.__version__,
        torch=torch.__version__,
    )


def choose(only: list[str]) -> list[tuple[str, list[str]]]:
    """Families, and single models, in the order of the page. Raises UserError for an unknown name."""
    known = {module: models for module in timm.list_modules() if (models := timm.list_models(module=module))}
    singles = [name for name in only if name not in known] if only else ASKED_FOR
    owner = {model: family for family, models in known.items() for model in models}
    unknown = [name for name in singles if name not in owner]
    if unknown:
        raise UserError(f"--only is {unknown[0]!r}, which is no family and no model of timm.")
    real = {family: [name for name in models if not name.startswith("test_")] for family, models in known.items()}
    rows = [(family, models) for family, models in real.items() if models and (not only or family in only)]
    return [*rows, *((owner[name], [name]) for name in singles)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="families or models; left out: all")
    parser.add_argument("--seconds", type=float, default=300, help="limit for each model")
    parser.add_argument("--memory", type=float, default=8, help="limit for each model, in GiB")
    parser.add_argument("--out", type=Path, help="file of the page; left out: printed")
    options = parser.parse_args()
    try:
        chosen = choose(options.only)
    except UserError as error:
        parser.error(str(error))
    torch.set_num_threads(1)
    kept = options.out.read_text(encoding="utf-8") if options.only and options.out and options.out.exists() else ""
    lines = {line.split(" | ")[1]: line for line in kept.splitlines() if re.match(r"\| \w+ \| `", line)}
    failed = False
    with tempfile.TemporaryDirectory() as template:
        with contextlib.chdir(template):
            prepare()
        for row in survey(chosen, Path(template), seconds=options.seconds, memory=options.memory):
            lines[f"`{row.model}`"] = row.line()
            failed |= bool(row.fault)
            print(row.line(), row.fault, sep="\n" if row.fault else "", file=sys.stderr, flush=True)
            if options.out:
                options.out.write_text(page(list(lines.values())), encoding="utf-8")
    if not options.out:
        print(page(list(lines.values())))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
