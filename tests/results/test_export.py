"""An exported file does what the run does, says what it is, and is not written where that cannot be shown."""

from __future__ import annotations

import copy
import importlib.util
import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from multidomain_cct.__main__ import main
from multidomain_cct.errors import UserError
from multidomain_cct.evaluation.photos import trained_size
from multidomain_cct.model.encoder import Encoder, EncoderSettings
from multidomain_cct.results import export as export_file
from multidomain_cct.results.export import Exported, export
from multidomain_cct.results.program import Program, _exchange_sized_layers, _resized, _Scale
from multidomain_cct.results.trained_run import TrainedRun

CPU = torch.device("cpu")
SIZES = [(96, 72), (331, 250), (33, 200), (64, 7)]
"""(width, height): as trained, and larger, taller and flatter than that."""

# torch's own exporter uses functions that it calls old.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture(scope="module")
def run(tiny_run: Path) -> TrainedRun:
    return TrainedRun.load(tiny_run, device=CPU)


@pytest.fixture(scope="module")
def both(run: TrainedRun, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """ONNX of both domains, for photographs of any size."""
    return export(run, "all", tmp_path_factory.mktemp("both") / "both.onnx")


def photograph(size: tuple[int, int]) -> np.ndarray:
    """(H, W, 3) uint8: smooth colours with a little noise."""
    rng = np.random.default_rng(size)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize(size, Image.Resampling.BICUBIC)).astype(int)
    return np.clip(smooth + rng.integers(-9, 10, smooth.shape), 0, 255).astype(np.uint8)


def in_onnx(path: Path, images: np.ndarray) -> dict[str, np.ndarray]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, {"image": images}), strict=True))


def in_torch(path: Path, images: np.ndarray) -> dict[str, np.ndarray]:
    with torch.no_grad():
        outputs = torch.export.load(path).module()(torch.from_numpy(images))
    return {name: output.numpy() for name, output in outputs.items()}


def assert_predicts(
    run: TrainedRun, domain: str, image: np.ndarray, ids: np.ndarray, probabilities: np.ndarray
) -> None:
    wanted = run.predict(image, domain, probabilities=True)
    assert ids.dtype == np.uint8
    assert (ids == wanted.ids).mean() >= 0.999
    np.testing.assert_allclose(probabilities, wanted.probabilities, atol=1e-5)


@pytest.mark.parametrize("size", SIZES)
def test_one_onnx_file_predicts_all_domains_at_any_size(run: TrainedRun, both: Exported, size: tuple[int, int]) -> None:
    image = photograph(size)
    outputs = in_onnx(both.path, image[None])
    assert set(outputs) == {f"{kind}_{name}" for kind in ("ids", "probabilities") for name in run.domains}
    for name in run.domains:
        assert_predicts(run, name, image, outputs[f"ids_{name}"][0], outputs[f"probabilities_{name}"][0])


def test_a_batch_gives_each_photograph_what_it_gets_alone(both: Exported) -> None:
    images = np.stack([photograph((80, 60)), photograph((80, 60))[::-1], photograph((80, 60))[:, ::-1]])
    outputs = in_onnx(both.path, images)
    for number, image in enumerate(images):
        for name, alone in in_onnx(both.path, image[None]).items():
            np.testing.assert_allclose(outputs[name][number], alone[0], atol=1e-5)


def test_heads_share_the_encoder(run: TrainedRun, both: Exported) -> None:
    program = Program(run, list(run.domains.values()))
    assert len(program.scales) == 1
    convolutions = [node for node in onnx.load(both.path).graph.node if node.op_type == "Conv"]
    assert len(convolutions) == sum(isinstance(module, nn.Conv2d) for module in program.encoder.modules())


def test_a_torch_program_predicts_at_any_size(run: TrainedRun, tmp_path: Path) -> None:
    written = export(run, "fields", tmp_path / "fields.pt2")
    assert written.outputs == ("ids", "probabilities")
    for size in SIZES:
        image = photograph(size)
        outputs = in_torch(written.path, np.stack([image, image]))
        assert_predicts(run, "fields", image, outputs["ids"][1], outputs["probabilities"][1])


@pytest.mark.parametrize(
    "encoder, decoder",
    [
        ({"name": "test_resnet", "stride": 8, "context": "psp", "width": 32}, "pixelshuffle"),
        ({"name": "test_resnet", "stride": 8, "context": "fpn", "width": 32, "norm": "per_domain"}, "bilinear"),
    ],
    ids=["psp", "norms_per_domain"],
)
def test_every_kind_of_network_is_exported_for_any_size(
    tiny_training: Callable[..., Path], tmp_path: Path, encoder: dict[str, object], decoder: str
) -> None:
    own = TrainedRun.load(tiny_training(tmp_path, encoder=encoder, decoder=decoder), device=CPU)
    written = export(own, "fields", tmp_path / "any.onnx")
    for size in SIZES[:2]:
        image = photograph(size)
        outputs = in_onnx(written.path, image[None])
        assert_predicts(own, "fields", image, outputs["ids"][0], outputs["probabilities"][0])


@pytest.mark.parametrize("name", ["tf_efficientnet_lite0", "resnet50d", "resnet18"])
def test_layers_that_are_exchanged_compute_the_same(name: str) -> None:
    settings = EncoderSettings(name, stride=8, context="fpn", width=32)
    encoder = Encoder(settings, ["fields"]).eval()
    exchanged = copy.deepcopy(encoder)
    _exchange_sized_layers(exchanged)
    unit = encoder.plan.unit
    for rows, columns in ((1, 1), (5, 7), (6, 9)):
        images = torch.randint(256, (1, 3, unit * rows, unit * columns), dtype=torch.uint8)
        with torch.inference_mode():
            torch.testing.assert_close(exchanged(images, [("fields", 1)]), encoder(images, [("fields", 1)]))


def test_a_backbone_of_one_size_is_exported_for_photographs_of_one_size(
    tiny_training: Callable[..., Path], tmp_path: Path
) -> None:
    encoder = {"name": "test_maxvit", "stride": 8, "context": "fpn", "width": 32}
    folder = tiny_training(tmp_path, encoder=encoder)
    own = TrainedRun.load(folder, device=CPU)
    written = export(own, "shapes", tmp_path / "one.pt2", size=(200, 90))
    image = photograph((200, 90))
    outputs = in_torch(written.path, image[None])
    assert_predicts(own, "shapes", image, outputs["ids"][0], outputs["probabilities"][0])


def test_the_running_average_is_exported_where_there_is_one(tiny_training: Callable[..., Path], tmp_path: Path) -> None:
    folder = tiny_training(tmp_path, ema=0.9)
    image = photograph((96, 72))
    found = {}
    for weights in ("ema", "student"):
        own = TrainedRun.load(folder, device=CPU, weights=weights)
        written = export(own, "fields", tmp_path / f"{weights}.pt2", size=(96, 72))
        found[weights] = in_torch(written.path, image[None])["probabilities"][0]
        assert_predicts(own, "fields", image, found[weights].argmax(0).astype(np.uint8), found[weights])
    assert np.abs(found["ema"] - found["student"]).max() > 1e-4


def test_the_file_says_what_it_is(run: TrainedRun, both: Exported, tmp_path: Path) -> None:
    stored = {entry.key: entry.value for entry in onnx.load(both.path).metadata_props}
    domains = json.loads(stored["domains"])
    for name, domain in run.domains.items():
        assert domains[name]["classes"] == [label.name for label in domain.classes]
        assert domains[name]["colours"] == [list(label.color) for label in domain.classes]
    assert stored["version"]
    assert "random weights of test_resnet" in stored["licence"]
    assert "no licence named" in stored["licence"]
    written = export(run, "fields", tmp_path / "fields.pt2", size=(96, 72))
    files = {"metadata.json": ""}
    torch.export.load(written.path, extra_files=files)
    described = json.loads(files["metadata.json"])
    assert described["domains"] == {"fields": domains["fields"]}
    assert described["input"] == "RGB, 96x72, upright"


@pytest.mark.parametrize("box, typical", [((320, 240), None), (None, (96, 72)), (None, None)])
def test_sizes_are_those_of_predict(box: tuple[int, int] | None, typical: tuple[int, int] | None) -> None:
    scale, rng = _Scale(box, typical, None), np.random.default_rng(0)
    for width, height in rng.integers(1, 5000, (300, 2)).tolist():
        assert tuple(scale.seen_at(height, width).tolist()[::-1]) == trained_size((width, height), box, typical)


@pytest.mark.parametrize("wanted", [(129, 95), (40, 61), (400, 300), (200, 150)])
def test_pixels_are_those_of_pillow(wanted: tuple[int, int]) -> None:
    image = photograph((200, 150))
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None]
    shrunk = _resized(pixels, torch.tensor(wanted[::-1]), wanted[::-1])[0].permute(1, 2, 0).numpy()
    expected = np.asarray(Image.fromarray(image).resize(wanted, Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(shrunk, expected)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"out": "model.tflite"}, r"--out's ending is '\.tflite'; it is one of \.onnx, \.pt2"),
        ({"out": "missing/model.onnx"}, r"--out .*missing/model\.onnx cannot be written. Name a file in a folder"),
        ({"opset": 9}, r"--opset is 9; it is at least 18 and at most \d+"),
        ({"opset": 1000}, r"--opset is 1000; it is at least 18"),
        ({"size": (0, 5)}, r"--size is 0; it is at least 1"),
        ({"domain": "feilds"}, r'no head for the domain "feilds"\. It has: fields, shapes\. Did you mean "fields"\?'),
        ({"domain": None}, r"has 2 domains; name one: fields, shapes"),
        ({"shards": Path("gone")}, r"gone/fields.*pack"),
    ],
)
def test_what_cannot_be_exported_is_one_line(
    run: TrainedRun, tmp_path: Path, arguments: dict[str, object], message: str
) -> None:
    options = {"domain": "fields", "out": "model.onnx"} | arguments
    with pytest.raises(UserError, match=message):
        export(run, options.pop("domain"), tmp_path / str(options.pop("out")), **options)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_a_folder_is_not_replaced(run: TrainedRun, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").mkdir()
    with pytest.raises(UserError, match=r"model\.onnx cannot be written"):
        export(run, "fields", tmp_path / "model.onnx")


def test_a_missing_package_is_named_with_the_command_that_installs_it(
    run: TrainedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxscript" else name)
    with pytest.raises(UserError, match=r"needs the package onnxscript.*pip install 'multidomain-cct\[export\]'"):
        export(run, "fields", tmp_path / "model.onnx")


def test_any_size_is_refused_where_the_backbone_has_one(tiny_training: Callable[..., Path], tmp_path: Path) -> None:
    encoder = {"name": "test_maxvit", "stride": 8, "context": "fpn", "width": 32}
    own = TrainedRun.load(tiny_training(tmp_path, encoder=encoder), device=CPU)
    with pytest.raises(UserError, match=r"test_maxvit takes images of 64x64 only.*--size 640,480"):
        export(own, "fields", tmp_path / "model.pt2")


class Eigenvalues(nn.Module):
    """A context module with an operation that ONNX does not have."""

    def __init__(self, context: nn.Module) -> None:
        super().__init__()
        self.context = context

    def forward(self, levels: list[Tensor]) -> Tensor:
        features: Tensor = self.context(levels)
        square = features.mean(dim=(0, 3))[:, :1].expand(-1, len(features[0]))
        return features + 0 * torch.linalg.eigvals(square).real.sum()


def test_an_operation_that_the_format_does_not_have_is_one_line(tiny_run: Path, tmp_path: Path) -> None:
    own = TrainedRun.load(tiny_run, device=CPU)
    own.model.encoder.context = Eigenvalues(own.model.encoder.context)
    with pytest.raises(
        UserError, match=r"the network cannot be written as \.onnx \(.*\)\. Try another --opset or the other"
    ):
        export(own, "fields", tmp_path / "model.onnx", size=(96, 72))
    assert not list(tmp_path.iterdir())


def test_a_file_that_disagrees_with_its_run_is_not_written(
    run: TrainedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export_file, "MOST_DIFFERENCE", -1.0)
    with pytest.raises(UserError, match=r"was not written.*fields: 3 images of val, 100\.000 %.*--size"):
        export(run, "fields", tmp_path / "model.pt2", size=(96, 72))
    assert not list(tmp_path.iterdir())


def test_the_command_says_how_well_the_file_agrees(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "fields.pt2"
    assert main(["export", str(tiny_run), "--domain", "fields", "--size", "96,72", "--out", str(out)]) == 0
    agreement, written = capsys.readouterr().out.splitlines()
    assert agreement.startswith("fields: 3 images of val, 100.000 % of the pixels of one class, probabilities within ")
    assert re.fullmatch(rf"{out}: \d+\.\d MiB, outputs ids, probabilities; \d+ ms for .* 96x72 on \d+ CPU.*", written)


def test_a_folder_that_is_no_run_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(tmp_path), "--out", str(tmp_path / "model.onnx")]) == 2
    assert "this is not a run's folder" in capsys.readouterr().err
