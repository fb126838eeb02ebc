"""The folder-layout domains on real photographs: MDCCT_DATA, or ../shared/data beside the clone."""

import os
from pathlib import Path

import numpy as np
import pytest

from multidomain_cct.data.batches.loader import TrainingSet
from multidomain_cct.data.batches.streams import open_streams
from multidomain_cct.data.batches.views import decode
from multidomain_cct.data.packing.pack import pack
from multidomain_cct.data.shards.reader import Shards
from multidomain_cct.data.specification import domain_folders, find_domain
from multidomain_cct.training.recipe import read_recipe

ROOT = Path(__file__).parents[1]
DATA = Path(os.environ.get("MDCCT_DATA", ROOT.parent / "shared" / "data"))
FOLDERS = {"camvid_small": "camvid", "labelmefacade": "labelmefacade", "ccp": "ccp"}
COUNTS = {
    "camvid_small": {"train": 367, "val": 101},
    "labelmefacade": {"train": 100, "unlabelled": 445, "val": 100},
    "ccp": {"train": 300, "unlabelled": 600, "val": 100},
}
pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason=f"no real images at {DATA}; set MDCCT_DATA")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All three domains, packed."""
    out = tmp_path_factory.mktemp("real")
    for name, folder in FOLDERS.items():
        domain = find_domain(name, domain_folders([ROOT / "domains"]))
        for split, count in COUNTS[name].items():
            summary = pack(domain, DATA / folder, split, out, workers=1)
            assert summary.images == count
            assert summary.labelled == (0 if split == "unlabelled" else count)
            assert not summary.unknown, f"{name}/{split} holds ids that its table does not name"
            assert not summary.labelled or (summary.pixels[: domain.num_classes] > 0).all()
    return out


def test_every_image_is_in_the_shards_with_its_mask(shards: Path) -> None:
    for name, splits in COUNTS.items():
        domain = find_domain(name, domain_folders([ROOT / "domains"]))
        for split, count in splits.items():
            opened = Shards.open(shards / name, split)
            assert len(opened) == count
            image, mask = decode(opened.read(0), domain)
            assert max(image.size) == 320
            assert (mask is None) == (split == "unlabelled")
            assert mask is None or mask.size == image.size


def test_three_real_domains_make_batches_from_yaml_alone(shards: Path) -> None:
    overrides = [
        f"data.shards={shards}",
        "domains.ccp.unlabelled_splits=[unlabelled]",
        *(f"domains.{name}.labelled=50" for name in COUNTS),
    ]
    recipe = read_recipe(ROOT / "recipes" / "real_small.yaml", overrides)
    folders = domain_folders([ROOT / "domains"])
    streams = [open_streams(find_domain(name, folders), choice, recipe.data) for name, choice in recipe.domains.items()]
    assert [(len(s.labelled), len(s.unlabelled)) for s in streams] == [(50, 317), (50, 50 + 445), (50, 250 + 600)]
    batches = TrainingSet(streams, seed=0, augment=recipe.data.augment)[3]
    assert isinstance(batches, dict)
    assert list(batches) == ["camvid_small", "labelmefacade", "ccp"]
    for stream in streams:
        batch = batches[stream.domain.name]
        assert batch.images.shape == batch.unlabelled.shape == (4, 3, 128, 128)
        ids = np.unique(batch.masks.numpy())
        assert set(ids) <= {*range(stream.domain.num_classes), 255}
        assert len(ids) > 2
