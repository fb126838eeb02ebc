"""A recipe's model: the method's network with a head for every label space."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch

from multidomain_cct.data.batches.loader import Batch
from multidomain_cct.data.batches.streams import DomainStreams
from multidomain_cct.data.domain import Domain
from multidomain_cct.errors import UserError
from multidomain_cct.methods import METHODS
from multidomain_cct.model.network import Segmenter, Task, labelled_images, unlabelled_images
from multidomain_cct.model.perturbations import Perturbation
from multidomain_cct.training.recipe import Recipe


def build_model(
    recipe: Recipe,
    domains: Mapping[str, Domain],
    *,
    unlabelled: Mapping[str, bool] | None = None,
    pretrained: bool = True,
) -> Segmenter:
    """The recipe's network.

    `unlabelled` says which domains have unlabelled images; heads that see none, and all when it is None, get no
    auxiliary decoders. Raises UserError for encoder, stride or decoder that do not fit each other.
    """
    method = METHODS[recipe.method]
    sees_unlabelled = {
        domains[name].labels_of or name
        for name, has in (unlabelled or {}).items()
        if has and uses_unlabelled(recipe, domains[name])
    }
    tasks = {}
    for name, domain in domains.items():
        perturbations = auxiliary_decoders(recipe, domain) if method.has_auxiliaries and name in sees_unlabelled else []
        drawn = recipe.consistency_of(name).sample
        if perturbations and drawn > len(perturbations):
            raise UserError(
                f"domains.{name}: consistency.sample is {drawn}, but there are {len(perturbations)} auxiliary "
                "decoders. Draw at most that many; 0 takes all."
            )
        tasks[name] = Task(
            things=tuple(label.thing for label in domain.classes),
            head=domain.labels_of,
            perturbations=tuple(perturbations),
            weight=recipe.domains[name].weight,
            supervised=recipe.supervised,
            consistency=recipe.consistency_of(name),
        )
    encoder = recipe.encoder if pretrained else replace(recipe.encoder, weights="none")
    try:
        return method(encoder, tasks, decoder=recipe.decoder, seed=recipe.seed, settings=recipe.method_settings)
    except ValueError as error:
        # Network and decoders still refuse with ValueError.
        raise UserError(str(error)) from error


def auxiliary_decoders(recipe: Recipe, domain: Domain) -> list[Perturbation]:
    """The perturbation of each auxiliary decoder of the head that the domain uses.

    Perturbations that hide objects or their context need a class that is a `thing` and one that is not.
    """
    return recipe.perturbations_of(domain.labels_of or domain.name).each(objects=tells_objects(domain))


def wants_unlabelled(recipe: Recipe, name: str) -> bool:
    """Whether method and settings ask for the unlabelled images of a domain."""
    weak = bool(recipe.domains[name].weak_split)
    return METHODS[recipe.method].wants_unlabelled(recipe.consistency_of(name), pseudo_labels=weak)


def uses_unlabelled(recipe: Recipe, domain: Domain) -> bool:
    """Whether the domain's unlabelled images enter the loss: they are wanted, and a decoder sees them."""
    sees = not METHODS[recipe.method].has_auxiliaries or bool(auxiliary_decoders(recipe, domain))
    return sees and wants_unlabelled(recipe, domain.name)


def tells_objects(domain: Domain) -> bool:
    """Whether the class table tells things from stuff."""
    return len({label.thing for label in domain.classes}) == 2


def notices(recipe: Recipe, domains: Mapping[str, Domain], *, parts: int = 1) -> list[str]:
    """What the user should know of the model: perturbations that a domain cannot have, labels that are not used, norms
    that will never be trained.

    `parts` is into how many micro-batches, over all processes, a step is cut.
    """
    lines = []
    for name, domain in domains.items():
        choice = recipe.domains[name]
        usable, all_kinds = (
            auxiliary_decoders(recipe, domain),
            recipe.perturbations_of(domain.labels_of or name).each(),
        )
        if (
            METHODS[recipe.method].has_auxiliaries
            and wants_unlabelled(recipe, name)
            and not domain.labels_of
            and len(usable) < len(all_kinds)
        ):
            none_left = "" if usable else " None is left, so its unlabelled images are not used."
            lines.append(
                f"{name}: its class table marks no class, or every class, as `thing`, so "
                f"{len(all_kinds) - len(usable)} auxiliary decoders with object masks,"
                f" context masks and guided cutout are left out.{none_left}"
            )
        if choice.image_labels and not choice.weak_split:
            lines.append(
                f"{name}: image_labels is not read in training; make pseudo-labels with `weaklabels` and name them in "
                f"domains.{name}.weak_split."
            )
        mixes = METHODS[recipe.method].cutmix(recipe.method_settings)
        if mixes > 0 and (choice.unlabelled_batch or recipe.data.unlabelled_batch) == parts:
            lines.append(
                f"{name}: one unlabelled image per process and micro-batch has no other to be mixed with, so cutmix "
                "does nothing."
            )
    if (recipe.encoder.norm, recipe.encoder.weights, recipe.init_from) == ("frozen", "none", None):
        lines.append(
            "encoder.norm=frozen with encoder.weights=none freezes norms that were never trained; norm=shared, or "
            "pretrained weights, train better."
        )
    return lines


def compile_encoder(model: Segmenter, batches: Mapping[str, Batch]) -> list[str]:
    """Compile the encoder, if the recipe asks for it, on the images of a step.

    Where that fails it stays as it was; what is returned then says so.
    """
    encoder = model.encoder
    if encoder.compiled is None:
        return []
    statistics = [buffer.clone() for buffer in model.buffers()]
    mode, trouble = model.training, []
    model.train()
    images = labelled_images(batches) | unlabelled_images(batches)
    try:
        features = torch.cat([features.flatten() for features in model.encode(images).values()])
        torch.autograd.grad(
            features.sum(),
            [parameter for parameter in encoder.parameters() if parameter.requires_grad],
            allow_unused=True,
        )
    except Exception as error:  # whatever a compiler, or the lack of one, raises
        encoder.compiled = None
        reason = (str(error).strip().splitlines() or [""])[0][:160]
        trouble = [f"encoder.compile is off: it failed here ({type(error).__name__}: {reason})."]
    model.train(mode)
    for buffer, before in zip(model.buffers(), statistics, strict=True):
        buffer.copy_(before)
    return trouble


def require_lenders(domains: Mapping[str, Domain]) -> None:
    """Raises UserError when a domain borrows the labels of one that is not in the recipe."""
    for name, domain in domains.items():
        if domain.labels_of and domain.labels_of not in domains:
            raise UserError(
                f'domains.{name} borrows the labels of "{domain.labels_of}", which is not in the recipe. Add it: '
                f"domains.{domain.labels_of}."
            )


def require_training_data(
    recipe: Recipe, domains: Mapping[str, Domain], streams: Sequence[DomainStreams], *, taught: Iterable[str] = ()
) -> None:
    """Raises UserError for parts of the model that would stay as they were drawn.

    A label space of which no domain has a labelled image would keep a random main decoder, unless it is among those
    that were `taught` before (init_from).
    """
    spaces = {*taught, *(stream.domain.labels_of or stream.domain.name for stream in streams if stream.labelled)}
    for name, domain in domains.items():
        if (domain.labels_of or name) not in spaces:
            raise UserError(
                f"domains.{name} has no labelled image, and no other domain with its classes has one, so its main "
                "decoder cannot learn. Give it some"
                " (domains.NAME.labelled), name its pseudo-labels as train_split, or start from a run that has its "
                "head (init_from)."
            )
    for stream in streams:
        if recipe.encoder.norm == "per_domain" and not stream.labelled and not stream.unlabelled:
            raise UserError(
                f"domains.{stream.domain.name} has no image to train on, so with encoder.norm=per_domain its norms "
                "would stay as loaded. Leave the domain out,"
                " or use norm=shared or norm=frozen."
            )
    method = METHODS[recipe.method]
    if len({domain.labels_of or name for name, domain in domains.items()}) < method.min_label_spaces:
        raise UserError(
            f"method is `{recipe.method}`, which compares label spaces, and the recipe has one. Add a domain, or use "
            "another method."
        )
    if method.needs_unlabelled and not any(stream.unlabelled for stream in streams):
        raise UserError(
            f"method is `{recipe.method}`, which learns from unlabelled images, and no domain has any. Add some, or "
            "use method=supervised."
        )
