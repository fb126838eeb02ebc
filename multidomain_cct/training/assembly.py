"""A recipe's model: the method's network with a head for every label space."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from multidomain_cct.data.domain import Domain
from multidomain_cct.methods.cct import CCT
from multidomain_cct.methods.mean_teacher import MeanTeacher
from multidomain_cct.methods.unimatch import UniMatch
from multidomain_cct.methods.usss import Usss
from multidomain_cct.model.network import Segmenter, Task
from multidomain_cct.model.perturbations import Perturbation
from multidomain_cct.training.recipe import Recipe


def build_model(recipe: Recipe, domains: Mapping[str, Domain], *, unlabelled: Mapping[str, bool] | None = None, pretrained: bool = True) -> Segmenter:
    """The recipe's network. `unlabelled` says which domains have unlabelled images; heads that see none, and all when it is None, get no auxiliary decoders.

    Raises ValueError for domains, encoder or decoder that do not fit each other.
    """
    require_lenders(domains)
    sees_unlabelled = {domains[name].labels_of or name for name, has in (unlabelled or {}).items() if has and recipe.uses_unlabelled(name)}
    tasks = {}
    for name, domain in domains.items():
        perturbations = usable_perturbations(recipe, domain) if recipe.method == "cct" and name in sees_unlabelled else []
        tasks[name] = Task(
            things=tuple(label.thing for label in domain.classes),
            head=domain.labels_of,
            perturbations=tuple(perturbations),
            weight=recipe.domains[name].weight,
            supervised=recipe.supervised,
            consistency=recipe.consistency_of(name),
        )
    common: dict[str, Any] = {"decoder": recipe.decoder, "seed": recipe.seed}
    encoder = recipe.encoder if pretrained else replace(recipe.encoder, weights="none")
    if recipe.method == "mean_teacher":
        return MeanTeacher(encoder, tasks, settings=recipe.mean_teacher, **common)
    if recipe.method == "unimatch":
        return UniMatch(encoder, tasks, settings=recipe.unimatch, **common)
    if recipe.method == "usss":
        return Usss(encoder, tasks, settings=recipe.usss, **common)
    return CCT(encoder, tasks, **common) if recipe.method == "cct" else Segmenter(encoder, tasks, **common)


def usable_perturbations(recipe: Recipe, domain: Domain) -> list[Perturbation]:
    """One entry per auxiliary decoder; without a class that is a `thing`, or one that is not, those kinds are left out that hide objects or their context."""
    return recipe.perturbations_of(domain.name).each(objects=tells_objects(domain))


def tells_objects(domain: Domain) -> bool:
    """Whether the class table tells things from stuff."""
    return len({label.thing for label in domain.classes}) == 2


def notices(recipe: Recipe, domains: Mapping[str, Domain]) -> list[str]:
    """What the user should know of the model: perturbations that a domain cannot have, norms that will never be trained."""
    lines = []
    for name, domain in domains.items():
        if recipe.method == "cct" and recipe.uses_unlabelled(name) and not domain.labels_of and not tells_objects(domain):
            left_out = len(recipe.perturbations_of(name).each()) - len(usable_perturbations(recipe, domain))
            if left_out:
                lines.append(
                    f"{name}: its class table marks no class, or every class, as `thing`, so {left_out} auxiliary decoders with object masks, context masks and"
                    " guided cutout are left out."
                )
    if (recipe.encoder.norm, recipe.encoder.weights, recipe.init_from) == ("frozen", "none", None):
        lines.append("encoder.norm=frozen with encoder.weights=none freezes norms that were never trained; norm=shared, or pretrained weights, train better.")
    return lines


def require_lenders(domains: Mapping[str, Domain]) -> None:
    """Raises ValueError when a domain borrows the labels of one that is not in the recipe."""
    for name, domain in domains.items():
        if domain.labels_of and domain.labels_of not in domains:
            raise ValueError(f'domains.{name} borrows the labels of "{domain.labels_of}", which is not in the recipe. Add it: domains.{domain.labels_of}.')


def require_labels(domains: Mapping[str, Domain], labelled: Mapping[str, bool]) -> None:
    """Raises ValueError for a label space of which no domain has a labelled image: its main decoder would stay as it was drawn. `labelled` is by domain."""
    taught = {domains[name].labels_of or name for name, has in labelled.items() if has}
    for name, domain in domains.items():
        if (domain.labels_of or name) not in taught:
            raise ValueError(
                f"domains.{name} has no labelled image, and no other domain with its classes has one, so its main decoder cannot learn. Give it some"
                " (domains.NAME.labelled), name its pseudo-labels as train_split, or start from a trained run (init_from)."
            )
