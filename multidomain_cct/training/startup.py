"""What a run shows before its first step."""

from __future__ import annotations

from rich.box import SIMPLE
from rich.markup import escape
from rich.table import Table

from multidomain_cct.data.batches.streams import DomainStreams
from multidomain_cct.files.printable import first_few, printable
from multidomain_cct.training.run import Run
from multidomain_cct.training.runlog import RunLog, device_name

_COLUMNS = ("domain", "labelled", "unlabelled", "val", "classes", "without pixels", "batch", "crop", "epochs")


def show_startup(run: Run, log: RunLog) -> None:
    """Print what is trained on what: a row for each domain, what was found out, and model, machine and length."""
    table = Table(box=SIMPLE, show_edge=False, padding=(0, 1, 0, 0))
    for name in _COLUMNS:
        table.add_column(name, justify="left" if name in ("domain", "without pixels") else "right", overflow="fold")
    for stream in run.streams:
        table.add_row(*(escape(printable(cell)) for cell in _row(run, stream)))
    log.show(table)
    for finding in run.findings:
        log.notice(f"{finding.severity}: {finding.message}", "yellow" if finding.severity == "warning" else "")
    recipe, encoder, training = run.recipe, run.recipe.encoder, run.recipe.training
    parameters = sum(parameter.numel() for parameter in run.bare_model.parameters() if parameter.requires_grad)
    processes = run.accelerator.num_processes
    log.notice(
        f"method {recipe.method}, encoder {encoder.name} (weights {encoder.weights}, stride {encoder.stride}, context "
        f"{encoder.context}), {parameters / 1e6:.1f} million parameters\n"
        f"{device_name(run.accelerator.device)}, {processes} process{'es' if processes > 1 else ''}, precision "
        f"{_precision(run)}, {training.steps} steps"
    )


def _precision(run: Run) -> str:
    """The mixed precision and, where the device has it, whether TF32 is used."""
    precision = run.accelerator.mixed_precision
    on = "on" if run.recipe.training.tf32 else "off"
    return f"{precision}, TF32 {on}" if run.accelerator.device.type == "cuda" else precision


def _row(run: Run, stream: DomainStreams) -> list[str]:
    """The cells of a domain. `epochs`: how often the run sees each unlabelled image, or labelled if there are none."""
    name, steps = stream.domain.name, run.recipe.training.steps
    counts = stream.labelled_classes if stream.labelled else None
    absent = (
        []
        if counts is None
        else [label.name for label, pixels in zip(stream.domain.classes, counts.pixels, strict=True) if not pixels]
    )
    turns = steps / len(run.data.streams) if run.recipe.data.schedule == "alternate" else steps
    batches = {subset: stream.batch(subset) for subset in ("labelled", "unlabelled") if stream.samples(subset)}
    seen = list(batches)[-1:]
    return [
        name,
        str(len(stream.labelled)),
        str(len(stream.unlabelled)),
        str(len(run.scored[name])) if name in run.scored else "none",
        str(stream.domain.num_classes),
        first_few(absent) or "none",
        "+".join(map(str, batches.values())),
        "x".join(map(str, stream.crop)),
        *(f"{turns * batches[subset] / len(stream.samples(subset)):.3g}" for subset in seen),
    ]
