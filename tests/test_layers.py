"""The house's rule: a file imports from its own wing, from files directly on its own floor, and from floors below."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "multidomain_cct"
FLOORS = (
    ("errors", "files"),
    ("data",),
    ("model",),
    ("methods", "evaluation", "weak"),
    ("training",),
    ("results",),
    ("commands", "testing"),
    ("__main__", "__init__"),
)
MAY_KNOW = {
    ("data/packing", "data/shards"),
    ("data/batches", "data/shards"),
    # The loop saves, stops and fails; checkpoints and processes do not know each other.
    ("training", "training/checkpoints"),
    ("training", "training/processes"),
}
"""Pairs (wing or floor, wing of the same floor) where the first may import the second."""
FILES = sorted(PACKAGE.rglob("*.py"))
NAMES = [str(path.relative_to(PACKAGE)) for path in FILES]


def imports(path: Path) -> set[str]:
    """Files and folders of the package that a file imports, as paths below the package without ending."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            found |= {node.module or ""} | {f"{node.module}.{name.name}" for name in node.names}
        elif isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
    below = {
        name.removeprefix("multidomain_cct.").replace(".", "/") for name in found if name.startswith("multidomain_cct.")
    }
    return {name for name in below if (PACKAGE / name).is_dir() or (PACKAGE / f"{name}.py").is_file()}


def floor(name: str) -> int:
    return next(number for number, rooms in enumerate(FLOORS) if name.split("/")[0] in rooms)


def wing(name: str) -> str:
    """The wing of a file or folder; of one directly on a floor of a single folder that folder, of one beside the
    floor's folders nothing.
    """
    first, *others = name.split("/")
    if (PACKAGE / f"{first}.py").is_file():
        return ""
    return f"{first}/{others[0]}" if others and (PACKAGE / first / others[0]).is_dir() else first


def directly_on_its_floor(name: str) -> bool:
    return not wing(name) or FLOORS[floor(name)] == (wing(name),)


def may_import(name: str, other: str) -> bool:
    if floor(other) != floor(name):
        return floor(other) < floor(name)
    return wing(other) == wing(name) or directly_on_its_floor(other) or (wing(name), wing(other)) in MAY_KNOW


@pytest.mark.parametrize("name", NAMES)
def test_a_file_imports_from_its_wing_its_floor_and_below(name: str) -> None:
    own = name.removesuffix(".py")
    for other in imports(PACKAGE / name):
        assert may_import(own, other), f"{name} imports {other}"


def test_the_rule_knows_floors_and_wings() -> None:
    assert may_import("data/batches/loader", "data/shards/reader")
    assert may_import("data/packing/pack", "data/domain")
    assert not may_import("data/batches/loader", "data/packing/encode")
    assert not may_import("data/packing/pack", "data/batches/order")
    assert not may_import("data/shards/reader", "data/batches/order")
    assert not may_import("data/domain", "data/shards/reader")
    assert not may_import("weak/cams", "evaluation/inference")
    assert not may_import("model/network", "training/recipe")
    assert not may_import("training/checkpoints/checkpoint", "training/processes/failures")
    assert may_import("training/loop", "training/processes/failures")
    assert may_import("files/strict_yaml", "errors")
    assert not may_import("errors", "files/seeds")


def test_shards_know_no_domain() -> None:
    for path in (PACKAGE / "data/shards").glob("*.py"):
        assert not imports(path) & {"data/domain", "data/specification"}, f"{path.name} knows a Domain"


def test_only_pack_knows_the_toys() -> None:
    for name in NAMES:
        if not name.startswith("data/toy/") and any(other.startswith("data/toy") for other in imports(PACKAGE / name)):
            assert name in ("data/packing/pack.py", "commands/pack.py")


def test_no_two_files_import_each_other() -> None:
    graph = {name.removesuffix(".py").removesuffix("/__init__"): imports(PACKAGE / name) for name in NAMES}
    finished: set[str] = set()

    def visit(module: str, above: tuple[str, ...]) -> None:
        assert module not in above, " -> ".join((*above, module))
        if module not in finished:
            for below in graph.get(module, ()):
                visit(below, (*above, module))
            finished.add(module)

    for module in graph:
        visit(module, ())


def test_the_tree_in_the_docs_is_the_package() -> None:
    shown, floors = tree_in_the_docs()
    files = [path.relative_to(PACKAGE) for path in PACKAGE.rglob("*") if path.suffix in (".py", ".jinja")]
    assert sorted(shown) == sorted(
        str(path) for path in files if path.name != "__init__.py" or path.parent == Path(".")
    )
    assert floors == {
        room: number for number, rooms in enumerate(FLOORS) for room in rooms if not room.startswith("__")
    }


def tree_in_the_docs() -> tuple[list[str], dict[str, int]]:
    """The files in the tree of docs/design.md, and the floor of each entry at its top."""
    text = re.search(
        r"^```\nmultidomain_cct/\n(.*?)^```$", (ROOT / "docs/design.md").read_text(encoding="utf-8"), flags=re.S | re.M
    )
    assert text is not None
    shown: list[str] = []
    floors: dict[str, int] = {}
    folders: list[str] = []
    for line in text[1].splitlines():
        entry = re.fullmatch(r"( +)(\S+?)(/?)(?: +(\d))?(?:  +(\S.*))?", line)
        assert entry is not None, line
        depth = len(entry[1]) // 2 - 1
        folders[depth:] = [entry[2]] if entry[3] else []
        if entry[4]:
            assert depth == 0, line
            floors[entry[2].removesuffix(".py")] = int(entry[4])
        if not entry[3]:
            assert entry[5], f"{entry[2]} has no description"
            shown.append("/".join((*folders, entry[2])))
    return shown, floors


def test_no_file_says_its_floor() -> None:
    for path in FILES:
        assert not re.search(r"\b[Ff]loor \d", path.read_text(encoding="utf-8")), (
            f"{path} says a floor's number; docs/design.md does"
        )


def test_nothing_in_the_package_can_execute_data() -> None:
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = {alias.name for alias in node.names} | {getattr(node, "module", "") or ""}
                assert not names & {"pickle", "dill", "joblib", "shelve", "marshal", "cloudpickle"}, (
                    f"{path.name} imports {names}"
                )
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                assert name not in ("eval", "exec", "compile", "__import__", "os.system", "os.popen"), (
                    f"{path.name} calls {name}"
                )
                assert not name.endswith(("load_state", "save_state")), f"{path.name} calls {name}"
                keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                assert keywords.get("shell", "False") == "False", f"{path.name} runs a shell"
                assert keywords.get("allow_pickle", "False") == "False", f"{path.name} reads pickled arrays"
                assert name not in (
                    "yaml.unsafe_load",
                    "yaml.full_load",
                    "yaml.unsafe_load_all",
                    "yaml.full_load_all",
                ), f"{path.name} calls {name}"
                if name in ("yaml.load", "yaml.load_all"):
                    assert keywords.get("Loader") == "StrictLoader", f"{path.name} reads YAML that can execute"
                if name == "torch.load":
                    assert path.name == "weights.py"
                    assert keywords.get("weights_only") == "True"
