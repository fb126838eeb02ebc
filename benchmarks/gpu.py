"""Everything that a CUDA card changes, proved and measured in one go, without a network.

python benchmarks/gpu.py [--minutes 9] [--out results/gpu] [--only truth|speed|learning] [--wheels DIR] [--rehearse]

- truth: pytest -m gpu. At most 90 s.
- speed: benchmarks/gpu_speed.py, row by row. At most 150 s.
- learning: recipes/experiments/gpu_furniture.yaml with what is left of the time. The same command goes on with it.

Each stage is a process with a time limit of its own. It writes OUT/STAGE.json and prints a line as soon as it ends;
what it printed is in OUT/STAGE.log. --wheels installs the packages of a folder into OUT/packages, for these processes
only.
--rehearse runs all of it in miniature on a CPU. The exit code is 1 when a stage found a fault.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SECONDS = {"truth": 90.0, "speed": 150.0}
GRACE = 15
"""Seconds that a stage has to save once its time is over."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9.0, help="time for all stages together")
    parser.add_argument("--out", type=Path, default=Path("results/gpu"))
    parser.add_argument("--only", choices=(*SECONDS, "learning"))
    parser.add_argument("--wheels", type=Path, help="folder of packages to install first")
    parser.add_argument("--rehearse", action="store_true", help="in miniature, on a CPU")
    return parser.parse_args()


@dataclass(frozen=True)
class Stage:
    """One stage of one run of this program."""

    name: str
    out: Path
    rehearse: bool
    seconds: float

    def commands(self) -> list[list[str]]:
        python, device = sys.executable, "cpu" if self.rehearse else "cuda"
        if self.name == "truth":
            # Other versions of packages than those of the project's own tests may warn.
            report = f"--junitxml={self.out / 'truth.xml'}"
            words = [
                "-m",
                "pytest",
                "-m",
                "gpu",
                "--device",
                device,
                "-o",
                "filterwarnings=default",
                report,
                "tests/gpu",
            ]
            return [[python, *words]]
        if self.name == "speed":
            words = ["benchmarks/gpu_speed.py", "--out", str(self.out), "--seconds", str(self.seconds - 10)]
            return [[python, *words, "--device", device, *(["--rehearse"] if self.rehearse else [])]]
        experiment, prepare = ROOT / "recipes/experiments/gpu_furniture.yaml", []
        if self.rehearse:
            prepare = [[python, "benchmarks/gpu_rehearsal.py", str(experiment), str(self.out)]]
            experiment = self.out / experiment.name
        # Loader processes take the cores; a card has room for all rows.
        jobs = 2 if self.rehearse else max(1, min(4, (os.cpu_count() or 1) // 4))
        words = ["compare", str(experiment), "--jobs", str(jobs), "--out", str(self.out / "learning_scores.md")]
        return [*prepare, [python, "-m", "multidomain_cct", *words]]

    def run(self, environment: dict[str, str]) -> dict[str, Any]:
        """Run the commands, write the stage's JSON, and return it."""
        started, codes = time.monotonic(), []
        with (self.out / f"{self.name}.log").open("wb") as log:
            for command in self.commands():
                left = self.seconds - (time.monotonic() - started)
                codes.append(_run(command, environment, log, left))
                if codes[-1] != 0:
                    break
        result = {
            "stage": self.name,
            "rehearsal": self.rehearse,
            "seconds": round(time.monotonic() - started, 1),
            "limit_s": round(self.seconds, 1),
            "cut_off": codes[-1] is None,
            "code": codes[-1],
        } | self.found()
        (self.out / f"{self.name}.json").write_text(json.dumps(result, indent=1), encoding="utf-8")
        return result

    def found(self) -> dict[str, Any]:
        """What the stage has found, also when it was cut off."""
        if self.name == "truth":
            tail = (self.out / "truth.log").read_text(errors="replace").splitlines()[-12:]
            return {"last_lines": tail}
        if self.name == "speed":
            rows = self.out / "speed_rows.jsonl"
            return {"rows": [json.loads(line) for line in rows.read_text().splitlines()] if rows.is_file() else []}
        scores = self.out / "learning_scores.json"
        return {"latest": self.latest(), "comparison": json.loads(scores.read_text()) if scores.is_file() else None}

    def latest(self) -> dict[str, dict[str, float]]:
        """By run: its newest step, score and images per second. Runs that were cut off have some too."""
        found = {}
        folder = (self.out if self.rehearse else ROOT) / "runs" / "gpu_furniture"
        for metrics in sorted(folder.glob("*/metrics.jsonl")):
            facts: dict[str, float] = {}
            for line in metrics.read_text().splitlines():
                wanted = ("step", "val/mean_miou", "sys/images_per_s", "sys/peak_mib", "sys/data_wait_fraction")
                facts |= {key: value for key, value in json.loads(line).items() if key in wanted}
            found[metrics.parent.name] = facts
        return found

    def line(self, result: dict[str, Any]) -> str:
        ended = "cut off" if result["cut_off"] else f"exit code {result['code']}"
        if self.name == "truth":
            what = next((line for line in reversed(result["last_lines"]) if " in " in line or "failed" in line), "")
        elif self.name == "speed":
            failed = sum("error" in row for row in result["rows"])
            what = f"{len(result['rows'])} rows, {failed} of them failed"
        else:
            what = ", ".join(f"{name} {facts.get('val/mean_miou')}" for name, facts in result["latest"].items())
        return f"{self.name}: {ended} after {result['seconds']:.0f} s. {what}"


def _run(command: Sequence[str], environment: dict[str, str], log: Any, seconds: float) -> int | None:
    """The exit code, or None when the time was over; then everything that the command started is ended."""
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        return process.wait(timeout=max(1.0, seconds))
    except subprocess.TimeoutExpired:
        pass
    finally:
        # Trainings save on SIGTERM and go on when the stage is repeated.
        for number, wait in ((signal.SIGTERM, GRACE), (signal.SIGKILL, 1)):
            if process.poll() is None:
                os.killpg(process.pid, number)
                try:
                    process.wait(timeout=wait)
                except subprocess.TimeoutExpired:
                    continue
    return None


def install(wheels: Path, target: Path) -> None:
    """Without dependencies: the folder has what is missing, and torch must stay as it is."""
    shutil.rmtree(target, ignore_errors=True)
    files = [str(path) for path in sorted(wheels.resolve().glob("*.whl"))]
    if not files:
        raise SystemExit(f"--wheels is {wheels}, which holds no .whl files. Make it: benchmarks/pack_for_gpu.sh DIR")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", str(target)]
    subprocess.run([*pip, *files], check=True)


def main() -> int:
    options, started = arguments(), time.monotonic()
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    if options.wheels:
        install(options.wheels, out / "packages")
    path = [str(out / "packages"), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path), "PYTHONUNBUFFERED": "1"}
    faults = 0
    for name in [options.only] if options.only else [*SECONDS, "learning"]:
        left = 60 * options.minutes - (time.monotonic() - started) - GRACE
        stage = Stage(name, out, options.rehearse, min(left, SECONDS.get(name, left)))
        result = stage.run(environment)
        print(stage.line(result), flush=True)
        # Learning goes on another time, and the rows of speed that are missing are the least wanted.
        faults += result["code"] not in (0, None) or (name == "truth" and result["cut_off"])
        faults += any("error" in row for row in result.get("rows", []))
    print(f"written to {options.out}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
