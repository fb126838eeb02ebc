"""benchmarks/mutants.py on one module, and which faults it draws."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from cosmic_ray.commands import init
from cosmic_ray.work_db import use_db

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks" / "mutants.py"


@pytest.fixture(scope="module")
def mutants() -> ModuleType:
    spec = importlib.util.spec_from_file_location("mutants", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["mutants"] = module
    spec.loader.exec_module(module)
    return module


def test_a_fault_of_one_module_is_noticed_and_the_source_stays() -> None:
    source = ROOT / "multidomain_cct/data/batches/order.py"
    before = source.read_bytes()
    command = [sys.executable, str(SCRIPT), "data/batches/order", "--sample", "1", "--json"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    finished = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment, cwd=ROOT)
    assert finished.returncode == 0, finished.stderr
    printed = json.loads(finished.stdout)
    assert printed["date"]
    assert "cores" in printed["machine"]
    assert (printed["mutants"], printed["killed"], printed["percent"]) == (1, 1, 100)
    (module,) = printed["modules"]
    assert (module["module"], module["survivors"]) == ("data/batches/order", [])
    assert source.read_bytes() == before


def test_an_unknown_module_is_answered_with_the_known_ones() -> None:
    finished = subprocess.run([sys.executable, str(SCRIPT), "model/loss"], capture_output=True, text=True, cwd=ROOT)
    assert finished.returncode == 2
    assert "model/loss has no list of tests here. Known: model/losses" in finished.stderr


def test_every_module_and_every_test_file_exists(mutants: ModuleType) -> None:
    for module, tests in mutants.MODULES.items():
        assert (ROOT / "multidomain_cct" / f"{module}.py").is_file()
        for test in tests.split():
            file, _, name = test.partition("::")
            assert f"def {name}" in (ROOT / file).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("code", "other", "same"),
    [
        ("def f(a: int | None) -> int: ...", "def f(a: int + None) -> str: ...", True),
        ("a: int = 1", "a: float = 1", True),
        ("def f(a, *, b=1, c): ...", "def f(a, /, b=1, *, c): ...", True),
        ("def f(a, *, b=1): ...", "def f(a, *, b=2): ...", False),
        ("@dataclass(frozen=True)\nclass A: ...", "@dataclass(frozen=False)\nclass A: ...", True),
        ("zip(a, b, strict=True)", "zip(a, b, strict=False)", True),
        ("@lru_cache(maxsize=4)\ndef f(): ...", "def f(): ...", True),
        ("@property\ndef f(): ...", "def f(): ...", False),
        ("a: int = 1", "a: int = 2", False),
        ("zip(a, b, strict=True)", "zip(a, c, strict=True)", False),
        ("a < b", "a <= b", False),
    ],
)
def test_what_cannot_change_correct_code_has_the_same_meaning(
    mutants: ModuleType, code: str, other: str, same: bool
) -> None:
    assert (mutants.meaning(code) == mutants.meaning(other)) == same


def test_each_place_is_drawn_once_and_the_seed_decides(mutants: ModuleType, tmp_path: Path) -> None:
    source = "def f(a: int | None, *, b: int = 3) -> int | None:\n    return a + 1 if b < 2 else -b\n"
    (tmp_path / "f.py").write_text(source)
    with use_db(tmp_path / "work.sqlite") as work:
        init([tmp_path / "f.py"], work, {})
        found = [mutation for item in work.work_items for mutation in item.mutations]

    def places(sample: int, seed: int) -> list[tuple[int, ...]]:
        return [mutant.start_pos for mutant in mutants.drawn(found, source, sample, random.Random(seed))]

    first, second = source.splitlines()
    # Neither the annotations nor the star.
    assert {place for place in places(0, 0) if place[0] == 1} == {(1, first.index("3"))}
    assert {(2, second.index(sign)) for sign in ("+", "1", "<", "2", "-")} < set(places(0, 0))
    assert len(places(0, 0)) > len(set(places(0, 0)))
    assert len(places(4, 0)) == len(set(places(4, 0))) == 4
    assert places(4, 0) == places(4, 0)
    assert len({tuple(places(4, seed)) for seed in range(5)}) > 1
