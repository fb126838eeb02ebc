import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from processes import start
from run_files import steps_of

from multidomain_cct.__main__ import main
from multidomain_cct.errors import UserError
from multidomain_cct.training.checkpoints.checkpoint import choose_checkpoint, damage, newest_checkpoint

FILES = ("model.safetensors", "optimiser.safetensors", "state.json", "MANIFEST.json")


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 0x01
    path.write_bytes(content)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "flipped": lambda path: flip(path, path.stat().st_size // 2),
    "deleted": lambda path: path.unlink(),
    "emptied": lambda path: path.write_bytes(b""),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize("file", FILES)
def test_automatic_choice_passes_over_it_with_one_warning_and_an_explicit_one_is_an_error(
    tiny_run: Path, tmp_path: Path, file: str, kind: str
) -> None:
    run = shutil.copytree(tiny_run, tmp_path / "run")
    before, newest = [run / "checkpoints" / f"step-{step:08d}" for step in steps_of(run)][-2:]
    DAMAGE[kind](newest / file)
    found, warnings = newest_checkpoint(run / "checkpoints")
    assert found == before
    assert len(warnings) == 1
    assert warnings[0].startswith(f"{newest} is damaged (")
    assert file in warnings[0]
    for which in ("last", str(newest)):
        with pytest.raises(UserError, match=f"{newest.name} is damaged .*{file}.*Choose another with --checkpoint"):
            choose_checkpoint(run, which)


def test_every_byte_of_the_state_and_of_the_manifest_is_guarded(
    tiny_run: Path, tmp_path: Path, figure: Callable[[str, str], None]
) -> None:
    run = shutil.copytree(tiny_run, tmp_path / "run")
    newest = run / "checkpoints" / f"step-{steps_of(run)[-1]:08d}"
    flips = 0
    for file in ("state.json", "MANIFEST.json"):
        whole = (newest / file).read_bytes()
        # The state is long, and its sum is made of all of it: every 50th of its bytes will do.
        for place in range(0, len(whole), 50 if file == "state.json" else 1):
            flip(newest / file, place)
            assert damage(newest) is not None, f"byte {place} of {file}"
            (newest / file).write_bytes(whole)
            flips += 1
    assert damage(newest) is None
    figure("B10", f"{len(FILES) * len(DAMAGE)} kinds of damage and {flips} flipped bytes seen, 0 mixtures")


def test_when_none_is_whole_nothing_is_used(
    command: Callable[..., list[str]], tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(tiny_run, tmp_path / "run")
    for step in steps_of(run):
        (run / "checkpoints" / f"step-{step:08d}" / "state.json").write_text("{}")
    with pytest.raises(UserError, match="no checkpoint is whole"):
        newest_checkpoint(run / "checkpoints")
    assert main(["evaluate", str(run)]) == 2
    assert "is damaged (state.json has 2 bytes" in capsys.readouterr().err


def test_a_run_goes_on_from_the_one_before(command: Callable[..., list[str]], tmp_path: Path) -> None:
    words = command("run", "training.steps=4", "training.save_every=2", "resume=auto")
    first = start(words, tmp_path / "first.txt")
    assert first.wait() == 0, first.text
    checkpoint = tmp_path / "runs" / "run" / "checkpoints" / "step-00000004"
    whole = (checkpoint / "model.safetensors").read_bytes()
    (checkpoint / "optimiser.safetensors").write_bytes(b"")
    again = start(words, tmp_path / "again.txt")
    assert again.wait() == 0, again.text
    assert again.text.count("is damaged") == 1
    assert "going on from step 2" in again.text
    assert (checkpoint / "model.safetensors").read_bytes() == whole
    assert damage(checkpoint) is None
