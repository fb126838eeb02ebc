"""Writes docs/recipe.md from the settings dataclasses.

Run it with `make docs`; tests/test_docs.py checks that the page is current.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from multidomain_cct.training.recipe import Recipe

PAGE = Path(__file__).with_name("recipe.md")
INTRODUCTION = """# Recipe reference

A recipe is one YAML file; every setting can also be given on the command line as a dotted `key=value`. What is left
out has the default below. Unknown keys are refused, with the nearest known one. This page is generated from the code by
`make docs`.
"""


def field_docstrings(kind: type) -> dict[str, str]:
    """The string that follows each field in the source of the class or of those it extends, in one line."""
    found = {}
    for each in reversed(kind.__mro__[:-1]):
        found |= _own_docstrings(each)
    return found


def _own_docstrings(kind: type) -> dict[str, str]:
    body = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0]
    assert isinstance(body, ast.ClassDef)
    found = {}
    for statement, following in zip(body.body, body.body[1:], strict=False):
        if (
            isinstance(statement, ast.AnnAssign)
            and isinstance(following, ast.Expr)
            and isinstance(following.value, ast.Constant)
        ):
            assert isinstance(statement.target, ast.Name)
            found[statement.target.id] = " ".join(str(following.value.value).split())
    return found


def default_of(field: Field[Any]) -> str:
    """The default as YAML."""
    value = field.default_factory() if field.default_factory is not MISSING else field.default
    if value is None:
        return "none"
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value).lower() if isinstance(value, bool) else repr(value) if value in ("", [], {}) else str(value)


def type_name(hint: Any) -> str:
    """A type as a reader of YAML would name it."""
    words = {int: "integer", float: "number", str: "text", bool: "true or false"}
    if hint in words:
        return words[hint]
    if get_origin(hint) is list:
        return f"list of {type_name(get_args(hint)[0])}s"
    return " or ".join(type_name(part) for part in get_args(hint) if part is not type(None))


def section(kind: type, path: str) -> list[str]:
    """The Markdown of one section and of those below it."""
    hints, documented = get_type_hints(kind), field_docstrings(kind)
    first_line = (kind.__doc__ or "").split("\n")[0]
    lines = [f"\n## {path or 'Top level'}\n", f"{first_line}\n", "| key | type | default | |", "|---|---|---|---|"]
    below: list[str] = []
    for field in (each for each in fields(kind) if each.compare):
        hint = hints[field.name]
        full = f"{path}.{field.name}" if path else field.name
        entry = get_args(hint)[1] if get_origin(hint) is dict else hint
        general = next((part for part in get_args(hint) if is_dataclass(part)), None) if entry is hint else None
        if general is not None:
            # A domain's own section has the keys of the recipe's.
            lines.append(
                f"| `{field.name}` | section | | {documented[field.name]} See [{field.name}](#{field.name}). |"
            )
        elif is_dataclass(entry):
            inner = f"{full}.NAME" if entry is not hint else full
            lines.append(
                f"| `{field.name}` | section | | {documented[field.name]} See "
                f"[{inner}](#{inner.lower().replace('.', '')}). |"
            )
            below += section(entry, inner)
        else:
            lines.append(
                f"| `{field.name}` | {type_name(hint)} | `{default_of(field)}` | "
                f"{documented[field.name].replace('|', '&#124;')} |"
            )
    return lines + below


def page() -> str:
    """The whole page."""
    return INTRODUCTION + "\n".join(section(Recipe, "")) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
