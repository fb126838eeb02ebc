"""Starting from another run's weights: the encoder, and the heads whose names and classes match."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from multidomain_cct.data.domain import Domain
from multidomain_cct.data.specification import read_domain
from multidomain_cct.errors import UserError
from multidomain_cct.files.printable import first_few
from multidomain_cct.model.network import Segmenter
from multidomain_cct.training.checkpoints.checkpoint import choose_checkpoint, model_tensors


def load_initial_weights(run: Path, model: Segmenter, domains: Mapping[str, Domain]) -> list[str]:
    """Start `model` from the last checkpoint of a run. Returns a line for everything that was left out.

    Raises UserError when the encoders differ.
    """
    checkpoint = choose_checkpoint(run, "last")
    tensors = model_tensors(checkpoint)
    if taught := {name.removeprefix("teacher."): t for name, t in tensors.items() if name.startswith("teacher.")}:
        # The teacher is what such a run was scored with.
        tensors = taught
    state, old_domains, matching = model.state_dict(), _old_domains(run), matching_heads(run, domains)
    left_out = [f"head {name}: not in this run" for name in old_domains if name not in domains]
    left_out += [f"head {name}: its classes differ" for name in old_domains if name in domains and name not in matching]
    taken = {}
    for name, tensor in tensors.items():
        # What methods keep besides encoder and heads belongs to their run.
        part, _, rest = name.partition(".")
        if part != "encoder" and not (part == "heads" and rest.split(".")[0] in matching):
            continue
        if name in state and state[name].shape == tensor.shape:
            taken[name] = tensor
        else:
            left_out.append(f"{name}: {'another shape' if name in state else 'not in this model'}")
    new_norms = tuple(f".norms.{domain}." for domain in domains)
    missing = [
        name
        for name in state
        if name.startswith("encoder.") and name not in taken and not any(norm in name for norm in new_norms)
    ]
    if missing:
        raise UserError(f"init_from: the encoder of {run} differs in {first_few(missing)}. Use its encoder settings.")
    model.load_state_dict(state | taken)
    return left_out


def matching_heads(run: Path, domains: Mapping[str, Domain]) -> list[str]:
    """The domains whose head the run has too, with the same classes. Raises UserError when the folder is not a run."""
    old = _old_domains(run)
    return [
        name
        for name, domain in domains.items()
        if not domain.labels_of and name in old and old[name].class_fingerprint == domain.class_fingerprint
    ]


def _old_domains(run: Path) -> dict[str, Domain]:
    """The domains of a run that do not borrow a head."""
    if not (run / "recipe.yaml").is_file():
        raise UserError(f"init_from: {run}: this is not a run's folder (it has no recipe.yaml).")
    domains = {path.stem: read_domain(path) for path in sorted((run / "domains").glob("*.yaml"))}
    return {name: domain for name, domain in domains.items() if not domain.labels_of}
