"""Whether a recipe can be trained: the one place that decides about recipe, domains and data together."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from multidomain_cct.data.batches.loader_room import require_room, tensor_bytes
from multidomain_cct.data.batches.streams import WEAK_ENDING, DomainStreams, open_streams
from multidomain_cct.data.domain import Domain
from multidomain_cct.data.label_findings import pixel_findings, table_findings
from multidomain_cct.data.shards.index import shard_paths
from multidomain_cct.data.shards.reader import Shards
from multidomain_cct.data.specification import find_domain
from multidomain_cct.errors import did_you_mean
from multidomain_cct.methods import METHODS
from multidomain_cct.model.backbone import BackbonePlan, plan_backbone
from multidomain_cct.training.build import auxiliary_decoders, decoders_by_head, uses_unlabelled, wants_unlabelled
from multidomain_cct.training.checkpoints.initial_weights import matching_heads
from multidomain_cct.training.findings import Finding, error, fails, noted, notice, warning
from multidomain_cct.training.machine import check_machine
from multidomain_cct.training.recipe import Recipe

_WORDS = ("all", "none")
"""Values of `labelled` that are no file."""


@dataclass(frozen=True)
class TrainingData:
    """What the recipe's domains have on disk. Nothing is decoded yet."""

    domains: dict[str, Domain] = field(default_factory=dict)
    streams: list[DomainStreams] = field(default_factory=list)
    """Of each domain, also of those without training images."""
    scored: dict[str, Shards] = field(default_factory=dict)
    """Val shards by domain."""


def check(
    recipe: Recipe, folders: Sequence[Path], *, named_by: str = "the recipe", parts: int = 1
) -> tuple[list[Finding], TrainingData]:
    """Everything to know before training, and the opened data, which is complete unless a finding is an error.

    `parts`: micro-batches of a step, over all processes. Raises SourceError or OSError for data that cannot be read.
    """
    findings, data = [*check_recipe(recipe), *check_machine(recipe)], TrainingData()
    for name in recipe.domains:
        with noted(findings, f"domains.{name}"):
            data.domains[name] = find_domain(name, folders, named_by=named_by)
    findings += _check_domains(recipe, data.domains)
    if fails(findings):
        return findings, data
    findings += _check_splits(recipe, data.domains)
    if fails(findings):
        return findings, data
    for name, choice in recipe.domains.items():
        hint = _where_looked(recipe, name)
        with noted(findings, f"domains.{name}", hint):
            used = uses_unlabelled(recipe, data.domains[name])
            data.streams.append(open_streams(data.domains[name], choice, recipe.data, use_unlabelled=used))
        if choice.val_split:
            with noted(findings, f"domains.{name}.val_split", hint):
                data.scored[name] = Shards.open(Path(recipe.data.shards) / name, choice.val_split)
    if not fails(findings):
        with noted(findings, "init_from"):
            findings += _check_images(recipe, data)
        findings += [*_check_batches(recipe, data, parts), *_check_norms(recipe, data, parts), *_check_crop_sizes(data)]
        with noted(findings, "data.workers"):
            sizes = tensor_bytes(data.streams, parts, together=recipe.data.schedule == "together")
            require_room(sizes, workers=recipe.data.workers, prefetch=recipe.data.prefetch)
    return findings, data


def check_recipe(recipe: Recipe) -> Iterator[Finding]:
    """What settings say about each other."""
    stride = recipe.encoder.stride
    for name, choice in recipe.domains.items():
        key = f"domains.{name}"
        further = [*choice.unlabelled_splits, *([choice.weak_split] if choice.weak_split else [])]
        if choice.val_split == "test":
            yield error(
                f"{key}.val_split", "is `test`, on which `best` must not be chosen. Use `val`, or leave it empty."
            )
        if choice.train_split in choice.unlabelled_splits or len(set(further)) < len(further):
            yield error(f"{key}.unlabelled_splits", "repeats a split, the train_split or weak_split. Name each once.")
        if choice.val_split and choice.val_split in further:
            yield error(key, f"trains on its val_split {choice.val_split!r}, which is scored. Name another split.")
        if choice.weak_split and not choice.weak_split.endswith(WEAK_ENDING):
            text = f"is {choice.weak_split!r}; the pseudo-labels that `weaklabels` makes end in {WEAK_ENDING}."
            yield error(f"{key}.weak_split", text)
        if choice.image_labels and not choice.weak_split:
            text = f"is not read in training; make pseudo-labels with `weaklabels` and name them in {key}.weak_split."
            yield notice(f"{key}.image_labels", text)
        if stride % recipe.consistency_of(name).stride:
            text = f"is {recipe.consistency_of(name).stride}, which does not divide encoder.stride {stride}."
            yield error(f"{key}.consistency.stride", text)
    unfit = list(_check_crops(recipe))
    if not unfit:
        encoder, crops = recipe.encoder, dict.fromkeys(recipe.crop_of(name) for name in recipe.domains)
        with noted(unfit, "encoder"):
            plan = plan_backbone(encoder.name, encoder.context, encoder.stride, tuple(crops))
            unfit += _check_layer_decay(recipe, plan)
    yield from unfit
    if (recipe.encoder.weights, recipe.init_from) == ("none", None):
        if recipe.encoder.norm == "frozen":
            text = (
                "is `frozen` with encoder.weights=none: untrained norms stay. Use norm=shared, or pretrained weights."
            )
            yield warning("encoder.norm", text)
        if recipe.encoder.freeze:
            text = (
                "is set with encoder.weights=none: an untrained backbone stays. Use pretrained weights, or init_from."
            )
            yield warning("encoder.freeze", text)


def _check_layer_decay(recipe: Recipe, plan: BackbonePlan) -> Iterator[Finding]:
    key, decay, encoder = "optimiser.layer_decay", recipe.optimiser.layer_decay, recipe.encoder
    if decay == 1:
        return
    if encoder.norm == "per_domain":
        yield error(key, f"is {decay}, which encoder.norm=per_domain does not go with. Use norm=shared or frozen.")
    elif not plan.depths:
        yield error(key, f"is {decay}, but timm tells no layers of {encoder.name}. Leave it out; it is for ViTs.")
    elif encoder.freeze:
        yield warning(key, f"is {decay}, but encoder.freeze leaves the backbone as it is: it does nothing.")


def _check_crops(recipe: Recipe) -> Iterator[Finding]:
    stride = recipe.encoder.stride
    crops = {"data.crop": recipe.data.crop} | {
        f"domains.{name}.crop": choice.crop for name, choice in recipe.domains.items() if choice.crop is not None
    }
    for key, crop in crops.items():
        if len(crop) != 2 or min(crop) < 1:
            yield error(key, f"is {crop}; it is [width, height] in pixels.")
        elif any(side % stride for side in crop):
            nearest = [max(1, round(side / stride)) * stride for side in crop]
            yield error(key, f"is {crop}, which encoder.stride {stride} does not divide. Use for example {nearest}.")


def _check_domains(recipe: Recipe, domains: dict[str, Domain]) -> Iterator[Finding]:
    """Label spaces, and the auxiliary decoders that they allow."""
    method = METHODS[recipe.method]
    for name, domain in domains.items():
        if domain.num_classes == 1:
            yield Finding("warning", f"domains.{name}", f"domains.{name}: {' '.join(table_findings(domain))}")
        lender = domain.labels_of
        if lender and lender not in recipe.domains:
            text = f'borrows the labels of "{lender}", which is not in the recipe. Add it: domains.{lender}.'
            yield error(f"domains.{name}", text)
        if method.has_auxiliaries and not lender and wants_unlabelled(recipe, name):
            usable, asked = len(auxiliary_decoders(recipe, domain)), len(recipe.perturbations_of(name).each())
            if usable < asked:
                yield notice(
                    f"domains.{name}.perturbations",
                    f"leaves out {asked - usable} auxiliary decoders with object masks, context masks and guided "
                    "cutout: the class table marks no class, or every class, as a countable object (`thing: true`)."
                    f"{'' if usable else ' None is left, so its unlabelled images are not used.'}",
                )
    spaces = {domain.labels_of or name for name, domain in domains.items()}
    if domains.keys() == recipe.domains.keys() and len(spaces) < method.min_label_spaces:
        text = (
            f"is `{recipe.method}`, which compares label spaces, and there is one. Add a domain, or use another method."
        )
        yield error("method", text)


def _check_images(recipe: Recipe, data: TrainingData) -> Iterator[Finding]:
    """Parts of the model that no image would train. Raises UserError when init_from is not a run."""
    taught = set(matching_heads(Path(recipe.init_from), data.domains)) if recipe.init_from is not None else set()
    taught |= {stream.domain.labels_of or stream.domain.name for stream in data.streams if stream.labelled}
    if not any(stream.labelled or stream.unlabelled for stream in data.streams):
        text = "have no images to train on. Set `labelled` of one, or use a method for unlabelled images."
        yield error("domains", text)
    for stream in data.streams:
        key = f"domains.{stream.domain.name}"
        if (stream.domain.labels_of or stream.domain.name) not in taught:
            yield error(
                key,
                "has no labelled image, nor has another domain with its classes, so its main decoder cannot learn. "
                f"Give it some ({key}.labelled), name its pseudo-labels as train_split, or start from a run that has "
                "its head (init_from).",
            )
        counts = stream.labelled_classes if stream.labelled else None
        pixels = [] if counts is None else [*counts.pixels.tolist(), counts.ignored]
        for text in pixel_findings(stream.domain, pixels, {}) if pixels else []:
            yield warning(f"{key}.labelled", f"is {len(stream.labelled)} images: {text}")
        largest = tuple(max(sides) for sides in zip(*stream.some_sizes, strict=True))
        if any(side > most for side, most in zip(stream.crop, largest, strict=False)):
            text = f"is {list(stream.crop)}, larger than the images (at most {list(largest)}), which are padded."
            yield notice("data.crop" if recipe.domains[stream.domain.name].crop is None else f"{key}.crop", text)
        if recipe.encoder.norm == "per_domain" and not stream.labelled and not stream.unlabelled:
            text = "has no image to train its own norms (encoder.norm=per_domain). Leave it out, or use norm=shared."
            yield error(key, text)
    if not any(stream.unlabelled for stream in data.streams):
        text = f"is `{recipe.method}`, but no domain has unlabelled images. Add some, or use method=supervised."
        if METHODS[recipe.method].needs_unlabelled:
            yield error("method", text)
        elif any(wants_unlabelled(recipe, name) for name in recipe.domains):
            yield warning("method", text)


def _check_batches(recipe: Recipe, data: TrainingData, parts: int) -> Iterator[Finding]:
    """Batches that cannot be cut into parts or mixed, and decoders that cannot be drawn."""
    mixes = METHODS[recipe.method].mixing(recipe.method_settings) > 0
    decoders = decoders_by_head(recipe, data.domains, {s.domain.name: bool(s.unlabelled) for s in data.streams})
    for stream in data.streams:
        key = f"domains.{stream.domain.name}"
        for subset in ("labelled", "unlabelled"):
            size, available = stream.batch(subset), len(stream.samples(subset))
            if 0 < available < size:
                text = f"is {size}, but there are {available} {subset} images, so a step repeats some."
                yield notice(f"{key}.{subset}_batch", text)
            if stream.samples(subset) and size % parts:
                accumulation = recipe.training.accumulation
                yield error(
                    f"{key}.{subset}_batch",
                    f"is {size}, which {parts // accumulation} process(es) x {accumulation} accumulated micro-batches "
                    f"do not divide. Use a multiple of {parts}.",
                )
        if stream.unlabelled and mixes and stream.unlabelled_batch == parts:
            text = "is one image per process and micro-batch, with no other to be mixed with: cutmix does nothing."
            yield warning(f"{key}.unlabelled_batch", text)
        drawn = recipe.consistency_of(stream.domain.name).sample
        available = len(decoders.get(stream.domain.labels_of or stream.domain.name, []))
        if stream.unlabelled and 0 < available < drawn:
            text = f"is {drawn}, but there are {available} auxiliary decoders. Draw at most that many; 0 takes all."
            yield error(f"{key}.consistency.sample", text)


def _check_crop_sizes(data: TrainingData) -> Iterator[Finding]:
    for stream in data.streams:
        width, height = stream.largest_image or stream.crop
        if stream.crop[0] > width and stream.crop[1] > height:
            text = f"is {list(stream.crop)}, larger than every image (the largest {width}x{height}): views are padded."
            yield notice(f"domains.{stream.domain.name}.crop", f"{text} Use a smaller one.")


def _check_splits(recipe: Recipe, domains: Mapping[str, Domain]) -> Iterator[Finding]:
    """Splits that a domain's file does not have, nor anybody's shards."""
    for name, choice in recipe.domains.items():
        folder = Path(recipe.data.shards) / name
        splits = {"val_split": choice.val_split, "train_split": choice.train_split}
        splits |= {f"unlabelled_splits[{place}]": split for place, split in enumerate(choice.unlabelled_splits)}
        for key, split in splits.items():
            has_shards = choice.remote or not folder.is_dir() or shard_paths(folder, split)
            if split and split not in domains[name].splits and not has_shards and not split.endswith(WEAK_ENDING):
                known = ", ".join(domains[name].splits)
                remedy = f"Name one{', or write none to score no images' if key == 'val_split' else ''}."
                text = f"is {split!r}, which {name} does not have. Its splits: {known}. {remedy}"
                yield error(f"domains.{name}.{key}", text + did_you_mean(split, domains[name].splits))


def _where_looked(recipe: Recipe, name: str) -> str:
    """The places in which the shards and the list of a domain were looked for, if one of them was not found."""
    paths = [Path(recipe.data.shards) / name, *map(Path, re.findall(r".*[a-z.].*", recipe.domains[name].labelled))]
    missing = [path for path in paths if not path.is_absolute() and not path.exists() and str(path) not in _WORDS]
    if not missing or not recipe.places:
        return ""
    return f" Relative paths are looked for in {Path.cwd()} and {' and '.join(map(str, recipe.places))}."


def _check_norms(recipe: Recipe, data: TrainingData, parts: int) -> Iterator[Finding]:
    """Batch norms that would see a single image, whose statistics are its own or, on pooled features, nothing."""
    if recipe.encoder.norm == "frozen":
        return
    apart = recipe.encoder.norm == "per_domain" or recipe.data.schedule == "alternate"
    passes: dict[tuple[str, tuple[int, int]], int] = {}
    for stream in data.streams:
        counts = (stream.batch(subset) for subset in ("labelled", "unlabelled") if stream.samples(subset))
        group = (stream.domain.name if apart else "", stream.crop)
        passes[group] = passes.get(group, 0) + sum(counts) // parts
    for (name, crop), images in passes.items():
        if images == 1:
            key = f"domains.{name}.labelled_batch" if name else "data.labelled_batch"
            yield error(
                key,
                f"gives batch norms one image of {crop[0]}x{crop[1]} per process and micro-batch ({parts} parts). "
                "Raise it, lower training.accumulation or the number of processes, or set encoder.norm=frozen.",
            )
