"""The code of docs/export.md does what the run does: in Python, and in a browser."""

from __future__ import annotations

import http.server
import os
import queue
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from multidomain_cct.results.export import export
from multidomain_cct.results.trained_run import Prediction, TrainedRun

ROOT = Path(__file__).parents[2]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
ORT = ROOT / "node_modules" / "onnxruntime-web"

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture(scope="module")
def folder(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """garden.onnx, garden.pt2 and photo.png, the names that the page uses."""
    folder = tmp_path_factory.mktemp("page")
    run = TrainedRun.load(tiny_run, device=torch.device("cpu"))
    for ending in ("onnx", "pt2"):
        export(run, "fields", folder / f"garden.{ending}")
    coarse = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize((331, 250), Image.Resampling.BICUBIC).save(folder / "photo.png")
    return folder


@pytest.fixture(scope="module")
def wanted(tiny_run: Path, folder: Path) -> Prediction:
    return TrainedRun.load(tiny_run, device=torch.device("cpu")).predict(folder / "photo.png", "fields")


def blocks(language: str) -> list[str]:
    page = (ROOT / "docs/export.md").read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", page, flags=re.M | re.S)


def test_the_pages_python_gives_the_classes_of_predict(
    folder: Path, wanted: Prediction, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    for number, block in enumerate(blocks("python")):
        names: dict[str, object] = {}
        exec(block.replace('"garden"]', '"fields"]'), names)
        ids = np.asarray(names["ids"]).reshape(wanted.ids.shape)
        assert (ids == wanted.ids).mean() >= 0.999, f"block {number}"
    assert (np.asarray(Image.open("classes.png")) == np.asarray(wanted.colored().convert("RGB"))).mean() >= 0.999


class _Handler(http.server.SimpleHTTPRequestHandler):
    """Serves a folder, and keeps what the page sends back."""

    answers: queue.Queue[bytes] = queue.Queue()

    def do_POST(self) -> None:
        self.answers.put(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(204)
        self.end_headers()

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def address(folder: Path) -> Iterator[str]:
    (folder / "onnxruntime-web").symlink_to(ORT)
    script = blocks("js")[0] + '\nawait fetch("ids", {method: "POST", body: ids.data});\n'
    failed = (
        'window.addEventListener("unhandledrejection", e => fetch("error", {method: "POST", body: `${e.reason}`}));'
    )
    (folder / "index.html").write_text(f'<script>{failed}</script><script type="module" src="page.js"></script>')
    (folder / "page.js").write_text(script)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/index.html"
    server.shutdown()
    server.server_close()


@pytest.mark.skipif(CHROMIUM is None or not ORT.is_dir(), reason="needs chromium and `make browser`")
def test_the_pages_javascript_gives_the_classes_of_predict_in_chromium(
    address: str, wanted: Prediction, tmp_path: Path
) -> None:
    options = ("--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}")
    environment = os.environ | {"HOME": str(tmp_path)}
    with subprocess.Popen(
        [str(CHROMIUM), *options, address], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as browser:
        try:
            answer = _Handler.answers.get(timeout=120)
        finally:
            browser.terminate()
    assert len(answer) == wanted.ids.size, answer[:300]
    ids = np.frombuffer(answer, dtype=np.uint8).reshape(wanted.ids.shape)
    assert (ids == wanted.ids).mean() >= 0.999
