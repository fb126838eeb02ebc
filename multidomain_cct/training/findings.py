"""What is found out about a recipe before it is trained."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from multidomain_cct.errors import UserError


@dataclass(frozen=True)
class Finding:
    """Something to know about a recipe before it is trained."""

    severity: Literal["error", "warning", "notice"]
    """An error stops the training; a warning is a likely mistake; a notice says what the run leaves out."""
    key: str
    """The setting or section that it is about."""
    message: str
    """One line: what was found, and what to do."""


def error(key: str, text: str) -> Finding:
    return Finding("error", key, f"{key} {text}")


def warning(key: str, text: str) -> Finding:
    return Finding("warning", key, f"{key} {text}")


def notice(key: str, text: str) -> Finding:
    return Finding("notice", key, f"{key} {text}")


@contextmanager
def noted(findings: list[Finding], key: str, hint: str = "") -> Iterator[None]:
    """A UserError becomes a finding; the hint follows its message."""
    try:
        yield
    except UserError as mistake:
        findings.append(Finding("error", key, f"{mistake}{hint}"))


def fails(findings: Iterable[Finding]) -> bool:
    return any(finding.severity == "error" for finding in findings)


def require(findings: Iterable[Finding]) -> list[Finding]:
    """The warnings and notices. Raises UserError with the first error."""
    findings = list(findings)
    if errors := [finding.message for finding in findings if finding.severity == "error"]:
        raise UserError(errors[0])
    return findings
