"""Starting from another run's weights: the encoder, and the heads whose names and classes match."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from multidomain_cct.data.domain import Domain
from multidomain_cct.data.specification import read_domain
from multidomain_cct.errors import UserError
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
    own = model.state_dict()
    old_domains, matching = _old_domains(run), set(matching_heads(run, domains))
    left_out = [f"head {name}: not in this run" for name in old_domains if name not in domains]
    left_out += [f"head {name}: its classes differ" for name in old_domains if name in domains and name not in matching]
    taken = {}
    for name, tensor in tensors.items():
        # What methods keep besides encoder and heads belongs to their run.
        if not name.startswith(("encoder.", "heads.")):
            continue
        in_head = name.split(".")[1] if name.startswith("heads.") else None
        if in_head is not None and in_head not in matching:
            continue
        if name in own and own[name].shape == tensor.shape:
            taken[name] = tensor
        else:
            left_out.append(f"{name}: {'another shape' if name in own else 'not in this model'}")
    missing = [
        name
        for name in own
        if name.startswith("encoder.")
        and name not in taken
        and not any(f".norms.{domain}." in name for domain in domains)
    ]
    if missing:
        raise UserError(
            f"init_from: the encoder of {run} is another one ({missing[0]} does not fit, and {len(missing) - 1} "
            "more). Use the same encoder settings."
        )
    model.load_state_dict(own | taken)
    return left_out


def matching_heads(run: Path, domains: Mapping[str, Domain]) -> list[str]:
    """The domains with a head of their own that the run has too, with the same classes.

    Raises UserError when the folder is not a run.
    """
    old = _old_domains(run)
    own = {name: domain for name, domain in domains.items() if not domain.labels_of}
    return [
        name for name, domain in own.items() if name in old and old[name].class_fingerprint == domain.class_fingerprint
    ]


def _old_domains(run: Path) -> dict[str, Domain]:
    """The domains of a run that have a head of their own there."""
    if not (run / "recipe.yaml").is_file():
        raise UserError(f"init_from: {run}: this is not a run's folder (it has no recipe.yaml).")
    found = {path.stem: read_domain(path) for path in sorted((run / "domains").glob("*.yaml"))}
    return {name: domain for name, domain in found.items() if not domain.labels_of}
