"""Real tiny things that several tests share: two domains drawn on the spot, their shards, and a run of two steps on
them.
"""

from __future__ import annotations

import io
import signal
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from promises import pytest_runtest_logreport, pytest_terminal_summary  # noqa: F401

from multidomain_cct.data.domain import Domain, LabelClass, Split
from multidomain_cct.data.shards.writer import ShardWriter
from multidomain_cct.training.loop import train
from multidomain_cct.training.recipe import Recipe, recipe_from

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    # As a background job of a shell: the processes that tests start would inherit it, and never see Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cuda", choices=("cuda", "cpu"), help="where tests marked gpu run")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--device") == "cuda" and not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="there is no CUDA card here; --device cpu rehearses it"))


@pytest.fixture
def device(pytestconfig: pytest.Config) -> torch.device:
    """Where tests marked gpu run."""
    return torch.device(pytestconfig.getoption("--device"))


TINY_DOMAINS = {"fields": ("grass", "sky", "barn"), "shapes": ("square", "ground")}


def _picture(rng: np.random.Generator, domain: Domain, size: tuple[int, int]) -> tuple[bytes, bytes]:
    """JPEG and PNG of one image and its mask: a background class, a box of each other class in about its colour, and an
    unlabelled strip.
    """
    width, height = size
    ids = np.full((height, width), domain.num_classes - 1, dtype=np.uint8)
    for train_id in range(domain.num_classes - 1):
        top, left = rng.integers(0, height // 2), rng.integers(0, width // 2)
        ids[top : top + height // 2, left : left + width // 2] = train_id
    pixels = np.clip(domain.palette[ids] + rng.normal(0, 20, (height, width, 3)), 0, 255).astype(np.uint8)
    ids[:, :2] = 255
    image, mask = io.BytesIO(), io.BytesIO()
    Image.fromarray(pixels).save(image, "JPEG", quality=90)
    Image.fromarray(ids).save(mask, "PNG")
    return image.getvalue(), mask.getvalue()


@pytest.fixture(scope="session")
def tiny_domain() -> Callable[..., Domain]:
    """A function (name, class names) -> Domain of layout `folder` with the splits train and val."""

    def build(name: str, classes: tuple[str, ...] = ("square", "ground")) -> Domain:
        rng = np.random.default_rng(len(name))
        colors = [tuple(int(v) for v in rng.integers(30, 226, 3)) for _ in classes]
        rows = tuple(
            LabelClass(label, (color[0], color[1], color[2])) for label, color in zip(classes, colors, strict=True)
        )
        splits = {split: Split(f"images/{split}/*.jpg", f"masks/{split}/*.png") for split in ("train", "val")}
        return Domain(name=name, layout="folder", splits=splits, classes=rows, title=f"Tiny {name}")

    return build


@pytest.fixture(scope="session")
def tiny_shards() -> Callable[..., Path]:
    """A function (root, domain, counts by split, size, labelled) that draws images into shards under root and returns
    the domain's folder.
    """

    def write(
        root: Path,
        domain: Domain,
        counts: Mapping[str, int] | None = None,
        *,
        size: tuple[int, int] = (96, 72),
        labelled: bool = True,
    ) -> Path:
        for split, count in (counts or {"train": 6, "val": 3}).items():
            rng = np.random.default_rng([len(split), count, *domain.name.encode()])
            with ShardWriter(root / domain.name, split) as writer:
                for number in range(count):
                    image, mask = _picture(rng, domain, size)
                    writer.write(f"{split}_{number:03d}", image=image, mask=mask if labelled else None, meta=b"{}")
        return root / domain.name

    return write


@pytest.fixture(scope="session")
def tiny_training(tiny_domain: Callable[..., Domain], tiny_shards: Callable[..., Path]) -> Callable[..., Path]:
    """A function (workspace, name, class names by domain, overrides) that trains two steps of CCT in the workspace and
    returns the run's folder.
    """

    def run(
        workspace: Path, name: str = "tiny", classes: Mapping[str, tuple[str, ...]] | None = None, **overrides: object
    ) -> Path:
        domains = {domain: tiny_domain(domain, names) for domain, names in (classes or TINY_DOMAINS).items()}
        (workspace / "domains").mkdir(exist_ok=True)
        for domain in domains.values():
            (workspace / "domains" / f"{domain.name}.yaml").write_text(domain.to_yaml(), encoding="utf-8")
            if not (workspace / "shards" / domain.name).exists():
                tiny_shards(workspace / "shards", domain)
        plain = {
            "name": name,
            "runs": str(workspace / "runs"),
            "domains": {domain: {"labelled": "2"} for domain in domains},
            "data": {
                "shards": str(workspace / "shards"),
                "labelled_batch": 2,
                "unlabelled_batch": 2,
                "crop": [64, 64],
                "workers": 0,
            },
            "encoder": {"name": "test_resnet", "stride": 8, "context": "none", "width": 32},
            "decoder": "bilinear",
            "perturbations": {kind: {"count": 1} for kind in ("feature_noise", "feature_drop", "dropout")},
            "optimiser": {"lr": 0.05},
            "training": {"steps": 2, "log_every": 1, "evaluate_every": 1},
        }
        return train(
            recipe_from(plain | overrides, name), [workspace / "domains"], command=f"multidomain_cct train {name}.yaml"
        )

    return run


@pytest.fixture(scope="session")
def tiny_run(tiny_training: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run of two domains (fields, shapes), with checkpoints, evaluations, and its shards beside it.

    Copy it to change it.
    """
    return tiny_training(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def two_domains(
    tiny_domain: Callable[..., Domain], tiny_shards: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A folder with the shards of fields (10 train, 6 unlabelled, 3 val) and shapes (8 train, 5 val), and domains/ with
    their specifications.
    """
    root = tmp_path_factory.mktemp("two_domains")
    (root / "domains").mkdir()
    for name, train_count, val_count in (("fields", 10, 3), ("shapes", 8, 5)):
        domain = tiny_domain(name, TINY_DOMAINS[name])
        tiny_shards(root, domain, {"train": train_count, "val": val_count})
        (root / "domains" / f"{name}.yaml").write_text(domain.to_yaml(), encoding="utf-8")
    tiny_shards(root, tiny_domain("fields", TINY_DOMAINS["fields"]), {"unlabelled": 6}, labelled=False)
    return root


@pytest.fixture
def tiny_recipe(two_domains: Path, tmp_path: Path) -> Callable[..., Recipe]:
    """A function that makes recipes on two_domains whose runs lie under tmp_path/runs; its keyword arguments are recipe
    keys, with __ for a dot.
    """

    def make(**changes: Any) -> Recipe:
        plain: dict[str, Any] = {
            "name": "tiny",
            "runs": str(tmp_path / "runs"),
            "domains": {"fields": {"labelled": "4", "unlabelled_splits": ["unlabelled"]}, "shapes": {"labelled": "4"}},
            "data": {
                "shards": str(two_domains),
                "crop": [64, 64],
                "labelled_batch": 2,
                "unlabelled_batch": 2,
                "workers": 0,
            },
            "encoder": {"name": "test_resnet", "stride": 8, "context": "fpn", "width": 32},
            "decoder": "bilinear",
            "perturbations": {kind: {"count": 1} for kind in ("feature_noise", "feature_drop", "dropout")},
            "training": {"steps": 2, "log_every": 1, "evaluate_every": 100, "save_every": 100},
        }
        for key, value in changes.items():
            section, _, rest = key.partition("__")
            plain[section] = {**plain.get(section, {}), rest: value} if rest else value
        return recipe_from(plain, "the test's recipe")

    return make


@pytest.fixture(autouse=True)
def fresh_accelerator() -> Iterator[None]:
    """Accelerate keeps the settings of a process's first run; tests start several runs in one process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    # Before the fixtures of a session train, too.
    AcceleratorState._reset_state(reset_partial_state=True)
