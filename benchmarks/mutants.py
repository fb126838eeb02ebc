"""How many small faults the tests notice: cosmic-ray puts one at a time into a copy of the project, and the test files
that mirror the module run until one fails.

python benchmarks/mutants.py [MODULE ...] [--sample 13] [--seed 0] [--jobs 1] [--json]

Of each module `sample` places are drawn, and one fault for each: another operator or comparison, a number one larger
or smaller, a condition negated, a loop without iterations, a decorator or an exception's name removed. With --sample 0
every fault of every place is tried, which takes hours. Not drawn are faults that Python refuses, and those that cannot
change what correct code does: in annotations, in how parameters may be passed, in `frozen` of a dataclass, in `strict`
of a zip, in a cache. What survived is printed as a difference: it needs a test, or is equivalent to the code.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import platform
import random
import shlex
import shutil
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from datetime import date
from itertools import groupby
from multiprocessing import get_context
from pathlib import Path

from cosmic_ray.commands import init
from cosmic_ray.mutating import mutate_and_test, mutate_code
from cosmic_ray.plugins import get_operator
from cosmic_ray.testing import run_tests
from cosmic_ray.work_db import use_db
from cosmic_ray.work_item import MutationSpec, TestOutcome
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
COPIED = ("multidomain_cct", "tests", "domains", "recipes", "docs", "pyproject.toml")

# What fails need not be made small, and the same examples are tried for each fault.
PROFILE = """
from hypothesis import Phase, settings
settings.register_profile("mutants", phases=[Phase.explicit, Phase.generate], derandomize=True, database=None)
settings.load_profile("mutants")
"""

# The page of settings holds their defaults, so its test mirrors modules with settings too.
SETTINGS = "tests/test_docs.py::test_the_recipe_reference_is_current"
DAMAGE = (
    "tests/reliability/test_b10_a_damaged_newest_is_never_half_used.py"
    "::test_automatic_choice_passes_over_it_with_one_warning_and_an_explicit_one_is_an_error"
)
MODULES = {
    "model/losses": f"tests/model/test_losses.py {SETTINGS}",
    "model/perturbations": f"tests/model/test_perturbations.py {SETTINGS}",
    "model/auxiliary": "tests/model/test_auxiliary.py",
    "data/batches/views": f"tests/data/batches/test_views.py {SETTINGS}",
    "methods/views": "tests/methods/test_views.py",
    "data/batches/order": "tests/data/batches/test_order.py",
    "evaluation/scoring": "tests/evaluation/test_scoring.py",
    "training/checkpoints/checkpoint": f"tests/training/checkpoints/test_checkpoint.py {DAMAGE}",
}


@dataclass(frozen=True)
class Tested:
    """What the tests of one module noticed."""

    module: str
    mutants: int
    survivors: list[str]
    """Differences."""
    seconds: float

    @property
    def killed(self) -> int:
        return self.mutants - len(self.survivors)


def meaning(source: str) -> str | None:
    """The syntax tree as text, without what cannot change what correct code does. None if Python refuses it."""
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return None
    for node in ast.walk(tree):
        if isinstance(node, ast.arg):
            node.annotation = None
        elif isinstance(node, ast.arguments):
            node.args = [*node.posonlyargs, *node.args, *node.kwonlyargs]
            node.defaults = [*node.defaults, *filter(None, node.kw_defaults)]
            node.posonlyargs, node.kwonlyargs, node.kw_defaults = [], [], []
        elif isinstance(node, ast.FunctionDef):
            node.returns = None
            node.decorator_list = [each for each in node.decorator_list if "lru_cache" not in ast.unparse(each)]
        elif isinstance(node, ast.AnnAssign):
            node.annotation = ast.Constant(None)
        elif isinstance(node, ast.Call):
            node.keywords = [each for each in node.keywords if each.arg not in ("frozen", "strict")]
    return ast.dump(tree)


def drawn(mutants: list[MutationSpec], source: str, sample: int, rng: random.Random) -> list[MutationSpec]:
    """One mutant each of `sample` places, or all of all places if it is 0."""

    def place(mutant: MutationSpec) -> tuple[object, ...]:
        return mutant.start_pos, mutant.end_pos

    def differs(mutant: MutationSpec) -> bool:
        operator = get_operator(mutant.operator_name)(**mutant.operator_args)
        return meaning(mutate_code(source, operator, mutant.occurrence)) not in (None, original)

    original = meaning(source)
    ordered = sorted(mutants, key=lambda mutant: (*place(mutant), mutant.operator_name, mutant.occurrence))
    if not sample:
        return [mutant for mutant in ordered if differs(mutant)]
    places = [rng.sample(each, len(each)) for each in (list(group) for _, group in groupby(ordered, place))]
    rng.shuffle(places)
    found: list[MutationSpec] = []
    for candidates in places:
        found += [mutant for mutant in candidates if differs(mutant)][:1]
        if len(found) == sample:
            break
    return found


def tested(module: str, sample: int, seed: int) -> Tested:
    """Try the mutants of one module, in a copy of the project."""
    began = time.perf_counter()
    command = shlex.join([sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", *MODULES[module].split()])
    with tempfile.TemporaryDirectory() as folder:
        for name in COPIED:
            path = ROOT / name
            (shutil.copytree if path.is_dir() else shutil.copy)(path, Path(folder, name))
        os.chdir(folder)
        with Path("tests/conftest.py").open("a", encoding="utf-8") as conftest:
            conftest.write(PROFILE)
        # The copy comes before an installed package, in processes that tests start too.
        os.environ |= {
            "PYTHONPATH": os.pathsep.join([folder, *filter(None, [os.environ.get("PYTHONPATH")])]),
            "OMP_NUM_THREADS": "1",
        }
        outcome, output = run_tests(command, timeout=600)
        assert outcome == TestOutcome.SURVIVED, f"{module}: its tests fail without a fault\n{output}"
        # A fault may make a loop endless.
        timeout = 30 + 5 * (time.perf_counter() - began)
        path = Path("multidomain_cct", f"{module}.py")
        with use_db(Path(folder, "mutants.sqlite")) as work:
            init([path], work, {})
            mutants = [mutant for item in work.work_items for mutant in item.mutations]
        chosen = drawn(mutants, path.read_text(encoding="utf-8"), sample, random.Random(f"{seed} {module}"))
        survivors = []
        for mutant in chosen:
            result = mutate_and_test([mutant], command, timeout)
            assert result.test_outcome in (TestOutcome.KILLED, TestOutcome.SURVIVED), result.output
            if result.test_outcome == TestOutcome.SURVIVED:
                survivors.append("\n".join(result.diff.splitlines()[1:]))
        os.chdir(ROOT)
    return Tested(module, len(chosen), survivors, time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="*", metavar="MODULE", help=f"some of {', '.join(MODULES)}; otherwise all")
    parser.add_argument("--sample", type=int, default=13)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    modules = options.modules or list(MODULES)
    if unknown := [module for module in modules if module not in MODULES]:
        parser.error(f"{unknown[0]} has no list of tests here. Known: {', '.join(MODULES)}")
    progress, results = Console(stderr=True), []
    with ProcessPoolExecutor(options.jobs, get_context("spawn")) as pool:
        running = [pool.submit(tested, module, options.sample, options.seed) for module in modules]
        for future in running:
            results.append(future.result())
            progress.print(f"{results[-1].module}: {results[-1].killed} of {results[-1].mutants} killed")
    mutants, killed = sum(each.mutants for each in results), sum(each.killed for each in results)
    result = {
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "seed": options.seed,
        "mutants": mutants,
        "killed": killed,
        "percent": round(100 * killed / mutants, 1),
        "modules": [asdict(each) | {"seconds": round(each.seconds)} for each in results],
    }
    if options.json:
        print(json.dumps(result, indent=1))
        return
    table = Table(title=f"{killed} of {mutants} mutants killed ({result['percent']} %), seed {options.seed}")
    table.add_column("module")
    for column in ("mutants", "killed", "s"):
        table.add_column(column, justify="right")
    for each in results:
        table.add_row(each.module, str(each.mutants), str(each.killed), f"{each.seconds:.0f}")
    console = Console(soft_wrap=True)
    console.print(table)
    for each in results:
        for difference in each.survivors:
            console.print(f"\nsurvived {MODULES[each.module]}:\n{difference}", markup=False, highlight=False)


if __name__ == "__main__":
    main()
