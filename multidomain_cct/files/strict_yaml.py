"""YAML files as plain values: nothing executes, no key is silently replaced, and words stay words."""

from __future__ import annotations

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from multidomain_cct.errors import UserError


class StrictLoader(yaml.SafeLoader):
    """YAML without executable tags, aliases and duplicate keys; only true and false are booleans, `no` is a word."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        # A few lines of nested aliases expand to more than any memory holds.
        if self.check_event(yaml.AliasEvent):  # type: ignore[no-untyped-call]
            event = self.peek_event()  # type: ignore[no-untyped-call]
            line = event.start_mark.line + 1
            raise UserError(f"line {line}: the alias *{event.anchor} is not allowed. Write the value out.")
        node: yaml.Node | None = super().compose_node(parent, index)  # type: ignore[no-untyped-call]
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)  # type: ignore[no-untyped-call]
            line = key_node.start_mark.line + 1
            if not isinstance(key, Hashable):
                raise UserError(f"line {line}: the key {key!r} is not a word. Write a word before the colon.")
            if key in seen:
                raise UserError(f"line {line}: the key {key!r} appears twice; keep one.")
            seen.add(key)
        return super().construct_mapping(node, deep)


StrictLoader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|false|False)$"), list("tTfF"))


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises UserError, with the line, when it is not one."""
    if not path.is_file():
        raise UserError(f"{path}: there is no such file.")
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=StrictLoader)
    except (UserError, ValueError) as error:
        # ValueError: not UTF-8, or an impossible date.
        raise UserError(f"{path}: {error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f"line {mark.line + 1}: " if mark is not None else ""
        problem = getattr(error, "problem", "it holds control characters")
        raise UserError(f"{path}: {line}this is not valid YAML: {problem}.") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds {type(content).__name__}; a mapping of keys to values is expected.")
    return content
