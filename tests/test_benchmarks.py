"""Each benchmark runs with its smallest settings, and what it prints has the figures that are read from it.

None is judged here: machines differ.
"""

from __future__ import annotations

import json
import math
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
GPU_STAGES = ("truth", "speed", "learning")


def run(
    name: str, *arguments: object, path: tuple[Path, ...] = (), timeout: float = 240
) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (*path, ROOT))), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "benchmarks" / name), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment, cwd=ROOT)


def printed(name: str, *arguments: object) -> dict[str, Any]:
    """What the benchmark prints with --json; it holds a date and a machine, and no figure that is not a number."""
    finished = run(name, *arguments, "--json")
    assert finished.returncode == 0, finished.stderr
    found: dict[str, Any] = json.loads(finished.stdout)
    assert found["date"]
    assert "cores" in found["machine"]
    assert all(math.isfinite(value) for value in numbers(found))
    return found


def refusal(capsys: pytest.CaptureFixture[str], name: str, *arguments: object) -> str:
    """The last line that a benchmark prints when it ends at once; it runs in this process, which has torch already."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.syspath_prepend(ROOT / "benchmarks")
        patch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(ROOT / "benchmarks" / name), run_name="__main__")
    assert ended.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def numbers(value: Any) -> list[float]:
    """All numbers in what JSON holds."""
    if isinstance(value, dict | list):
        return [number for part in (value.values() if isinstance(value, dict) else value) for number in numbers(part)]
    return [value] if isinstance(value, int | float) else []


def test_loader_prints_rates_over_bare_decoding_and_over_a_plain_dataset_and_the_share_of_waiting() -> None:
    found = printed(
        "loader.py", "--images", 4, "--views", 8, "--size", "256x128", "--crop", 64, "--repeats", 1, "--steps", 1
    )
    assert set(found["stored"]) == {"128x64", "256x128"}
    for size, row in found["stored"].items():
        assert row["plain_images_per_s"] > 0
        for ours in ("without_masks", "half_with_masks", "with_masks"):
            for peer in ("bare", "pillow"):
                assert row[f"{ours}_over_{peer}"] == pytest.approx(
                    row[f"{ours}_images_per_s"] / row[f"{peer}_{ours}_images_per_s"]
                )
            assert row[f"{ours}_over_plain"] == pytest.approx(row[f"{ours}_images_per_s"] / row["plain_images_per_s"])
        assert 0 < row["stages_ms"]["read"] < row["stages_ms"]["views"]
        assert {"batches", "worker", "bare"} < set(row["stages_ms"])
        # Bits per pixel of photographs: an empty picture would decode far too quickly.
        width, height = map(int, size.split("x"))
        assert 2 < 8 * 1024 * row["jpeg_kb"] / (width * height) < 8
        assert all(row["masks"][which][figure] > 0 for which in ("stored", "pillow") for figure in ("ms", "kb"))
    assert 0 <= found["waiting"]["share"] <= 1
    assert found["waiting"]["images_per_s"] > 0


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--size", "12", "--size is '12'; it is WIDTHxHEIGHT in pixels, each 10 or more, for example 2048x1024."),
        ("--crop", 0, "--crop is 0; it is at least 1."),
    ],
)
def test_loader_refuses_what_cannot_be_drawn_in_one_line(
    capsys: pytest.CaptureFixture[str], option: str, value: object, message: str
) -> None:
    assert refusal(capsys, "loader.py", option, value) == f"loader.py: error: {message}"


def test_evaluate_prints_times_and_the_same_mean_iou_for_all_that_is_installed() -> None:
    found = printed("evaluate.py", "--images", 3, "--size", "96x64", "--repeats", 1)
    assert {"ours", "ours, from files"} <= set(found["rows"])
    assert 0.2 < found["miou"] < 1
    assert 0 < found["ignored"] < 0.2
    for row in found["rows"].values():
        assert row["ms_per_image"] > 0
        assert row["over_ours"] > 0
        assert abs(row["miou_of_its_counts_minus_ours"]) < 1e-9


def test_a_peer_that_cannot_be_imported_is_left_out_and_named_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "torchmetrics").mkdir()
    (tmp_path / "torchmetrics/__init__.py").write_text("raise ImportError('broken here')\n", encoding="utf-8")
    finished = run("evaluate.py", "--images", 1, "--size", "64x32", "--repeats", 1, "--json", path=(tmp_path,))
    assert finished.returncode == 0
    assert "torchmetrics is left out: broken here. Install it: pip install torchmetrics\n" in finished.stderr
    found = json.loads(finished.stdout)
    assert "torchmetrics" in found["skipped"]
    assert not any("torchmetrics" in name for name in found["rows"])


def test_resume_prints_the_first_batch_and_step_at_both_places_of_both() -> None:
    found = printed("resume.py", "--samples", 6400, "--repeats", 1, "--workers", 0)
    for name in ("ours", "plain"):
        for place in ("0 %", "99 %"):
            taken = found["first"][name][place]
            assert 0 < taken["batch_s"] < taken["step_s"]
    assert set(found["late_over_early"]) == {"ours", "plain"}
    assert set(found["plain_over_ours"]) == {"0 %", "99 %"}


def test_resume_refuses_a_run_that_is_too_short_to_have_an_end(capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        refusal(capsys, "resume.py", "--samples", 100)
        == "resume.py: error: --samples is 100; it is at least 6400, so that 99 % is another place than the end."
    )


def test_pack_prints_its_rate_beside_the_plain_loop() -> None:
    found = printed("pack.py", "--images", 4, "--workers", 1, "--repeats", 1)
    assert found["efficiency"] == pytest.approx(found["pack_images_per_s"] / found["plain_images_per_s"])


TINY_STEP = (
    "--encoder",
    "test_resnet",
    "--context",
    "none",
    "--width",
    32,
    "--crop",
    64,
    "--batch",
    1,
    "--classes",
    3,
    "--steps",
    1,
)


def test_step_prints_times_and_memory_of_each_and_their_ratios() -> None:
    found = printed("step.py", *TINY_STEP, "--decoders", 3)
    for which in ("plain", "ours", "encoder"):
        assert found[f"{which}_s"] > 0
        assert found[f"{which}_mib_peak"] >= found[f"{which}_mib_before"] > 0
    assert found["step_time"] == pytest.approx(found["ours_s"] / found["plain_s"])
    assert found["tax_time"] == pytest.approx(found["ours_s"] / found["encoder_s"])
    assert found["step_memory"] == pytest.approx(found["ours_mib_peak"] / found["plain_mib_peak"])


def test_step_takes_the_settings_that_trade_exactness_or_time_for_ours_only() -> None:
    found = printed(
        "step.py",
        *TINY_STEP,
        "--decoders",
        3,
        "--only",
        "ours",
        "--sample",
        1,
        "--consistency-stride",
        2,
        "--checkpoint",
    )
    assert found["ours_s"] > 0
    assert "plain_s" not in found
    assert "step_time" not in found


def test_step_compares_cct_with_its_strong_views() -> None:
    found = printed("step.py", *TINY_STEP, "--decoders", 3, "--only", "ours", "strong")
    assert found["strong_time"] == pytest.approx(found["strong_s"] / found["ours_s"])


def test_memory_prints_growth_with_decoders_and_domains() -> None:
    found = printed(
        "memory.py", *TINY_STEP[:-6], "--classes", 3, "--steps", 1, "--decoders", 1, 2, "--domains", 1, 2, "--images", 4
    )
    assert [row["decoders"] for row in found["by_decoders"]] == [1, 2]
    assert [row["domains"] for row in found["by_domains"]] == [1, 2]
    for rows in (found["by_decoders"], found["by_domains"]):
        assert rows[0]["time_ratio"] == rows[0]["memory_ratio"] == 1
        assert rows[1]["mib"] > 0


def test_memory_refuses_images_that_the_domains_do_not_divide() -> None:
    finished = run("memory.py", "--domains", 1, 3, "--images", 16)
    assert finished.returncode == 2
    assert "--images is 16, which twice the 3 domains do not divide." in finished.stderr


def test_encoders_writes_a_row_for_each_model_and_keeps_those_of_others(tmp_path: Path) -> None:
    page = tmp_path / "encoders.md"
    finished = run("encoders.py", "--only", "test_resnet", "--out", page)
    assert finished.returncode == 0, finished.stderr
    assert "| resnet | `test_resnet` | 0.5 M | 8 | 8 | multiples of 8 | 96x64 |  |\n" in page.read_text()
    finished = run("encoders.py", "--only", "test_vit", "--seconds", 0, "--out", page)
    assert finished.returncode == 0, finished.stderr
    assert "`test_vit` |  |  |  |  |  | no answer within 0 s |\n" in page.read_text()
    assert "1 train and predict, 0 are refused in one line, 1 took too long to be tried, and 0 fail" in page.read_text()
    assert "| `test_resnet` | 0.5 M | 8 | 8 |" in page.read_text()


def test_encoders_ends_with_1_and_shows_the_traceback_of_anything_else_than_one_line() -> None:
    broken = "import sys, encoders\ndef train_and_score(*_): raise ValueError('broken')\n"
    broken += "encoders.train_and_score = train_and_score\nsys.exit(encoders.main())"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "benchmarks"), str(ROOT)])}
    command = [sys.executable, "-c", broken, "--only", "test_resnet"]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment, cwd=ROOT)
    assert finished.returncode == 1
    assert "Traceback" in finished.stderr
    assert "| fault: ValueError: broken |" in finished.stdout


def test_encoders_refuses_a_name_that_timm_does_not_know(capsys: pytest.CaptureFixture[str]) -> None:
    message = refusal(capsys, "encoders.py", "--only", "resnet_18")
    assert message == "encoders.py: error: --only is 'resnet_18', which is no family and no model of timm."


def test_everything_for_a_gpu_is_rehearsed_on_a_cpu(tmp_path: Path) -> None:
    finished = run("gpu.py", "--rehearse", "--minutes", 15, "--out", tmp_path, timeout=900)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    truth, speed, learning = (json.loads((tmp_path / f"{name}.json").read_text()) for name in GPU_STAGES)
    assert [stage["code"] for stage in (truth, speed, learning)] == [0, 0, 0]
    assert " passed" in truth["last_lines"][-1]
    assert "skipped" not in truth["last_lines"][-1]
    measured = [row for row in speed["rows"] if "step_s" in row]
    assert {row["which"] for row in measured} == {"ours", "encoder", "plain", "strong"}
    assert {row["precision"] for row in measured} == {"bf16", "fp16", "tf32", "fp32"}
    counted = [row for row in measured if "dearest" in row]
    assert all(row["operations"] > 0 and len(row["dearest"]) == 10 for row in counted) and counted
    assert set(learning["latest"]) == {
        f"{row}-seed0" for row in ("cct_strong", "supervised", "plain_cct", "all_labels")
    }
    assert all(0 <= facts["val/mean_miou"] <= 1 for facts in learning["latest"].values())


def test_a_stage_that_has_no_time_left_is_cut_off_and_keeps_what_it_has(tmp_path: Path) -> None:
    finished = run("gpu.py", "--rehearse", "--minutes", 0.26, "--only", "speed", "--out", tmp_path)
    found = json.loads((tmp_path / "speed.json").read_text())
    assert found["cut_off"]
    assert "speed: cut off after" in finished.stdout


def test_a_folder_without_wheels_is_named(tmp_path: Path) -> None:
    finished = run("gpu.py", "--rehearse", "--wheels", tmp_path, "--out", tmp_path / "out")
    assert finished.returncode == 1
    assert "holds no .whl files. Make it: benchmarks/pack_for_gpu.sh" in finished.stderr
