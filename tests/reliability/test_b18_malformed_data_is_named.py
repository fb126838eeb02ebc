"""B18: malformed data is refused by name, or skipped and counted without a position shifting."""

from __future__ import annotations

import gzip
import io
import json
import shutil
import signal
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from processes import Plan, Started, seen, start_ranks
from run_files import logged, state_of, tensors_of
from tars import write_tar

from multidomain_cct.data.batches.bad_images import BadImages, skipped_in
from multidomain_cct.data.batches.loader import Batch, TrainingSet, steps
from multidomain_cct.data.batches.streams import DataSettings, DomainSettings, open_streams
from multidomain_cct.data.batches.views import Augment
from multidomain_cct.data.domain import Domain, LabelClass, Split
from multidomain_cct.data.shards.index import IMAGE as IMAGE_COLUMN
from multidomain_cct.data.shards.index import ShardIndex, index_path
from multidomain_cct.data.shards.scan import index_shard
from multidomain_cct.errors import UserError

DOMAIN = Domain(
    "yard",
    "folder",
    {"train": Split("*.jpg", "*.png")},
    (LabelClass("ground", (0, 0, 0)), LabelClass("cat", (9, 9, 9))),
)
SAMPLES, BAD = 9, "image_4"
Members = list[tuple[str, bytes]]


def picture(kind: str, *, mode: str = "RGB", size: tuple[int, int] = (32, 24), seed: int = 0, top: int = 256) -> bytes:
    shape = (size[1], size[0], len(mode)) if len(mode) > 1 else (size[1], size[0])
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, top, shape, dtype=np.uint8), mode).save(buffer, kind)
    return buffer.getvalue()


def mask(**options: object) -> bytes:
    return picture("PNG", **{"mode": "L", "top": 2, **options})  # type: ignore[arg-type]


def members() -> Members:
    rows: Members = []
    for number in range(SAMPLES):
        rows += [
            (f"image_{number}.jpg", picture("JPEG", seed=number)),
            (f"image_{number}.png", mask(seed=number)),
            (f"image_{number}.json", b"{}"),
        ]
    return rows


def with_member(name: str, content: bytes) -> Members:
    """The good members, one of them with other content."""
    return [(own, content if own == name else good) for own, good in members()]


def huge_png() -> bytes:
    content = bytearray(mask())
    content[16:24] = (60000).to_bytes(4, "big") * 2
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    return bytes(content)


IMAGE, MASK = f"{BAD}.jpg", f"{BAD}.png"
SAMPLE_FAULTS: dict[str, tuple[str, bytes, str]] = {
    "an image that is cut off": (IMAGE, picture("JPEG")[:500], "image: cannot be read"),
    "an image without its end": (IMAGE, picture("JPEG")[:-40], "image: cannot be read"),
    "an image that is text": (IMAGE, b"<html>404</html>", "image: cannot be read"),
    "an image of zeros": (IMAGE, bytes(900), "image: cannot be read"),
    "an image in a format that is not allowed": (IMAGE, picture("PCX"), "image: cannot be read"),
    "an image that is a damaged PNG": (IMAGE, picture("PNG")[:300], "image: cannot be read"),
    "an image that claims to be huge": (IMAGE, huge_png(), "image: cannot be read"),
    "a mask that is a JPEG": (MASK, picture("JPEG", mode="L"), "mask: cannot be read"),
    "a mask that is cut off": (MASK, mask()[:60], "mask: cannot be read"),
    "a mask that is text": (MASK, b"none", "mask: cannot be read"),
    "a mask in colours": (MASK, picture("PNG"), "mask: wrong mode"),
    "a mask with transparency": (MASK, picture("PNG", mode="LA"), "mask: wrong mode"),
    "a mask that claims to be huge": (MASK, huge_png(), "mask: cannot be read"),
    "a mask of another size": (MASK, mask(size=(24, 32)), "mask: another size than the image"),
    "a mask with an id outside the table": (MASK, mask(top=7), "mask: id outside the class table"),
}
SHARD_FAULTS: dict[str, tuple[Members, str]] = {
    "a key twice": ([*members(), ("image_0.jpg", b"x")], "'image_0' appears twice"),
    "a member twice": ([("a.jpg", b"1"), ("a.jpg", b"2")], "'a.jpg' appears twice"),
    "a mask without its image": ([*members(), ("z.png", mask())], "'z' has no image"),
    "a description without its image": ([*members(), ("z.json", b"{}")], "'z' has no image"),
    "an unknown member": ([*members(), ("z.jpg", b"1"), ("z.txt", b"2")], "'z.txt' has the ending .txt"),
    "an empty member": (with_member(IMAGE, b""), f"'{IMAGE}' is empty"),
    "a description that is no JSON": (with_member(f"{BAD}.json", b"{'a': 1}"), f"'{BAD}.json' is not valid JSON"),
    "a description that is a list": (with_member(f"{BAD}.json", b"[1]"), f"'{BAD}.json' holds list"),
    "a bottomless description": (with_member(f"{BAD}.json", b"[" * 100_000), f"'{BAD}.json' is not valid JSON"),
    "a key that leads upwards": ([("../a.jpg", b"1")], "no usable name"),
    "an absolute key": ([("/etc/a.jpg", b"1")], "no usable name"),
    "a key with control characters": ([("a\x1b[2J.jpg", b"1")], "no usable name"),
    "a key of 300 characters": ([("k" * 300 + ".jpg", b"1")], "no usable name"),
    "a member without an ending": ([("a", b"1")], "no usable name"),
    "no members": ([], "holds no samples"),
}


def a_link(path: Path) -> None:
    with tarfile.open(path, "w") as tar:
        member = tarfile.TarInfo("a.jpg")
        member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(member)


def changed(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        write_tar(path, members())
        path.write_bytes(change(path.read_bytes()))

    return write


FILE_FAULTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "a link": (a_link, "not a regular file"),
    "a member that is cut off": (changed(lambda content: content[:5000]), "cut off|not a tar header|unexpected end"),
    "no end marker": (
        changed(lambda content: content.rstrip(b"\0")[: -(len(content.rstrip(b"\0")) % 512)]),
        "end marker is missing|cut off",
    ),
    "a damaged header": (
        changed(lambda content: content.replace(b"image_4.jpg", b"image_4.jpq", 1)),
        "not a tar header",
    ),
    "a compressed shard": (changed(gzip.compress), "not an uncompressed tar"),
    "a shard that is text": (
        lambda path: (path.parent.mkdir(exist_ok=True), path.write_text("hello " * 300))[0],
        "not an uncompressed tar",
    ),  # type: ignore[func-returns-value]
}


def one_epoch(root: Path, *, epochs: int = 1, **changes: object) -> list[Batch]:
    data = replace(DataSettings(shards=str(root), labelled_batch=3, crop=[16, 16]), **changes)  # type: ignore[arg-type]
    streams = open_streams(DOMAIN, DomainSettings(), data, use_unlabelled=False)
    training_set, batches = TrainingSet([streams], seed=3, augment=Augment()), []
    bad_images = BadImages(training_set)
    for batch in steps(training_set, 0, epochs * SAMPLES // 3, workers=0):
        bad_images.count(batch, skipped_in(batch))
        batches.append(batch["yard"])
    return batches


def keys(batches: list[Batch]) -> list[str]:
    return [key for batch in batches for key in batch.keys]


@pytest.mark.parametrize("fault", SAMPLE_FAULTS)
def test_b18_a_bad_sample_ends_the_run_by_name_or_is_skipped_and_counted(
    tmp_path: Path, fault: str, record_property: Callable[[str, object], None]
) -> None:
    member, content, reason = SAMPLE_FAULTS[fault]
    for name, rows in (("good", members()), ("bad", with_member(member, content))):
        index_shard(write_tar(tmp_path / name / "yard/train-00000.tar", rows))
    with pytest.raises(UserError) as error:
        one_epoch(tmp_path / "bad")
    line, field = str(error.value), reason.partition(":")[0]
    assert "train-00000.tar" in line
    assert repr(BAD) in line
    assert field in line
    assert "\n" not in line

    good, bad = (
        keys(one_epoch(tmp_path / "good", epochs=3)),
        one_epoch(tmp_path / "bad", epochs=3, on_bad="skip", max_bad_fraction=0.2),
    )
    assert Counter(skip.reason for batch in bad for skip in batch.skipped) == {reason: 3}
    assert {skip.key for batch in bad for skip in batch.skipped} == {BAD}
    # Where the bad image stood stands the next one of the shard; nothing else has moved.
    assert keys(bad) == [key if key != BAD else "image_5" for key in good]
    record_property("B18", f"{len(SAMPLE_FAULTS)} kinds of bad samples named, or skipped and counted")


def test_b18_the_count_of_bytes_that_changed_after_indexing_is_exact(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "yard/train-00000.tar", members())
    index = index_shard(path)
    content = bytearray(path.read_bytes())
    for row, column in ((1, 0), (4, 1), (7, 0)):
        content[index.offset[row, column] + 30] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="the bytes differ from what was indexed"):
        one_epoch(tmp_path)
    reasons = Counter(
        skip.reason for batch in one_epoch(tmp_path, on_bad="skip", max_bad_fraction=0.5) for skip in batch.skipped
    )
    assert reasons == {"image: bytes differ from the index": 2, "mask: bytes differ from the index": 1}
    with pytest.raises(
        UserError,
        match=r"yard: \d of \d images cannot be used \(.*\), more than data.max_bad_fraction 0.2 allows. The last: "
        r".*train-00000.tar",
    ):
        one_epoch(tmp_path, on_bad="skip", max_bad_fraction=0.2)


def test_b18_when_nothing_can_stand_in_the_run_ends(tmp_path: Path) -> None:
    index_shard(write_tar(tmp_path / "yard/train-00000.tar", [(f"image_{n}.jpg", b"no image") for n in range(3)]))
    data = DataSettings(shards=str(tmp_path), unlabelled_batch=1, crop=[16, 16], on_bad="skip", max_bad_fraction=1.0)
    streams = open_streams(DOMAIN, DomainSettings(labelled="none"), data)
    with pytest.raises(UserError, match="the last of 3 neighbouring samples that cannot be used"):
        list(steps(TrainingSet([streams], seed=3, augment=Augment()), 0, 1, workers=0))


@pytest.mark.parametrize("on_bad", ["fatal", "skip"])
@pytest.mark.parametrize("fault", [*SHARD_FAULTS, *FILE_FAULTS])
def test_b18_a_malformed_shard_is_refused_before_a_run_sees_it_whatever_becomes_of_bad_samples(
    tmp_path: Path, fault: str, on_bad: str, record_property: Callable[[str, object], None]
) -> None:
    path = tmp_path / "yard/train-00000.tar"
    path.parent.mkdir()
    if fault in SHARD_FAULTS:
        rows, message = SHARD_FAULTS[fault]
        write_tar(path, rows)
    else:
        write, message = FILE_FAULTS[fault]
        write(path)
    with pytest.raises(UserError, match=message) as error:
        index_shard(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="has no index. Build it"):
        one_epoch(tmp_path, on_bad=on_bad)
    record_property("B18", f"{len(SHARD_FAULTS) + len(FILE_FAULTS)} kinds of malformed shards refused in both modes")


Words = Callable[..., list[str]]
REASON = "image: bytes differ from the index"
BAD_KEYS = ("train_001", "train_006")


@pytest.fixture
def two_bad(two_domains: Path, tmp_path: Path) -> Path:
    """A copy of the two domains in which bytes of two of the ten images of fields have changed."""
    root = shutil.copytree(two_domains, tmp_path / "damaged")
    shard = root / "fields" / "train-00000.tar"
    content, index = bytearray(shard.read_bytes()), ShardIndex.load(index_path(shard))
    for key in BAD_KEYS:
        content[index.offset[index.keys.index(key), IMAGE_COLUMN] + 30] ^= 1
    shard.write_bytes(content)
    return root


@pytest.fixture
def two_ranks(command: Words, two_bad: Path, tmp_path: Path) -> Callable[..., list[Started]]:
    """A function (run's name, max_bad_fraction, a plan for each rank) that trains on the two bad images with two
    processes: five epochs of the ten images.
    """

    def begin(name: str, max_bad_fraction: float, plans: list[Plan], *more: str) -> list[Started]:
        domains = {"fields": {"labelled": "all", "labelled_batch": 2}, "shapes": {"labelled": "4"}}
        data = [
            f"data.shards={two_bad}",
            "data.workers=1",
            "data.on_bad=skip",
            f"data.max_bad_fraction={max_bad_fraction}",
        ]
        training = {"steps": 25, "log_every": 1, "evaluate_every": 100, "save_every": 5, "keep": 99}
        return start_ranks(
            command(name, *data, *more, training=training, domains=domains, method="supervised"),
            tmp_path / f"{name}.txt",
            plans,
        )

    return begin


def processes_of(run: Path) -> int:
    """World size that the run has written down."""
    count: int = json.loads((run / "env.json").read_text())["processes"]
    return count


def test_b18_bad_images_are_counted_and_told_over_all_processes(
    two_ranks: Callable[..., list[Started]], tmp_path: Path, figure: Callable[[str, str], None]
) -> None:
    files = [tmp_path / "seen0", tmp_path / "seen1"]
    ranks = two_ranks("run", 0.2, [Plan(seen=file) for file in files])
    assert [rank.wait() for rank in ranks] == [0, 0], ranks[0].text + ranks[1].text
    run = tmp_path / "runs" / "run"
    assert processes_of(run) == 2
    # A bad image comes once in each epoch; the image that stands in for it comes twice.
    keys = [[key for batches in seen(file).values() for key in batches[0]["fields"][0]] for file in files]
    assert not set(BAD_KEYS) & {*keys[0], *keys[1]}
    substitutes = [Counter(part)["train_002"] + Counter(part)["train_007"] for part in keys]
    assert sum(substitutes) == 20
    assert all(substitutes)
    told = [line for line in ranks[0].text.splitlines() if "fields: skipped: " in line]
    assert [sum(repr(key) in line for line in told) for key in BAD_KEYS] == [5, 5]
    assert "skipped: " not in ranks[1].text
    assert [
        line[f"data/fields/skipped/{REASON}"] for line in logged(run) if "lr" in line and line["step"] % 5 == 0
    ] == [2, 4, 6, 8, 10]
    assert state_of(run, 25)["images"] == {
        "fields": {"read": 60, "skipped": {REASON: 10}},
        "shapes": {"read": 50, "skipped": {}},
    }
    figure("B18", "2 ranks: skipped images counted and told over both")


def test_b18_all_processes_end_at_the_same_step_when_their_bad_images_together_are_too_many(
    two_ranks: Callable[..., list[Started]], tmp_path: Path, figure: Callable[[str, str], None]
) -> None:
    """Two bad ones of ten, when one is allowed."""
    files = [tmp_path / "seen0", tmp_path / "seen1"]
    ranks = two_ranks("run", 0.15, [Plan(seen=file) for file in files])
    assert [rank.wait() for rank in ranks] == [2, 2], ranks[0].text + ranks[1].text
    assert processes_of(tmp_path / "runs" / "run") == 2
    (line,) = ranks[0].errors
    assert line.startswith("error: fields: 2 of ")
    assert f"images cannot be used (2 x {REASON}), more than data.max_bad_fraction 0.15 allows" in line
    assert not ranks[1].errors
    assert "Traceback" not in ranks[0].text + ranks[1].text
    steps_taken = [len(seen(file)) for file in files]
    assert steps_taken[0] == steps_taken[1] <= 5
    figure("B18", "2 ranks end at the same step with one line when their bad images together are too many")


def test_b18_counts_of_bad_images_go_on_with_a_run_that_was_killed(
    two_ranks: Callable[..., list[Started]], tmp_path: Path, figure: Callable[[str, str], None]
) -> None:
    straight = two_ranks("straight", 0.2, [Plan(), Plan()])
    assert [rank.wait() for rank in straight] == [0, 0], straight[0].text
    killed = two_ranks("run", 0.2, [Plan(send=(13, signal.SIGKILL)), Plan(send=(13, signal.SIGKILL))])
    assert [rank.wait() for rank in killed] == [-signal.SIGKILL] * 2, killed[0].text
    resumed = two_ranks("run", 0.2, [Plan(), Plan()], "resume=auto")
    assert [rank.wait() for rank in resumed] == [0, 0], resumed[0].text
    assert "going on from step 10" in resumed[0].text
    runs = [tmp_path / "runs" / name for name in ("straight", "run")]
    assert state_of(runs[0], 25)["images"] == state_of(runs[1], 25)["images"]
    assert logged(runs[0]) == logged(runs[1])
    assert tensors_of(runs[0]) == tensors_of(runs[1])
    figure("B18", "counts go on with a killed run")
