"""Shards at an address, behind a server that misbehaves in every way."""

from __future__ import annotations

import hashlib
import io
import multiprocessing
import os
import sys
from collections.abc import Iterator
from email.message import Message
from pathlib import Path
from typing import Any, ClassVar
from urllib.error import HTTPError
from urllib.request import Request

import fsspec
import numpy as np
import pytest
from file_server import Server, serving
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry
from PIL import Image

from multidomain_cct.__main__ import main
from multidomain_cct.data.batches.loader import TrainingSet, steps
from multidomain_cct.data.batches.streams import DataSettings, DomainSettings, open_streams
from multidomain_cct.data.batches.views import Augment
from multidomain_cct.data.domain import Domain, LabelClass, Split
from multidomain_cct.data.shards import reader
from multidomain_cct.data.shards.cache import FileCache
from multidomain_cct.data.shards.download import (
    Patience,
    SameProtocols,
    SourceError,
    download,
    open_with_fsspec,
    require_address,
)
from multidomain_cct.data.shards.reader import Shards
from multidomain_cct.data.shards.sources import RemoteFolder
from multidomain_cct.data.shards.writer import ShardWriter
from multidomain_cct.errors import UserError

QUICK = Patience(attempts=5, wait=0.01, stall=0.5, grace=2.0)
DOMAIN = Domain("yard", "folder", {"train": Split("*.jpg")}, (LabelClass("ground", (0, 0, 0)),))
SAMPLES = 24


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """A server of six shards with their catalogue."""
    folder = tmp_path / "served"
    with ShardWriter(folder, "train") as writer:
        for number in range(SAMPLES):
            image = io.BytesIO()
            Image.fromarray(np.random.default_rng(number).integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(
                image, "JPEG"
            )
            writer.write(f"{number:02d}", image=image.getvalue(), mask=None, meta=b"{}")
            if number % 4 == 3 and number + 1 < SAMPLES:
                writer.publish()
    assert main(["index", "--catalogue", str(folder / "train-00000.tar")]) == 0
    with serving(folder) as running:
        yield running


def opened(server: Server, cache: Path, max_bytes: int = 2**30) -> Shards:
    source = RemoteFolder(server.address, FileCache(cache, max_bytes, QUICK))
    return Shards(source, source.catalogue("train"))


def contents(shards: Shards) -> list[tuple[str, bytes]]:
    return [(record.key, record.image) for record in map(shards.read, range(len(shards)))]


@pytest.mark.parametrize("fault", ["drop", "500", "503", "truncate", "stall", "slow", "other bytes", "no ranges"])
def test_no_sample_is_lost_to_a_server_that_makes_trouble_twice_with_every_file(
    server: Server, tmp_path: Path, fault: str
) -> None:
    local = contents(Shards.open(server.folder, "train"))
    server.everywhere = [fault, fault]
    if fault == "other bytes":
        # The catalogue says what all others have to be; a false one is refused for its own checksum, not fetched again.
        server.faults["train.catalogue"] = []
    if fault == "no ranges":
        server.everywhere = ["truncate", fault]
    assert contents(opened(server, tmp_path / "cache")) == local


@pytest.mark.parametrize("fault", ["drop", "500", "truncate", "stall", "other bytes"])
def test_a_file_that_never_comes_ends_in_one_line_after_a_bounded_number_of_attempts(
    server: Server, tmp_path: Path, fault: str
) -> None:
    shards = opened(server, tmp_path / "cache")
    # What comes in halves is whole after a few more attempts than these.
    server.faults["train-00002.tar"] = [fault] * 99
    with pytest.raises(SourceError, match=r"train-00002.tar: not fetched in 5 attempts \(the last: .+\)") as error:
        contents(shards)
    assert server.requests["train-00002.tar"] == 5
    assert "\n" not in str(error.value)


# The server sends 1000 bytes a second.
HURRIED = Patience(attempts=3, wait=0.01, stall=5.0, grace=0.3, least_rate=4000.0)


def test_a_server_that_trickles_below_the_least_rate_is_given_up_and_asked_again_from_there(
    server: Server, tmp_path: Path
) -> None:
    """The whole file would be allowed some seconds at this rate; what has come, a fraction of one."""
    name = "train-00002.tar"
    server.faults[name] = ["trickle"] * 99
    with pytest.raises(SourceError, match=rf"{name}: not fetched in 3 attempts \(the last: less than 4 KiB a second\)"):
        download(f"{server.address}/{name}", tmp_path / "a", patience=HURRIED)
    starts = server.starts[name]
    assert len(starts) == 3
    assert (
        0
        == starts[0]
        < starts[1]
        < starts[2]
        < (tmp_path / "a").stat().st_size
        < (server.folder / name).stat().st_size / 4
    )
    server.faults[name] = []
    download(f"{server.address}/{name}", tmp_path / "a", patience=HURRIED)
    assert (tmp_path / "a").read_bytes() == (server.folder / name).read_bytes()
    assert server.starts[name][3] > starts[2]


def test_a_file_of_unknown_length_may_take_longer_than_the_grace_when_it_comes_fast_enough(
    server: Server, tmp_path: Path
) -> None:
    name = "train-00002.tar"
    server.faults[name] = ["no length"]
    download(f"{server.address}/{name}", tmp_path / "a", patience=Patience(attempts=1, grace=0.1, least_rate=1000.0))
    assert (tmp_path / "a").read_bytes() == (server.folder / name).read_bytes()


@pytest.mark.parametrize("fault", ["403", "redirect file:///etc/passwd", "redirect ftp://127.0.0.1/a"])
def test_what_will_not_change_is_not_tried_again(server: Server, tmp_path: Path, fault: str) -> None:
    shards = opened(server, tmp_path / "cache")
    server.faults["train-00000.tar.idx"] = [fault] * 99
    with pytest.raises(SourceError, match="train-00000.tar.idx: HTTP"):
        shards.read(0)
    assert server.requests["train-00000.tar.idx"] == 1
    with pytest.raises(SourceError, match=r"val.catalogue: HTTP 404"):
        RemoteFolder(server.address, FileCache(tmp_path / "cache", 2**30, QUICK)).catalogue("val")


@pytest.mark.parametrize(("old", "new"), [("https", "https"), ("http", "http"), ("http", "https")])
def test_redirections_that_keep_or_gain_encryption_are_followed(old: str, new: str) -> None:
    followed = SameProtocols().redirect_request(Request(f"{old}://a/b"), None, 302, "", Message(), f"{new}://c/d")
    assert followed is not None
    assert followed.full_url == f"{new}://c/d"


@pytest.mark.parametrize(("old", "new"), [("https", "http"), ("https", "ftp"), ("http", "file")])
def test_redirections_that_lose_encryption_or_leave_http_are_refused(old: str, new: str) -> None:
    with pytest.raises(HTTPError, match="redirected to another protocol") as error:
        SameProtocols().redirect_request(Request(f"{old}://a/b"), None, 302, "", Message(), f"{new}://c/d")
    error.value.close()


def test_the_cache_stays_within_its_size_and_fetches_again_what_it_let_go(server: Server, tmp_path: Path) -> None:
    cache, size = tmp_path / "cache", max(path.stat().st_size for path in server.folder.iterdir())
    shards = opened(server, cache, max_bytes=3 * size)
    local = contents(Shards.open(server.folder, "train"))
    for _ in range(2):
        assert contents(shards) == local
        reader._descriptors.clear()
        assert sum(path.stat().st_size for path in cache.iterdir()) <= 3 * size
    with pytest.raises(UserError, match="data.cache_gib is"):
        opened(server, tmp_path / "small", max_bytes=size - 1).read(0)


def _digest(address: str, cache: str, max_bytes: int, results: str) -> None:
    source = RemoteFolder(address, FileCache(Path(cache), max_bytes, QUICK))
    digest = hashlib.sha256(repr(contents(Shards(source, source.catalogue("train")))).encode()).hexdigest()
    Path(results, f"{os.getpid()}").write_text(digest)


def test_processes_share_the_cache_and_fetch_each_file_once(server: Server, tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    context = multiprocessing.get_context("fork")
    arguments = (server.address, str(tmp_path / "cache"), 2**30, str(tmp_path / "results"))
    processes = [context.Process(target=_digest, args=arguments) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    found = [path.read_text() for path in (tmp_path / "results").iterdir()]
    assert len(found) == 3
    assert set(found) == {hashlib.sha256(repr(contents(Shards.open(server.folder, "train"))).encode()).hexdigest()}
    assert all(count == 1 for name, count in server.requests.items() if not name.endswith("catalogue"))


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_reads_remote_shards_in_windows_and_sees_every_sample_once(
    server: Server, tmp_path: Path, workers: int
) -> None:
    data = DataSettings(
        shards=str(tmp_path / "none"),
        unlabelled_batch=4,
        crop=[16, 16],
        window=2,
        remote=["http"],
        cache=str(tmp_path / "cache"),
        cache_gib=0.001,
    )
    streams = open_streams(DOMAIN, DomainSettings(labelled="none", remote=server.address), data)
    batches = list(steps(TrainingSet([streams], seed=1, augment=Augment()), 0, SAMPLES // 4, workers=workers))
    keys = [key for batch in batches for key in batch["yard"].keys]
    assert sorted(keys) == [f"{number:02d}" for number in range(SAMPLES)]
    shards = [int(key) // 4 for key in keys]
    assert all(len(set(shards[start : start + 8])) == 2 for start in range(0, SAMPLES, 8))


@pytest.mark.parametrize(
    ("address", "allowed", "message"),
    [
        ("pipe:cat /etc/passwd", ["http"], "is not an address"),
        ("file:///etc", ["http"], "is not an address"),
        ("-", ["http"], "is not an address"),
        ("http://", ["http"], "is not an address"),
        ("https://host/a?token=hunter2", ["https"], "is not an address"),
        ("https://me:hunter2@host/a", ["https"], "holds a user name or password"),
        ("https://host/a", ["http"], r"allow it: data.remote=\[https\]"),
        ("http://host/a", [], r"allow it: data.remote=\[http\]"),
    ],
)
def test_an_address_that_is_not_plain_or_not_allowed_is_refused_without_repeating_it(
    address: str, allowed: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message) as error:
        require_address(address, allowed, "domains.yard.remote")
    assert "hunter2" not in str(error.value)


def test_files_of_other_systems_come_through_fsspec_from_where_they_stopped() -> None:
    with fsspec.filesystem("memory").open("/shards/a.tar", "wb") as file:
        file.write(b"0123456789")
    body, start, size = open_with_fsspec("memory://shards/a.tar", 4, protocol="memory")
    assert (body.read(), start, size) == (b"456789", 4, 10)


class LibraryError(Exception):
    """As botocore's errors: of no family that Python knows."""


class BrokenFile(io.BytesIO):
    size = 10

    def read(self, size: int | None = -1) -> bytes:
        raise LibraryError("Response payload is not completed")


class Bucket(MemoryFileSystem):
    """Stands for s3fs, with what its server does in `answers`, one for each opening."""

    protocol = "s3"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    answers: ClassVar[list[Exception | io.BytesIO]] = []

    def __init__(self, config_kwargs: dict[str, float], **options: Any) -> None:
        super().__init__(**options)

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(super()._strip_protocol(path.replace("s3://", "memory://")))

    def _open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        answer = self.answers.pop(0) if self.answers and mode == "rb" else None
        if isinstance(answer, Exception):
            raise answer
        return super()._open(path, mode, **options) if answer is None else answer


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> type[Bucket]:
    monkeypatch.setitem(_registry, "s3", Bucket)
    monkeypatch.setattr(Bucket, "answers", [])
    with Bucket(config_kwargs={}).open("s3://bucket/a.tar", "wb") as file:
        file.write(b"0123456789")
    return Bucket


def test_troubles_of_the_s3_library_are_tried_again_and_end_in_one_line(bucket: type[Bucket], tmp_path: Path) -> None:
    bucket.answers = [LibraryError("Could not connect to the endpoint URL"), BrokenFile()]
    download("s3://bucket/a.tar", tmp_path / "a", patience=QUICK)
    assert (tmp_path / "a").read_bytes() == b"0123456789"
    assert not bucket.answers
    bucket.answers = [LibraryError("Unable to locate\ncredentials")] * 5
    with pytest.raises(
        SourceError, match=r"^s3://bucket/a.tar: not fetched in 5 attempts \(the last: Unable to locate credentials\)"
    ):
        download("s3://bucket/a.tar", tmp_path / "b", patience=QUICK)


@pytest.mark.parametrize(
    ("trouble", "message"),
    [
        (FileNotFoundError("bucket/a.tar"), "there is no such file"),
        (PermissionError("Forbidden"), "it may not be read"),
    ],
)
def test_what_s3_will_not_give_is_asked_for_once(
    bucket: type[Bucket], tmp_path: Path, trouble: Exception, message: str
) -> None:
    bucket.answers = [LibraryError("busy"), trouble, LibraryError("asked again")]
    with pytest.raises(SourceError, match=rf"^s3://bucket/a.tar: {message} \("):
        download("s3://bucket/a.tar", tmp_path / "a", patience=QUICK)
    assert len(bucket.answers) == 1


def test_s3_without_its_package_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(
        UserError, match=r"s3 needs packages that are not installed.*pip install 'multidomain-cct\[remote\]'"
    ):
        download("s3://bucket/a.tar", tmp_path / "a", patience=QUICK)
