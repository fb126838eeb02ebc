"""The commands as a user calls them: exit codes, one line per mistake, nothing written."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from multidomain_cct.__main__ import main
from multidomain_cct.training.recipe import Recipe

ROOT = Path(__file__).parents[1]
SPEC = """
name: yard
layout: folder
splits:
  train: {images: images/*.jpg, masks: masks/*.png}
  more: {images: more/*.jpg}
classes:
  - {name: grass, color: [0, 200, 0], ids: [0]}
  - {name: cat, color: [200, 0, 0], ids: [4], thing: true}
"""


@pytest.fixture
def yard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with raw photographs, masks and the one YAML file that makes them a domain."""
    rng = np.random.default_rng(0)
    for folder in ("raw/images", "raw/masks", "raw/more", "domains"):
        (tmp_path / folder).mkdir(parents=True)
    for number in range(4):
        Image.fromarray(rng.integers(0, 255, (48, 64, 3), dtype=np.uint8)).save(tmp_path / f"raw/images/{number}.jpg")
        Image.fromarray(rng.integers(0, 255, (48, 64, 3), dtype=np.uint8)).save(tmp_path / f"raw/more/{number}.jpg")
        Image.fromarray(rng.choice([0, 4, 9], (48, 64)).astype(np.uint8)).save(tmp_path / f"raw/masks/{number}.png")
    (tmp_path / "domains/yard.yaml").write_text(SPEC)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def mistake(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line that a command prints when it exits with 2."""
    assert main([str(a) for a in arguments]) == 2
    errors = capsys.readouterr().err
    lines = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert "Traceback" not in errors
    assert all(errors.splitlines())
    return lines[0]


def test_three_commands_lead_from_a_folder_of_photographs_to_predictions(
    yard: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (yard / "yard.yaml").write_text(
        "domains: {yard: {labelled: 2, unlabelled_splits: [more], val_split: train}}\n"
        "data: {crop: [32, 32], labelled_batch: 2, unlabelled_batch: 2, workers: 0}\n"
        "encoder: {name: test_resnet, context: fpn, width: 32}\ndecoder: bilinear\ntraining: {steps: 2}\n"
    )
    assert main(["pack", "yard", "--raw", "raw", "--workers", "1"]) == 0
    packed = capsys.readouterr().out
    assert "yard/train: 4 images (4 labelled)" in packed
    assert "yard/more: 4 images (0 labelled)" in packed
    assert "raw values that no class names, now 255: 9 (" in packed
    assert main(["yard.yaml"]) == 0
    assert "report: runs/yard/report.html" in capsys.readouterr().out
    assert (yard / "runs/yard/report.html").is_file()
    assert main(["predict", "runs/yard", "--domain", "yard", "--out", "out", "raw/more"]) == 0
    assert "4 image(s) written to out" in capsys.readouterr().out
    index = Image.open(yard / "out/index/2.png")
    assert index.size == (64, 48)
    assert set(np.unique(np.asarray(index))) <= {0, 1}


def test_domains_lists_what_is_known_and_packed(
    yard: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    main(["pack", "yard", "--raw", "raw", "--workers", "1", "--split", "more"])
    capsys.readouterr()
    assert main(["domains"]) == 0
    listed = capsys.readouterr().out
    assert "more (1)" in next(line for line in listed.splitlines() if "yard" in line)
    assert "cityscapes" in listed
    assert "none" in next(line for line in listed.splitlines() if "cityscapes" in line)
    (yard / "domains/broken.yaml").write_text("name: broken\n")
    assert main(["domains"]) == 1
    assert "broken.yaml: layout is missing" in capsys.readouterr().err


def test_evaluate_prints_tables_and_json_and_keeps_the_scores(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(tiny_run, tmp_path / "run")
    assert main(["evaluate", str(run)]) == 0
    printed = capsys.readouterr().out
    assert all(
        word in printed
        for word in (
            "fields",
            "shapes",
            "barn",
            "mIoU",
            "pixel accuracy",
            "mean of 2 domains",
            "3 images at label resolution",
        )
    )
    written = json.loads(next(run.glob("evaluation-val-*.json")).read_text())
    assert main(["evaluate", str(run), "--json", "--domain", "fields", "--checkpoint", "best"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert list(answer["domains"]) == ["fields"]
    assert set(answer["domains"]["fields"]["iou"]) == set(written["domains"]["fields"]["iou"])
    assert main(["evaluate", str(run), "--json", "--window", "64,64", "--scales", "0.75,1", "--flip"]) == 0
    assert (
        "window 64x64, scales [0.75, 1.0], flip" in json.loads(capsys.readouterr().out)["domains"]["shapes"]["protocol"]
    )


def test_predict_skips_and_reports_what_it_cannot_read(
    tiny_run: Path, yard: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (yard / "raw/more/broken.jpg").write_bytes(b"not an image")
    assert main(["predict", str(tiny_run), "--domain", "fields", "--out", "out", "raw/more"]) == 1
    printed = capsys.readouterr()
    assert f"4 image(s) written to out by step-00000002 of {tiny_run}, 1 skipped" in printed.out
    assert "error: skipped " in printed.err
    assert "broken.jpg" in printed.err


def test_report_prints_the_runs_beside_each_other(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = shutil.copytree(tiny_run, tmp_path / "other[red]")
    assert main(["report", str(tiny_run), str(other), "--out", str(tmp_path / "page.html")]) == 0
    printed = capsys.readouterr().out
    score = json.loads((tiny_run / "metrics.jsonl").read_text().splitlines()[-1])["val/fields/miou"]
    assert "other[red]" in printed
    assert "tiny" in printed
    assert "mean" in printed
    assert next(line for line in printed.splitlines() if "fields" in line).count(f"{100 * score:.1f}") == 2
    assert f"report: {tmp_path / 'page.html'}" in printed
    assert (tmp_path / "page.html").is_file()


def test_scores_of_other_domains_and_settings_have_files_of_their_own(tiny_run: Path, tmp_path: Path) -> None:
    run = shutil.copytree(tiny_run, tmp_path / "run")
    for more in ([], ["--domain", "fields"], ["--flip"], ["--flip", "--json"]):
        assert main(["evaluate", str(run), *more]) == 0
    assert len(list(run.glob("evaluation-val-step-*.json"))) == 3


def test_the_checkpoint_of_another_run_is_refused(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(tiny_run, tmp_path / "run")
    other = next((tiny_run / "checkpoints").iterdir())
    assert "is not a checkpoint of" in mistake(capsys, "evaluate", run, "--checkpoint", other)


def test_names_that_look_like_markup_are_printed_as_they_are(yard: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (yard / "domains/yard.yaml").write_text(
        SPEC.replace("name: cat", 'name: "cat [front] [/]"').replace("layout:", 'title: "Yard [small]"\nlayout:')
    )
    assert main(["pack", "yard", "--raw", "raw", "--workers", "1"]) == 0
    assert "cat [front] [/]" in capsys.readouterr().out


def test_overrides_may_stand_behind_options(yard: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (yard / "r.yaml").write_text("domains: {yard: {}}\n")
    assert 'unknown key "data.crpo"' in mistake(capsys, "r.yaml", "--domains", "domains", "data.crpo=1")


@pytest.mark.parametrize(
    ("words", "command", "named"),
    [
        (["r.yaml", "--speed", "3"], "train", "--speed"),
        (["r.yaml", "--domain", "domains"], "train", "--domain"),
        (["pack", "yard", "--ra", "raw"], "pack", "--ra"),
        (["evaluate", "run", "--chekpoint=best"], "evaluate", "--chekpoint=best"),
    ],
)
def test_an_unknown_option_prints_the_usage_of_its_command(
    yard: Path, capsys: pytest.CaptureFixture[str], words: list[str], command: str, named: str
) -> None:
    (yard / "r.yaml").write_text("domains: {yard: {}}\n")
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith(f"usage: python -m multidomain_cct {command} ")
    assert named in lines[-1]


def test_an_option_without_a_command_is_named(yard: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "the option --domains has no command" in mistake(capsys, "--domains", "domains", "yard.yaml")


@pytest.mark.parametrize(
    ("word", "advice"),
    [("evalaute", 'Did you mean "evaluate"?'), ("pck", 'Did you mean "pack"?'), ("seed=3", "a .yaml file")],
)
def test_a_first_word_that_is_no_command_is_answered_with_the_commands(
    yard: Path, capsys: pytest.CaptureFixture[str], word: str, advice: str
) -> None:
    line = mistake(capsys, word, "runs/demo")
    assert f'"{word}" is neither a command nor a recipe' in line
    assert "train, pack, index" in line
    assert advice in line


def test_the_program_is_called_as_it_was_started(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for started, shown in (("/bin/multidomain-cct", "multidomain-cct"), ("x/__main__.py", "python -m multidomain_cct")):
        monkeypatch.setattr(sys, "argv", [started])
        with pytest.raises(SystemExit):
            main(["pack", "--help"])
        assert capsys.readouterr().out.startswith(f"usage: {shown} pack ")


def test_the_shell_completes_commands_and_options(tmp_path: Path) -> None:
    pytest.importorskip("argcomplete")
    for typed, expected in (("multidomain-cct ev", "evaluate"), ("multidomain-cct pack --ra", "--raw")):
        answer = tmp_path / "answer"
        asked = {"_ARGCOMPLETE": "1", "_ARGCOMPLETE_STDOUT_FILENAME": str(answer)}
        asked |= {"COMP_LINE": typed, "COMP_POINT": str(len(typed)), "_ARGCOMPLETE_IFS": " "}
        code = "from multidomain_cct.__main__ import main; main()"
        subprocess.run([sys.executable, "-c", code], env=os.environ | asked, timeout=60)
        assert expected in answer.read_text().split()


def test_index_makes_foreign_shards_usable(yard: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with tarfile.open(yard / "train-00000.tar", "w") as tar:
        tar.add("raw/images/0.jpg", "zero.jpg")
        tar.add("raw/masks/0.png", "zero.png")
    assert main(["index", "train-00000.tar"]) == 0
    assert "train-00000.tar.idx: 1 samples, 1 with a mask" in capsys.readouterr().out


def test_mistakes_about_domains_and_raw_data(yard: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert 'names the domain "yrad"' in (line := mistake(capsys, "pack", "yrad", "--raw", "raw"))
    assert 'Did you mean "yard"' in line
    assert "--raw is missing" in mistake(capsys, "pack", "yard")
    assert "nowhere" in mistake(capsys, "pack", "yard", "--raw", "nowhere")
    assert "--workers is 0" in mistake(capsys, "pack", "yard", "--raw", "raw", "--workers", "0")
    assert "'trian'" in (line := mistake(capsys, "pack", "yard", "--raw", "raw", "--split", "trian"))
    assert "train" in line
    (yard / "raw/masks/2.png").unlink()
    assert "2.jpg" in mistake(capsys, "pack", "yard", "--raw", "raw", "--workers", "1")
    Image.new("L", (10, 10)).save(yard / "raw/masks/2.png")
    assert "the mask is 10x10" in mistake(capsys, "pack", "yard", "--raw", "raw", "--workers", "1")
    (yard / "domains/yard.yaml").write_text(SPEC.replace("ids: [4]", "ids: [0]"))
    assert 'raw id 0 belongs to both "grass" and "cat"' in mistake(capsys, "pack", "yard", "--raw", "raw")
    (yard / "domains/yard.yaml").write_text(SPEC.replace("200, 0, 0", "200, 0, 256"))
    assert "classes[1].color is [200, 0, 256]; a colour is three integers from 0 to 255" in mistake(
        capsys, "pack", "yard", "--raw", "raw"
    )
    assert not list(yard.glob("data/shards/**/*.tar"))


def test_a_raw_folder_that_lacks_a_split(yard: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(yard / "raw/more")
    assert "split more of yard needs more/*.jpg" in mistake(capsys, "pack", "yard", "--raw", "raw", "--split", "more")
    assert main(["pack", "yard", "--raw", "raw", "--workers", "1"]) == 0
    assert "left out: raw: split more of yard needs more/*.jpg" in capsys.readouterr().err
    shutil.rmtree(yard / "raw/images")
    assert "split train of yard needs images/*.jpg" in mistake(capsys, "pack", "yard", "--raw", "raw")


def test_a_raw_id_without_class_is_an_error_when_the_spec_says_so(
    yard: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (yard / "domains/yard.yaml").write_text(SPEC + "unknown: error\n")
    line = mistake(capsys, "pack", "yard", "--raw", "raw", "--workers", "1")
    assert "9" in line
    assert "masks/" in line
    assert not list(yard.glob("data/shards/**/*.tar"))


def test_mistakes_about_training(
    yard: Path, capsys: pytest.CaptureFixture[str], tiny_recipe: Callable[..., Recipe], two_domains: Path
) -> None:
    assert "there is no such recipe" in mistake(capsys, "nothing.yaml")
    path = yard / "tiny.yaml"
    path.write_text(tiny_recipe().to_yaml())
    domains = ("--domains", two_domains / "domains")
    assert 'unknown key "data.crpo"' in mistake(capsys, path, "data.crpo=1")
    assert "has no train shards. Make them: python -m multidomain_cct pack fields" in mistake(
        capsys, path, "data.shards=nowhere", *domains
    )
    assert "asks for 99 labelled images; there are 10" in mistake(capsys, path, "domains.fields.labelled=99", *domains)
    assert "which encoder.stride 8 does not divide" in mistake(capsys, path, "data.crop=[60,60]", *domains)
    assert "Nearest: resnet" in mistake(capsys, path, "encoder.name=resnet5o", *domains)
    assert 'names the domain "feilds"' in mistake(capsys, path, "domains.feilds.labelled=3", *domains)
    (yard / "weights.pt").write_bytes(b"")
    assert ".safetensors file" in mistake(capsys, path, "encoder.weights=weights.pt", *domains)
    assert not (yard / "runs").exists()


def test_a_train_id_outside_the_table_is_named_by_shard_and_key(
    yard: Path, capsys: pytest.CaptureFixture[str], tiny_recipe: Callable[..., Recipe], two_domains: Path
) -> None:
    domains = shutil.copytree(two_domains / "domains", yard / "other")
    text = (domains / "fields.yaml").read_text()
    start = text.index("- name: barn")
    (domains / "fields.yaml").write_text(
        text[:start] + text[text.index("title:", start) :]
        if "title:" in text[start:]
        else text[:start] + "unknown: ignore\n"
    )
    path = yard / "tiny.yaml"
    path.write_text(tiny_recipe(data__workers=1).to_yaml())
    line = mistake(capsys, path, "--domains", domains)
    assert "train-00000.tar: key 'train_0" in line
    assert "train id 2" in line
    assert "classes 0 to 1" in line


def test_a_run_that_fails_exits_with_1(
    yard: Path, capsys: pytest.CaptureFixture[str], tiny_recipe: Callable[..., Recipe], two_domains: Path
) -> None:
    path = yard / "tiny.yaml"
    path.write_text(tiny_recipe(optimiser={"lr": 1e30}, training={"steps": 9, "max_skipped": 1}).to_yaml())
    assert main([str(path), "--domains", str(two_domains / "domains")]) == 1
    line = capsys.readouterr().err.strip()
    assert line.startswith("error: step 3: ")
    assert "is nan; keys" in line
    assert "\n" not in line


def test_mistakes_about_runs(tiny_run: Path, yard: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "is not a run's folder" in mistake(capsys, "evaluate", yard)
    assert 'has no head for the domain "fieldz". It has: fields, shapes. Did you mean "fields"' in mistake(
        capsys, "evaluate", tiny_run, "--domain", "fieldz"
    )
    assert 'no head for the domain "yard"' in mistake(
        capsys, "predict", tiny_run, "--domain", "yard", "--out", "out", "raw/more"
    )
    assert "has no test shards" in mistake(capsys, "evaluate", tiny_run, "--split", "test")
    assert "there is no such checkpoint" in mistake(capsys, "evaluate", tiny_run, "--checkpoint", "step-9")
    assert "not a run" in mistake(capsys, "report", yard)
    assert "absent.jpg" in mistake(capsys, "predict", tiny_run, "--domain", "fields", "--out", "out", "absent.jpg")
    assert "there is no such shard" in mistake(capsys, "index", "absent.tar")
    assert "--domains: absent: there is no such folder." in mistake(capsys, "domains", "--domains", "absent")
    assert not (yard / "out").exists()


@pytest.mark.parametrize(
    "arguments", [[], ["evaluate"], ["predict", "run"], ["evaluate", "run", "--window", "3"], ["pack"]]
)
def test_incomplete_commands_exit_with_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2


def test_a_wheel_carries_domains_and_recipes_and_works_outside_the_clone(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)],
        cwd=ROOT,
        check=True,
        capture_output=True,
        timeout=120,
    )
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path / "site")
    assert {
        "multidomain_cct/domains/cityscapes.yaml",
        "multidomain_cct/recipes/demo.yaml",
        "multidomain_cct/results/report/page.html.jinja",
        "multidomain_cct/py.typed",
    } <= names
    site = str(tmp_path / "site")
    code = (
        f"import sys; sys.path.insert(0, {site!r}); import multidomain_cct.__main__ as m; print(m.__file__); "
        "sys.exit(m.main())"
    )
    known = subprocess.run(
        [sys.executable, "-c", code, "domains"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        env={"PATH": "", "COLUMNS": "200"},
    )
    assert str(tmp_path / "site") in known.stdout
    assert "pascal_voc" in known.stdout
    assert known.returncode == 0
    trained = subprocess.run(
        [sys.executable, "-c", code, "recipes/demo.yaml"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        env={"PATH": ""},
    )
    assert trained.returncode == 2
    assert "toy_street has no train shards" in trained.stderr


def test_the_changelog_has_a_section_for_the_version() -> None:
    import multidomain_cct

    assert f"## [{multidomain_cct.__version__}] - " in (ROOT / "CHANGELOG.md").read_text()


def test_a_place_that_cannot_be_written_is_one_line(yard: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (yard / "occupied").write_text("a file")
    assert main(["pack", "yard", "--raw", "raw", "--workers", "1", "--out", "occupied"]) == 1
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith(f"error: {yard / 'occupied'}: Not a directory")


def test_ctrl_c_exits_with_130_and_the_way_to_go_on(
    yard: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*arguments: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(10)

    monkeypatch.setattr("multidomain_cct.commands.pack.find_domain", interrupted)
    assert main(["pack", "yard", "--raw", "raw"]) == 130
    assert capsys.readouterr().err.startswith("error: stopped. ")


def test_a_fault_of_ours_keeps_its_traceback(
    yard: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def faulty(*arguments: object) -> None:
        list(zip([1], [], strict=True))

    monkeypatch.setattr("multidomain_cct.commands.pack.find_domain", faulty)
    with pytest.raises(ValueError, match=r"zip\(\) argument 2 is shorter"):
        main(["pack", "yard", "--raw", "raw"])
    assert "error:" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["--traceback", "absent.yaml"],
        ["absent.yaml", "seed=1", "--traceback"],
        ["pack", "--traceback", "absent", "--raw", "raw"],
    ],
)
def test_the_traceback_of_a_mistake_is_shown_when_asked_for(
    yard: Path, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    assert main(arguments) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("Traceback (most recent call last):")
    assert "multidomain_cct.errors.UserError: " in shown
    # The one line stays the last.
    assert shown.splitlines()[-1].startswith("error: ")


def test_the_environment_can_ask_for_tracebacks(
    yard: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MDCCT_TRACEBACK", "1")
    assert main(["absent.yaml"]) == 2
    assert "Traceback" in capsys.readouterr().err
    monkeypatch.setenv("MDCCT_TRACEBACK", "0")
    mistake(capsys, "absent.yaml")
