"""A run as one file for other software, ONNX or a program of torch.export, compared with the run first."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from multidomain_cct import __version__
from multidomain_cct.data.domain import Domain
from multidomain_cct.data.images import load_image, resized
from multidomain_cct.data.shards.reader import Shards
from multidomain_cct.errors import UserError, require_choice, require_number
from multidomain_cct.evaluation.inference import InferenceSettings
from multidomain_cct.files.durable import replacing
from multidomain_cct.results.program import KINDS, Program
from multidomain_cct.results.trained_run import TrainedRun

ENDINGS = (".onnx", ".pt2")
OPSET = 18
PACKAGES = ("onnx", "onnxruntime", "onnxscript")
IMAGES = 8
"""Of each domain, with which a file is compared with its run."""
LEAST_AGREEMENT, MOST_DIFFERENCE = 0.999, 1e-3
ENLARGED = 1.75
"""Photographs of any size are also compared so much larger, which the network sees shrunk."""

Model = Callable[[np.ndarray], dict[str, np.ndarray]]
"""(B, H, W, 3) uint8 -> outputs by name."""


@dataclass(frozen=True)
class Parity:
    """How well a file agrees with its run on one domain."""

    domain: str
    split: str
    images: int
    """Predicted by both, those that were enlarged counted."""
    agreement: float
    """Share of the pixels with the same class, 0 to 1."""
    difference: float
    """Largest difference of a probability."""

    @property
    def holds(self) -> bool:
        return self.agreement >= LEAST_AGREEMENT and self.difference <= MOST_DIFFERENCE

    @property
    def described(self) -> str:
        return (
            f"{self.domain}: {self.images} images of {self.split}, {100 * self.agreement:.3f} % of the pixels of one "
            f"class, probabilities within {self.difference:.1e}"
        )


@dataclass(frozen=True)
class Exported:
    """A file that was written."""

    path: Path
    outputs: tuple[str, ...]
    parities: tuple[Parity, ...]
    seconds: float
    """Median time of one image on the CPU."""
    image_size: tuple[int, int]
    """(width, height) of that image."""

    @property
    def mib(self) -> float:
        return self.path.stat().st_size / 2**20


def export(
    run: TrainedRun,
    domain: str | None,
    out: Path,
    *,
    size: tuple[int, int] | None = None,
    opset: int = OPSET,
    shards: Path | None = None,
) -> Exported:
    """Write the run, on the CPU, as ONNX or as a program of torch.export, as the ending of `out` says.

    `domain` None: the run's only one; `all`: one encoder with all heads. `size` (width, height) is that of all
    photographs; None: any. The file takes (B, H, W, 3) uint8 RGB photographs of equal size. Raises UserError, and
    writes nothing, for a domain without a head or without images to compare with, an output that cannot be written, a
    missing package, operations that the format does not have, and a file that does not agree with the run.
    """
    _require_possible(out, size, opset)
    domains = list(run.domains.values()) if domain == "all" else [run.head(domain)]
    samples = {each.name: _photographs(run, each, size, shards) for each in domains}
    program = Program(run, domains, size).eval()
    example = next(iter(samples.values()))[1][0]
    described = metadata(run, domains, size)
    content, model = _converted(program, example, out.suffix, opset, described)
    parities = []
    for each in domains:
        split, photographs = samples[each.name]
        parities.append(_parity(run, each, model, program.suffix(each.name), photographs, split))
    failed = [each for each in parities if not each.holds]
    if failed:
        raise UserError(
            f"{out} was not written, since it does not do what the run does: {failed[0].described}. Export for one "
            "size of photographs with --size, or to the other format."
        )
    with replacing(out) as temporary:
        temporary.write_bytes(content)
    seconds = _latency(model, np.asarray(example)[None])
    return Exported(out, tuple(program.outputs), tuple(parities), seconds, example.size)


def metadata(run: TrainedRun, domains: Sequence[Domain], size: tuple[int, int] | None) -> dict[str, Any]:
    """What a file says of itself, as plain values: class names and colours by train id, version, origin, licences."""
    recipe = run.recipe
    start = "random weights" if recipe.encoder.weights == "none" else f"weights `{Path(recipe.encoder.weights).name}`"
    trained = ", ".join(f"{each.name} ({each.licence or 'no licence named'})" for each in domains)
    return {
        "version": __version__,
        "run": recipe.name,
        "step": run.state.step,
        "weights": run.weights,
        "input": f"RGB, {'of any size' if size is None else f'{size[0]}x{size[1]}'}, upright",
        "domains": {
            each.name: {
                "title": each.title,
                "classes": [label.name for label in each.classes],
                "colours": [list(label.color) for label in each.classes],
            }
            for each in domains
        },
        "licence": f"Trained from {start} of {recipe.encoder.name}, on {trained}. The licences of these weights and of "
        "the images decide what the file may be used for.",
    }


def _require_possible(out: Path, size: tuple[int, int] | None, opset: int) -> None:
    """Raises UserError for what can be seen before anything is computed."""
    require_choice("--out's ending", out.suffix, ENDINGS)
    if out.is_dir() or not out.parent.is_dir() or not os.access(out.parent, os.W_OK):
        raise UserError(f"--out {out} cannot be written. Name a file in a folder that exists and may be written.")
    for side in size or ():
        require_number("--size", side, at_least=1)
    if out.suffix == ".onnx":
        missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
        if missing:
            raise UserError(
                f"export to ONNX needs the package {missing[0]}. Install it: pip install 'multidomain-cct[export]'"
            )
        import onnx

        require_number("--opset", opset, at_least=OPSET, at_most=onnx.defs.onnx_opset_version())


def _photographs(
    run: TrainedRun, domain: Domain, size: tuple[int, int] | None, shards: Path | None
) -> tuple[str, list[Image.Image]]:
    """The split from which they come, and the photographs that the file and the run are compared on."""
    recipe = run.recipe.domains[domain.name]
    split = recipe.val_split or recipe.train_split
    opened = Shards.open((shards or Path(run.recipe.data.shards)) / domain.name, split)
    records = [opened.read(number, with_mask=False) for number in range(min(IMAGES, len(opened)))]
    images = [load_image(record.image, record.where) for record in records]
    if size is not None:
        return split, [resized(image, size) for image in images]
    larger = [(round(ENLARGED * image.width), round(ENLARGED * image.height)) for image in images]
    return split, images + [resized(image, box) for image, box in zip(images, larger, strict=True)]


def _converted(
    program: Program, example: Image.Image, ending: str, opset: int, described: dict[str, Any]
) -> tuple[bytes, Model]:
    """The bytes of a file, and the model that is read from them again."""
    # Two photographs: torch takes an axis of length 1 as one that always has it.
    images = torch.from_numpy(np.array(example)).expand(2, -1, -1, -1).contiguous()
    names = ("batch", "height", "width")
    axes = {axis: torch.export.Dim(name) for axis, name in enumerate(names) if axis == 0 or program.takes_any_size}
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            exported = torch.export.export(program, (images,), dynamic_shapes=(axes,))
            if ending == ".pt2":
                return _as_program(exported, described)
            return _as_onnx(exported, program.outputs, opset, described)
    except Exception as error:  # whatever torch and ONNX raise for an operation that they cannot express
        first = (str(error).strip().splitlines() or [""])[0][:200]
        others = "--size 640,480 (photographs of one size), " if program.takes_any_size else ""
        raise UserError(
            f"the network cannot be written as {ending} ({type(error).__name__}: {first}). Try {others}another --opset "
            "or the other format; --traceback shows where it fails."
        ) from error


def _as_program(exported: torch.export.ExportedProgram, described: dict[str, Any]) -> tuple[bytes, Model]:
    file = io.BytesIO()
    torch.export.save(exported, file, extra_files={"metadata.json": json.dumps(described)})
    module = torch.export.load(io.BytesIO(file.getvalue())).module()

    def model(images: np.ndarray) -> dict[str, np.ndarray]:
        with torch.no_grad():
            return {name: output.numpy() for name, output in module(torch.tensor(images)).items()}

    return file.getvalue(), model


def _as_onnx(
    exported: torch.export.ExportedProgram, outputs: Sequence[str], opset: int, described: dict[str, Any]
) -> tuple[bytes, Model]:
    import onnxruntime

    converted = torch.onnx.export(
        exported, input_names=["image"], output_names=list(outputs), opset_version=opset, dynamo=True, verbose=False
    )
    assert converted is not None
    proto = converted.model_proto
    for key, value in described.items():
        proto.metadata_props.add(key=key, value=value if isinstance(value, str) else json.dumps(value))
    content: bytes = proto.SerializeToString()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])

    def model(images: np.ndarray) -> dict[str, np.ndarray]:
        return dict(zip(outputs, session.run(list(outputs), {"image": images}), strict=True))

    return content, model


def _parity(
    run: TrainedRun, domain: Domain, model: Model, suffix: str, photographs: Sequence[Image.Image], split: str
) -> Parity:
    pixels, same, difference = 0, 0, 0.0
    for photograph in photographs:
        wanted = run.predict(photograph, domain.name, probabilities=True, settings=InferenceSettings())
        found = model(np.array(photograph)[None])
        ids, probabilities = (found[f"{kind}{suffix}"][0] for kind in KINDS)
        assert wanted.probabilities is not None
        same += int((ids == wanted.ids).sum())
        pixels += ids.size
        difference = max(difference, float(np.abs(probabilities - wanted.probabilities).max()))
    return Parity(domain.name, split, len(photographs), same / pixels, difference)


def _latency(model: Model, images: np.ndarray, times: int = 5) -> float:
    """Median seconds of one call."""
    model(images)
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        model(images)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)
