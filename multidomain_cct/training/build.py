"""A recipe's model: the method's network with a head for every label space."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from multidomain_cct.data.batches.loader import Batch
from multidomain_cct.data.domain import Domain
from multidomain_cct.methods import METHODS
from multidomain_cct.methods.supervised import Supervised
from multidomain_cct.model.network import Task, labelled_images, unlabelled_images
from multidomain_cct.model.perturbations import Perturbation
from multidomain_cct.training.recipe import Recipe


def build_model(
    recipe: Recipe,
    domains: Mapping[str, Domain],
    *,
    unlabelled: Mapping[str, bool] | None = None,
    class_pixels: Mapping[str, Sequence[int]] | None = None,
    pretrained: bool = True,
) -> Supervised:
    """The recipe's network.

    `unlabelled` says which domains have unlabelled images; heads that see none, and all when it is None, get no
    auxiliary decoders. `class_pixels`: labelled pixels of each class, by domain, in the images that are used; needed
    by class weights and alignment. Raises UserError for encoder, stride or decoder that do not fit each other.
    """
    decoders = decoders_by_head(recipe, domains, unlabelled or {})
    tasks = {
        name: Task(
            things=tuple(label.thing for label in domain.classes),
            head=domain.labels_of,
            perturbations=tuple(decoders.get(name, ())),
            weight=recipe.domains[name].weight,
            crop=recipe.crop_of(name),
            class_pixels=tuple((class_pixels or {}).get(name, ())),
            supervised=recipe.supervised,
            consistency=recipe.consistency_of(name),
            settings=recipe.domains[name].cct_strong,
        )
        for name, domain in domains.items()
    }
    encoder = recipe.encoder if pretrained else replace(recipe.encoder, weights="none")
    method = METHODS[recipe.method]
    return method(
        encoder, tasks, decoder=recipe.decoder, seed=recipe.seed, settings=recipe.method_settings, ema=recipe.ema
    )


def decoders_by_head(
    recipe: Recipe, domains: Mapping[str, Domain], unlabelled: Mapping[str, bool]
) -> dict[str, list[Perturbation]]:
    """The auxiliary decoders of each head that sees unlabelled images of its own domain or of one that borrows it.

    `unlabelled`: which domains have unlabelled images.
    """
    if not METHODS[recipe.method].has_auxiliaries:
        return {}
    seen = [domain for name, domain in domains.items() if unlabelled.get(name) and uses_unlabelled(recipe, domain)]
    seen = [domain for domain in seen if METHODS[recipe.method].wants_auxiliaries(recipe.consistency_of(domain.name))]
    return {domain.labels_of or domain.name: auxiliary_decoders(recipe, domain) for domain in seen}


def auxiliary_decoders(recipe: Recipe, domain: Domain) -> list[Perturbation]:
    """The perturbation of each auxiliary decoder of the head that the domain uses.

    Perturbations that hide objects or their context need a class that is a `thing` and one that is not.
    """
    objects = len({label.thing for label in domain.classes}) == 2
    return recipe.perturbations_of(domain.labels_of or domain.name).each(objects=objects)


def wants_unlabelled(recipe: Recipe, name: str) -> bool:
    """Whether method and settings ask for the unlabelled images of a domain."""
    weak = bool(recipe.domains[name].weak_split)
    return METHODS[recipe.method].wants_unlabelled(recipe.consistency_of(name), pseudo_labels=weak)


def uses_unlabelled(recipe: Recipe, domain: Domain) -> bool:
    """Whether the domain's unlabelled images enter the loss: they are wanted, and a decoder sees them."""
    sees = not METHODS[recipe.method].needs_auxiliaries or bool(auxiliary_decoders(recipe, domain))
    return sees and wants_unlabelled(recipe, domain.name)


def compile_encoder(model: Supervised, batches: Mapping[str, Batch]) -> list[str]:
    """Compile the encoder, if the recipe asks for it, on the images of a step.

    Where that fails the encoder stays as it was, and a line says why.
    """
    encoder = model.encoder
    if encoder.compiled is None:
        return []
    statistics = [buffer.clone() for buffer in model.buffers()]
    mode, trouble = model.training, []
    model.train()
    try:
        encoded = model.encode(labelled_images(batches) | unlabelled_images(batches))
        total = torch.cat([features.flatten() for features in encoded.values()]).sum()
        trained = [parameter for parameter in encoder.parameters() if parameter.requires_grad]
        torch.autograd.grad(total, trained, allow_unused=True)
    except Exception as error:  # whatever a compiler, or the lack of one, raises
        encoder.compiled = None
        reason = (str(error).strip().splitlines() or [""])[0][:160]
        trouble = [f"encoder.compile is off: it failed here ({type(error).__name__}: {reason})."]
    model.train(mode)
    torch._foreach_copy_(list(model.buffers()), statistics)
    return trouble
