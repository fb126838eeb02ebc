"""B24: no file of a run can execute; tests/test_layers.py holds the lint of the package's syntax tree."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from multidomain_cct.__main__ import main


class Payload:
    """Unpickled, it makes a folder."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.canary),)


def forge(manifest: Path, changed: Path) -> None:
    """Make the manifest vouch for a changed file, as somebody would who means harm."""
    text = manifest.read_text()
    plain = json.loads(text)
    size, digest = changed.stat().st_size, hashlib.sha256(changed.read_bytes()).hexdigest()

    def renewed(value: object, key: str = "") -> object:
        if isinstance(value, dict):
            return {
                name: renewed(item, str(name) if str(name) == changed.name else key) for name, item in value.items()
            }
        if key == changed.name:
            return size if isinstance(value, int) else digest
        return value

    manifest.write_text(json.dumps(renewed(plain)))
    assert digest in manifest.read_text()


def test_b24_a_pickle_in_place_of_any_file_of_a_run_is_refused_and_does_nothing(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], record_property: Callable[[str, object], None]
) -> None:
    canary, tried, forged = tmp_path / "canary", 0, 0
    names = sorted(
        str(path.relative_to(tiny_run))
        for path in tiny_run.rglob("*")
        if path.is_file() and path.suffix in (".yaml", ".safetensors", ".json")
    )
    checkpoint = max(path for path in (tiny_run / "checkpoints").iterdir() if path.is_dir())
    names += [
        str(path.relative_to(tiny_run)) for path in checkpoint.iterdir() if str(path.relative_to(tiny_run)) not in names
    ]
    assert any(name.endswith(".safetensors") for name in names)
    for name in names:
        for vouched in (False, True):
            run = tmp_path / "run"
            shutil.rmtree(run, ignore_errors=True)
            shutil.copytree(tiny_run, run)
            (run / name).write_bytes(pickle.dumps(Payload(canary)))
            manifest = next((run / name).parent.glob("MANIFEST*"), None)
            if vouched and (manifest is None or manifest == run / name):
                continue
            if vouched and manifest is not None:
                forge(manifest, run / name)
            code = main(["evaluate", str(run), "--domain", "fields"])
            assert code in (0, 1, 2), name
            assert "Traceback" not in capsys.readouterr().err, name
            assert not canary.exists(), name
            # The optimiser and the environment are of no use to an evaluation; whatever it reads, it refuses.
            assert (
                code == 2 or Path(name).name in ("optimiser.safetensors", "env.json") or checkpoint.name not in name
            ), name
            tried += 1
            forged += vouched
    record_property("B24", f"{tried} files replaced by pickles, {forged} of them vouched for by the manifest: canary 0")
