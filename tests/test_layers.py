"""The house's rule: a file imports only from floors below and from its own floor."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "multidomain_cct"
FLOORS = ("data", "model", "methods", "training", "results", "commands", "__main__")
FILES = sorted(PACKAGE.rglob("*.py"))


def imports(path: Path) -> set[str]:
    """Modules of the package that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            found.add(node.module or "")
        elif isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
    return {name for name in found if name.startswith("multidomain_cct.")}


def floor(module: str) -> int:
    return FLOORS.index(module.split(".")[1])


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(PACKAGE)) for path in FILES])
def test_a_file_imports_from_its_floor_and_below(path: Path) -> None:
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if own == "__init__":
        assert not imports(path)
        return
    for module in imports(path):
        assert floor(module) <= FLOORS.index(own), f"{path.name} is on the floor {own} and imports {module}"


def test_no_two_files_import_each_other() -> None:
    graph = {".".join(("multidomain_cct", *path.relative_to(PACKAGE).with_suffix("").parts)): imports(path) for path in FILES}
    finished: set[str] = set()

    def visit(module: str, above: tuple[str, ...]) -> None:
        assert module not in above, " -> ".join((*above, module))
        if module not in finished:
            for below in graph.get(module, ()):
                visit(below, (*above, module))
            finished.add(module)

    for module in graph:
        visit(module, ())


def test_nothing_in_the_package_can_execute_data() -> None:
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = {alias.name for alias in node.names} | {getattr(node, "module", "") or ""}
                assert not names & {"pickle", "dill", "joblib", "shelve", "marshal", "cloudpickle"}, f"{path.name} imports {names}"
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                assert name not in ("eval", "exec", "compile", "__import__", "os.system", "os.popen"), f"{path.name} calls {name}"
                assert not name.endswith(("load_state", "save_state")), f"{path.name} calls {name}"
                keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                assert keywords.get("shell", "False") == "False", f"{path.name} runs a shell"
                assert keywords.get("allow_pickle", "False") == "False", f"{path.name} reads pickled arrays"
                assert name not in ("yaml.unsafe_load", "yaml.full_load", "yaml.unsafe_load_all", "yaml.full_load_all"), f"{path.name} calls {name}"
                if name in ("yaml.load", "yaml.load_all"):
                    assert keywords.get("Loader") == "StrictLoader", f"{path.name} reads YAML that can execute"
                if name == "torch.load":
                    assert path.name == "weights.py" and keywords.get("weights_only") == "True"
