"""What network a recipe gets: its method, a head for every label space, and auxiliary decoders where they have
something to see.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest

from multidomain_cct.data.domain import Domain
from multidomain_cct.methods import METHODS
from multidomain_cct.methods.cct import CCT
from multidomain_cct.methods.cct_strong import CCTStrong
from multidomain_cct.methods.mean_teacher import MeanTeacher, MeanTeacherSettings
from multidomain_cct.methods.supervised import Supervised
from multidomain_cct.methods.unimatch import UniMatch, UniMatchSettings
from multidomain_cct.methods.usss import Usss, UsssSettings
from multidomain_cct.model.network import Segmenter
from multidomain_cct.model.perturbations import (
    AdversarialNoise,
    ContextMask,
    Dropout,
    FeatureNoise,
    GuidedCutout,
    ObjectMask,
)
from multidomain_cct.training.build import build_model, uses_unlabelled
from multidomain_cct.training.recipe import Recipe, recipe_from

TINY: dict[str, Any] = {
    "encoder": {"name": "test_resnet", "stride": 8, "context": "fpn", "width": 32},
    "decoder": "bilinear",
    "domains": {"yard": {}, "room": {}},
    "perturbations": {
        "feature_noise": {"count": 2},
        "feature_drop": {"count": 0},
        "dropout": {"count": 1},
        "object_mask": {"count": 1},
        "context_mask": {"count": 1},
        "guided_cutout": {"count": 3},
        "adversarial_noise": {"count": 1},
    },
}


def recipe(**changes: object) -> Recipe:
    return recipe_from(TINY | changes, "the test's recipe")


@pytest.fixture
def domains(tiny_domain: Callable[..., Domain]) -> dict[str, Domain]:
    """`yard` has a class that is a thing, `room` has none, `walls` has nothing else; `dusk` borrows the labels of
    `yard`.
    """
    plain = {
        name: tiny_domain(name, classes)
        for name, classes in (("yard", ("cat", "grass")), ("room", ("wall", "floor", "door")), ("walls", ("a", "b")))
    }
    cat, grass = plain["yard"].classes
    yard = replace(plain["yard"], classes=(replace(cat, thing=True), grass))
    walls = replace(plain["walls"], classes=tuple(replace(label, thing=True) for label in plain["walls"].classes))
    return {"yard": yard, "room": plain["room"], "walls": walls, "dusk": replace(yard, name="dusk", labels_of="yard")}


def some(domains: Mapping[str, Domain], *names: str) -> dict[str, Domain]:
    return {name: domains[name] for name in names}


def seen(*names: str) -> dict[str, bool]:
    """Which domains have unlabelled images, for build_model."""
    return {name: True for name in names}


def kinds(model: Segmenter, name: str) -> Counter[type]:
    return Counter(type(auxiliary.perturbation) for auxiliary in model.head(name).auxiliaries)


@pytest.mark.parametrize(
    ("method", "kind"),
    [
        ("cct", CCT),
        ("supervised", Supervised),
        ("mean_teacher", MeanTeacher),
        ("unimatch", UniMatch),
        ("usss", Usss),
        ("cct_strong", CCTStrong),
    ],
)
def test_each_method_has_its_network_with_a_head_for_every_domain(
    domains: dict[str, Domain], method: str, kind: type
) -> None:
    model = build_model(recipe(method=method), some(domains, "yard", "room"), unlabelled=seen("yard", "room"))
    assert type(model) is kind
    assert list(model.heads) == ["yard", "room"]
    assert [sum(kinds(model, name).values()) for name in ("yard", "room")] == (
        [9, 4] if method.startswith("cct") else [0, 0]
    )


def test_a_method_gets_its_own_section(domains: dict[str, Domain]) -> None:
    chosen = some(domains, "yard", "room")
    teacher = build_model(recipe(method="mean_teacher", mean_teacher={"decay": 0.5}), chosen)
    unimatch = build_model(recipe(method="unimatch", unimatch={"confidence": 0.7}), chosen)
    usss = build_model(recipe(method="usss", usss={"channels": 9}), chosen)
    assert isinstance(teacher, MeanTeacher)
    assert teacher.settings == MeanTeacherSettings(decay=0.5)
    assert isinstance(unimatch, UniMatch)
    assert unimatch.settings == UniMatchSettings(confidence=0.7)
    assert isinstance(usss, Usss)
    assert usss.settings == UsssSettings(channels=9)
    assert usss.embedding.out_channels == 9


def test_every_domain_has_its_own_settings(domains: dict[str, Domain]) -> None:
    own = {
        "yard": {
            "weight": 2,
            "consistency": {"confidence": 0.9},
            "perturbations": {"dropout": {"count": 0}, "feature_noise": {"amplitude": 0.1}},
        },
        "room": {},
    }
    made = recipe(domains=own, consistency={"weight": 3}, supervised={"loss": "ab_ce"})
    model = build_model(made, some(domains, "yard", "room"), unlabelled=seen("yard", "room"))
    yard, room = model.tasks["yard"], model.tasks["room"]
    assert (yard.weight, yard.consistency.weight, yard.consistency.confidence, yard.things) == (
        2,
        3,
        0.9,
        (True, False),
    )
    assert (room.weight, room.consistency.weight, room.consistency.confidence, room.things) == (
        1,
        3,
        0,
        (False, False, False),
    )
    assert yard.supervised == room.supervised == made.supervised
    assert kinds(model, "yard") == {
        FeatureNoise: 2,
        ObjectMask: 1,
        ContextMask: 1,
        GuidedCutout: 3,
        AdversarialNoise: 1,
    }
    assert kinds(model, "room") == {FeatureNoise: 2, Dropout: 1, AdversarialNoise: 1}
    amplitudes = {name: model.head(name).auxiliaries[0].perturbation.amplitude for name in ("yard", "room")}
    assert amplitudes == {"yard": 0.1, "room": 0.3}


# Unlabelled images


@pytest.mark.parametrize("method", METHODS)
def test_every_method_but_the_supervised_one_uses_unlabelled_images(domains: dict[str, Domain], method: str) -> None:
    assert uses_unlabelled(recipe(method=method), domains["yard"]) == (method != "supervised")


def test_consistency_can_be_turned_off_in_one_domain_or_in_all(domains: dict[str, Domain]) -> None:
    one = recipe(domains={"yard": {"consistency": {"weight": 0}}, "room": {}})
    assert [uses_unlabelled(one, domains[name]) for name in ("yard", "room")] == [False, True]
    both = recipe(domains={"yard": {"consistency": {"weight": 5}}, "room": {}}, consistency={"weight": 0})
    assert [uses_unlabelled(both, domains[name]) for name in ("yard", "room")] == [False, False]


def test_pseudo_labels_are_used_without_consistency_unless_they_are_turned_off_too(domains: dict[str, Domain]) -> None:
    weak = {"domains": {"yard": {"weak_split": "train_weak"}}}
    assert uses_unlabelled(recipe(**weak, consistency={"weight": 0}), domains["yard"])
    assert not uses_unlabelled(recipe(**weak, consistency={"weight": 0, "weak_weight": 0}), domains["yard"])


# Auxiliary decoders


@pytest.mark.parametrize("name", ["room", "walls"])
def test_a_domain_without_objects_or_without_context_loses_three_kinds(domains: dict[str, Domain], name: str) -> None:
    made = recipe(domains={"yard": {}, name: {}})
    chosen = some(domains, "yard", name)
    assert kinds(build_model(made, chosen, unlabelled=seen("yard", name)), name) == {
        FeatureNoise: 2,
        Dropout: 1,
        AdversarialNoise: 1,
    }


def test_a_domain_whose_decoders_are_all_left_out_does_not_use_its_unlabelled_images(
    domains: dict[str, Domain],
) -> None:
    made = recipe(
        perturbations=TINY["perturbations"]
        | {kind: {"count": 0} for kind in ("feature_noise", "dropout", "adversarial_noise")}
    )
    assert not uses_unlabelled(made, domains["room"])
    assert uses_unlabelled(made, domains["yard"])


def test_a_borrower_is_asked_for_the_mix_of_its_lender(domains: dict[str, Domain]) -> None:
    nothing = {kind: {"count": 0} for kind in TINY["perturbations"]}
    lender_without = recipe(domains={"yard": {"perturbations": nothing}, "dusk": {}})
    assert not uses_unlabelled(lender_without, domains["dusk"])
    assert uses_unlabelled(recipe(domains={"yard": {}, "dusk": {"perturbations": nothing}}), domains["dusk"])


def test_a_head_that_sees_no_unlabelled_images_has_no_auxiliary_decoders(domains: dict[str, Domain]) -> None:
    chosen = some(domains, "yard", "room")
    for unlabelled in ({"yard": False, "room": True}, {"room": True}):
        assert not kinds(build_model(recipe(), chosen, unlabelled=unlabelled), "yard")
    off = recipe(domains={"yard": {"consistency": {"weight": 0}}, "room": {}})
    assert not kinds(build_model(off, chosen, unlabelled=seen("yard", "room")), "yard")
    assert not any(".auxiliaries." in name for name in build_model(recipe(), chosen).state_dict())


# Borrowed labels


def test_a_borrower_has_its_lenders_head_and_brings_it_auxiliary_decoders(domains: dict[str, Domain]) -> None:
    made = recipe(domains={"yard": {}, "dusk": {"labelled": "none", "perturbations": {"dropout": {"count": 7}}}})
    model = build_model(made, some(domains, "yard", "dusk"), unlabelled={"yard": False, "dusk": True})
    assert list(model.heads) == ["yard"]
    assert model.head("dusk") is model.head("yard")
    # The mix is the lender's: the head is its own.
    assert kinds(model, "dusk")[Dropout] == 1
    assert sum(kinds(model, "dusk").values()) == 9


@pytest.mark.parametrize("order", [("yard", "dusk"), ("dusk", "yard")])
def test_lender_and_borrower_may_stand_in_any_order(domains: dict[str, Domain], order: tuple[str, str]) -> None:
    model = build_model(recipe(domains={name: {} for name in order}), some(domains, *order), unlabelled=seen(*order))
    assert list(model.heads) == ["yard"]
    assert len(model.tasks) == 2
