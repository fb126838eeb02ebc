import importlib.util
import re
from pathlib import Path

import pytest

from multidomain_cct.__main__ import build_parser

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_the_recipe_reference_is_current() -> None:
    spec = importlib.util.spec_from_file_location("recipe_reference", ROOT / "docs" / "recipe_reference.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.PAGE.read_text(encoding="utf-8") == module.page(), "run `make docs`"


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_every_command_is_in_the_readme_and_on_its_page() -> None:
    _, commands = build_parser()
    for page in (ROOT / "README.md", ROOT / "docs" / "commands.md"):
        text = page.read_text(encoding="utf-8")
        for command in set(commands) - {"train"}:
            assert f"multidomain_cct {command}" in text, f"{page.name} does not show {command}"


def test_the_readme_opens_with_the_demo_and_the_tests() -> None:
    commands = re.findall(r"^make \w+", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.M)
    assert commands[:2] == ["make demo", "make test"]
