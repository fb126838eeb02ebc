"""An optimiser's state as named tensors, and back: complete and of the right shapes, or an error."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from multidomain_cct.errors import UserError
from multidomain_cct.files.printable import first_few

_KEYS: dict[type[torch.optim.Optimizer], tuple[str, ...]] = {
    torch.optim.SGD: ("momentum_buffer",),
    torch.optim.AdamW: ("step", "exp_avg", "exp_avg_sq"),
}
"""What each optimiser keeps of a parameter. `step` is one number; the others have the parameter's shape."""


def optimiser_tensors(model: nn.Module, optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """`<parameter>/<key>` -> tensor.

    A parameter that has had no gradient yet has none: the heads of a domain whose turn has not come.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        f"{names[id(parameter)]}/{key}": value.detach().cpu().contiguous()
        for parameter, values in optimiser.state.items()
        for key, value in values.items()
        # Without momentum, SGD keeps a None.
        if value is not None
    }


def restore_optimiser(
    model: nn.Module, optimiser: torch.optim.Optimizer, tensors: Mapping[str, Tensor], entries: list[str], where: str
) -> None:
    """Put the optimiser into the saved state. `entries` are the names that were saved.

    Raises UserError that names what is missing, left over or of another shape.
    """
    keys = next(keys for kind, keys in _KEYS.items() if isinstance(optimiser, kind))
    trained = {id(parameter) for group in optimiser.param_groups for parameter in group["params"]}
    known = {
        f"{name}/{key}": (parameter, key)
        for name, parameter in model.named_parameters()
        if id(parameter) in trained
        for key in keys
    }
    trouble = [f"{entry} is missing" for entry in entries if entry not in tensors]
    trouble += [f"{entry} was not saved with it" for entry in tensors if entry not in entries]
    state: dict[nn.Parameter, dict[str, Tensor]] = {}
    for entry, value in tensors.items():
        if entry not in known:
            trouble.append(f"{entry} belongs to nothing that this model trains")
            continue
        parameter, key = known[entry]
        shape = torch.Size() if key == "step" else parameter.shape
        if value.shape != shape or not value.is_floating_point():
            trouble.append(f"{entry} is {value.dtype} {list(value.shape)}, not floating point {list(shape)}")
        # Counters stay on the CPU, where optimisers keep them unless they are fused; moments live with their parameter.
        stays = key == "step" and not optimiser.defaults["fused"]
        state.setdefault(parameter, {})[key] = value if stays else value.to(parameter.device)
    incomplete = (entry for entry, (parameter, _) in known.items() if parameter in state and entry not in tensors)
    trouble += [f"{entry} is missing" for entry in incomplete if entry not in entries]
    if trouble:
        raise UserError(
            f"{where}: the optimiser's {first_few(trouble)}. Choose another checkpoint, or start another run with "
            "name=OTHER."
        )
    optimiser.state.clear()
    for parameter, values in state.items():
        optimiser.state[parameter] = values
