"""The Python interface: no torch at import, and docs/python.md as it is printed."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

import multidomain_cct
from multidomain_cct.data.domain import Domain

PAGE = Path(__file__).parents[1] / "docs" / "python.md"
RECIPE = """
domains: {garden: {labelled: 2}}
data: {crop: [64, 64], labelled_batch: 2, unlabelled_batch: 2, workers: 0}
encoder: {name: test_resnet, stride: 8, context: none, width: 32}
decoder: bilinear
perturbations: {dropout: {count: 1}}
training: {steps: 2}
"""


@pytest.fixture
def garden(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tiny_domain: Callable[..., Domain],
    tiny_shards: Callable[..., Path],
) -> Path:
    """A working directory with a recipe, its domain with shards, and a photograph."""
    domain = tiny_domain("garden", ("grass", "cat"))
    for folder in ("recipes", "domains"):
        (tmp_path / folder).mkdir()
    (tmp_path / "recipes/garden.yaml").write_text(RECIPE, encoding="utf-8")
    (tmp_path / "domains/garden.yaml").write_text(domain.to_yaml(), encoding="utf-8")
    tiny_shards(tmp_path / "data/shards", domain)
    Image.new("RGB", (80, 60), (40, 160, 60)).save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_importing_the_package_imports_no_torch() -> None:
    code = (
        "import sys, multidomain_cct as m; m.load_domain('cityscapes'); assert set(m.__all__) == set(dir(m)); "
        "assert 'torch' not in sys.modules, 'torch'; assert 'accelerate' not in sys.modules, 'accelerate'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_the_blocks_of_the_page_run_one_after_the_other(garden: Path, capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), flags=re.S | re.M)
    assert len(blocks) > 3
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block.replace("steps=10", "steps=2"), PAGE.name, "exec"), names)
    assert names["folder"] == Path("runs/garden")
    with Image.open(garden / "overlay.png") as overlay:
        assert overlay.size == (80, 60)
    assert capsys.readouterr().out.strip().endswith('Did you mean "garden"?')


def test_train_finds_the_domains_beside_the_recipe(garden: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (garden / "elsewhere").mkdir()
    monkeypatch.chdir(garden / "elsewhere")
    recipe = multidomain_cct.load_recipe("../recipes/garden.yaml", ["data.shards=../data/shards", "training.steps=1"])
    assert multidomain_cct.train(recipe) == Path("runs/garden")


def test_a_domain_is_loaded_by_its_name_or_its_file(garden: Path) -> None:
    assert multidomain_cct.load_domain("garden") == multidomain_cct.load_domain(garden / "domains/garden.yaml")
    with pytest.raises(multidomain_cct.UserError, match="Did you mean"):
        multidomain_cct.load_domain("gardn")
    with pytest.raises(multidomain_cct.UserError, match="absent"):
        multidomain_cct.load_domain(garden / "domains/absent.yaml")
