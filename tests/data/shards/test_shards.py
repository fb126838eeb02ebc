import errno
import io
import json
import os
import resource
import tarfile
import tracemalloc
from collections import Counter, OrderedDict
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image
from safetensors.numpy import save
from tars import write_tar

from multidomain_cct.__main__ import main
from multidomain_cct.data.shards import reader
from multidomain_cct.data.shards.index import ShardIndex, index_path
from multidomain_cct.data.shards.reader import Shards
from multidomain_cct.data.shards.scan import Extensions, index_shard, scan_shard
from multidomain_cct.data.shards.writer import ShardWriter
from multidomain_cct.errors import UserError


def jpeg(shade: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6), (shade, shade, shade)).save(buffer, "JPEG")
    return buffer.getvalue()


def png(train_id: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((6, 8), train_id, dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def write_split(folder: Path, count: int = 5, **options: int) -> list[Path]:
    with ShardWriter(folder, "train") as writer:
        for number in range(count):
            if options.get("per_shard") and number and number % options["per_shard"] == 0:
                writer.publish()
            writer.write(
                f"image_{number}", image=jpeg(number), mask=png(number) if number % 2 == 0 else None, meta=b"{}"
            )
    return writer.finished


def test_samples_read_back_by_number_with_their_bytes(tmp_path: Path) -> None:
    write_split(tmp_path, per_shard=2)
    shards = Shards.open(tmp_path, "train")
    assert list(shards.keys) == [f"image_{n}" for n in range(5)]
    assert shards.numbers(labelled=True).tolist() == [0, 2, 4]
    assert shards.catalogue.samples.tolist() == [2, 2, 1]
    for number in (4, 0, 3):
        record = shards.read(number)
        assert record.key == f"image_{number}"
        assert record.image == jpeg(number)
        assert record.mask == (png(number) if number % 2 == 0 else None)


def test_an_unlabelled_read_opens_no_mask(tmp_path: Path) -> None:
    write_split(tmp_path)
    assert Shards.open(tmp_path, "train").read(0, with_mask=False).mask is None


@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning"
)  # webdataset leaves its file to the collector
def test_plain_webdataset_reads_the_shards(tmp_path: Path) -> None:
    (path,) = write_split(tmp_path)
    samples = list(webdataset.WebDataset(str(path), shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == [f"image_{n}" for n in range(5)]
    assert samples[2]["jpg"] == jpeg(2)
    assert samples[2]["png"] == png(2)
    assert "png" not in samples[1]


def test_writing_twice_gives_equal_bytes(tmp_path: Path) -> None:
    first, second = write_split(tmp_path / "a"), write_split(tmp_path / "b")
    assert [p.read_bytes() for p in first] == [p.read_bytes() for p in second]
    assert [index_path(p).read_bytes() for p in first] == [index_path(p).read_bytes() for p in second]


def test_an_error_while_writing_leaves_no_unfinished_shard(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), ShardWriter(tmp_path, "train") as writer:
        writer.write("a", image=jpeg(1), mask=None, meta=b"{}")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_packing_left_is_removed_by_the_next(tmp_path: Path) -> None:
    left, other = tmp_path / ".train-00000.tar.123.tmp", tmp_path / ".train-extra-00000.tar.123.tmp"
    left.touch()
    other.touch()
    write_split(tmp_path)
    assert not left.exists()
    assert other.exists()


def test_a_foreign_shard_is_indexed_with_its_own_endings(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "train-00000.tar", [("a.image.png", b"x"), ("a.mask.png", b"y"), ("b.image.png", b"z")])
    index = index_shard(path, extensions=Extensions(image="image.png", mask="mask.png"))
    assert index.keys == ("a", "b")
    assert Shards.of([path]).read(0).mask == b"y"
    assert Shards.of([path]).read(1).image == b"z"


def damaged(tmp_path: Path, trouble: str) -> Path:
    path = tmp_path / "train-00000.tar"
    whole = [("a.jpg", b"a" * 600), ("a.png", b"b"), ("b.jpg", b"c" * 600)]
    if trouble == "duplicate key":
        return write_tar(path, [*whole, ("a.json", b"{}")])
    if trouble == "duplicate member":
        return write_tar(path, [("a.jpg", b"1"), ("a.jpg", b"2")])
    if trouble == "no image":
        return write_tar(path, [("a.png", b"1")])
    if trouble == "member that could be run":
        return write_tar(path, [("a.jpg", b"1"), ("a.pkl", b"2")])
    if trouble == "upward path":
        return write_tar(path, [("../a.jpg", b"1")])
    if trouble == "link":
        with tarfile.open(path, "w") as tar:
            member = tarfile.TarInfo("a.jpg")
            member.type, member.linkname = tarfile.SYMTYPE, "elsewhere"
            tar.addfile(member)
        return path
    content = bytearray(write_tar(path, whole).read_bytes())
    if trouble == "no end marker":
        content = content[: 512 + 1024 + 512 + 512 + 512 + 1024]
    if trouble == "cut member":
        content = content[: 512 + 1024 + 512 + 512 + 512 + 100]
    if trouble == "bad header":
        content[512 + 1024 + 3] ^= 0xFF
    if trouble == "not a tar":
        content = bytearray(b"no tar" * 200)
    if trouble == "empty":
        content = bytearray(10240)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("trouble", "message"),
    [
        ("duplicate key", "'a' appears twice"),
        ("duplicate member", "'a.jpg' appears twice"),
        ("no image", "has no image"),
        ("member that could be run", "ending .pkl"),
        ("upward path", "no usable name"),
        ("link", "not a regular file"),
        ("no end marker", "end marker is missing"),
        ("cut member", "cut off"),
        ("bad header", "not a tar header"),
        ("not a tar", "not an uncompressed tar"),
        ("empty", "holds no samples"),
    ],
)
def test_what_a_streaming_reader_would_swallow_is_refused(tmp_path: Path, trouble: str, message: str) -> None:
    path = damaged(tmp_path, trouble)
    with pytest.raises(UserError, match=message) as error:
        scan_shard(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_bytes_that_changed_after_indexing_are_named(tmp_path: Path) -> None:
    (path,) = write_split(tmp_path)
    content = bytearray(path.read_bytes())
    content[700] ^= 1
    path.write_bytes(content)
    shards = Shards.of([path])
    with pytest.raises(UserError, match="key 'image_0': the bytes differ"):
        shards.read(0)


def test_a_shard_without_index_names_the_command(tmp_path: Path) -> None:
    (path,) = write_split(tmp_path)
    index_path(path).unlink()
    with pytest.raises(UserError, match=r"python -m multidomain_cct index .*train-00000.tar"):
        Shards.of([path])


def test_an_index_of_another_file_is_refused(tmp_path: Path) -> None:
    (path,) = write_split(tmp_path)
    path.write_bytes(path.read_bytes() + b"\0" * 512)
    with pytest.raises(UserError, match="its index was made for"):
        Shards.of([path])


def test_a_damaged_index_is_refused(tmp_path: Path) -> None:
    (path,) = write_split(tmp_path)
    index_path(path).write_bytes(index_path(path).read_bytes()[:50])
    with pytest.raises(UserError, match="index is damaged"):
        Shards.of([path])


def test_absent_shards_name_the_pack_command(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"has no val shards. Make them: python -m multidomain_cct pack camvid --raw FOLDER --split val"
    ):
        Shards.open(tmp_path / "camvid", "val")


def test_a_key_in_two_shards_is_refused(tmp_path: Path) -> None:
    paths = [write_tar(tmp_path / f"train-0000{n}.tar", [("a.jpg", b"1")]) for n in range(2)]
    for path in paths:
        index_shard(path)
    with pytest.raises(UserError, match="'a' is in more than one shard"):
        Shards.of(paths)


def test_the_fingerprint_changes_with_content(tmp_path: Path) -> None:
    write_split(tmp_path / "a", 5)
    write_split(tmp_path / "b", 4)
    prints = {Shards.open(tmp_path / name, "train").fingerprint for name in "ab"}
    assert len(prints) == 2


def test_the_shards_of_an_interrupted_packing_are_refused_with_the_command_that_goes_on(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "yard", "train", note=lambda: {"total": 5}) as writer:
        for number in range(3):
            writer.write(f"image_{number}", image=jpeg(number), mask=None, meta=b"{}")
    with pytest.raises(
        UserError,
        match=r"hold 3 of 5 images; packing was interrupted.*python -m multidomain_cct pack yard --raw FOLDER --split "
        r"train",
    ):
        Shards.open(tmp_path / "yard", "train")


def test_indexing_again_keeps_what_the_writer_noted_unless_the_contents_changed(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, "train", note=lambda: {"plan": "abc"}) as writer:
        writer.write("a", image=jpeg(1), mask=None, meta=b"{}")
    path = writer.finished[0]
    assert index_shard(path).notes == {"plan": "abc"}
    content = bytearray(path.read_bytes())
    content[600] ^= 1
    path.write_bytes(content)
    assert index_shard(path).notes == {}


def test_a_split_opens_by_its_catalogue_and_reads_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_split(tmp_path, per_shard=2)
    plain = Shards.open(tmp_path, "train")
    assert main(["index", "--catalogue", str(tmp_path / "train-00001.tar")]) == 0
    assert "train.catalogue: 5 samples in 3 shard(s)" in capsys.readouterr().out
    listed = Shards.open(tmp_path, "train")
    assert list(listed.keys) == list(plain.keys)
    assert listed.numbers(labelled=True).tolist() == plain.numbers(labelled=True).tolist()
    assert listed.fingerprint == plain.fingerprint
    assert [listed.read(number) for number in (4, 0, 3)] == [plain.read(number) for number in (4, 0, 3)]


def test_a_catalogue_of_other_shards_is_refused(tmp_path: Path) -> None:
    paths = write_split(tmp_path, per_shard=2)
    main(["index", "--catalogue", str(paths[0])])
    write_tar(paths[1], [("b.jpg", jpeg(1))])
    index_shard(paths[1])
    shards = Shards.open(tmp_path, "train")
    with pytest.raises(UserError, match=r"train-00001.tar.idx is not the index that was counted .*index --catalogue"):
        shards.read(2)
    paths[2].unlink()
    with pytest.raises(UserError, match=r"train.catalogue lists other shards than there are \(train-00002.tar\)"):
        Shards.open(tmp_path, "train")


def test_few_indexes_and_files_are_open_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_split(tmp_path, per_shard=1)
    monkeypatch.setattr(reader, "INDEX_BYTES", 300)
    monkeypatch.setattr(reader, "OPEN_FILES", 2)
    monkeypatch.setattr(reader, "_descriptors", OrderedDict())
    shards = Shards.open(tmp_path, "train")
    for _ in range(2):
        assert [shards.read(number).image for number in range(5)] == [jpeg(number) for number in range(5)]
        assert len(shards._indexes) <= 2
        assert len(reader._descriptors) == 2


def test_verifying_names_the_field_that_changed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (path,) = write_split(tmp_path)
    assert main(["index", "--verify", str(path)]) == 0
    assert "5 samples, as they were indexed" in capsys.readouterr().out
    index = ShardIndex.load(index_path(path))
    whole = path.read_bytes()
    for place, message in (
        (index.offset[2, 1] + 9, "key 'image_2': the mask differs"),
        (index.offset[2, 0] - 300, "a tar header or padding differs"),
    ):
        content = bytearray(whole)
        content[place] ^= 1
        path.write_bytes(content)
        assert main(["index", "--verify", str(path)]) == 2
        assert message in capsys.readouterr().err


def test_an_index_of_an_earlier_version_is_refused_and_made_again_with_its_notes(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, "train", note=lambda: {"plan": "abc"}) as writer:
        writer.write("a", image=jpeg(1), mask=None, meta=b"{}")
    path = writer.finished[0]
    index = ShardIndex.load(index_path(path))
    facts = {"schema": "multidomain_cct.index.1", "shard_bytes": index.shard_bytes, "notes": index.notes}
    arrays = {
        "keys": np.frombuffer(b"a", dtype=np.uint8),
        "offset": index.offset,
        "size": index.size,
        "crc32": index.crc32,
    }
    index_path(path).write_bytes(save(arrays, metadata={"index": json.dumps(facts)}))
    with pytest.raises(UserError, match=r"has the schema 'multidomain_cct.index.1'.*python -m multidomain_cct index"):
        Shards.of([path])
    assert index_shard(path).notes == {"plan": "abc"}
    assert len(Shards.of([path])) == 1


# Shards that somebody else wrote


def test_what_is_not_part_of_a_sample_is_counted_and_passed_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "train-00000.tar"
    with tarfile.open(path, "w") as tar:
        folder = tarfile.TarInfo("dataset")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for name in ("dataset/._a.jpg", "dataset/a.jpg", "dataset/a.txt", "dataset/a.PNG", "dataset/b.jpg"):
            member = tarfile.TarInfo(name)
            member.size = 2
            tar.addfile(member, io.BytesIO(b"{}"))
    assert main(["index", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "2 samples, 1 with a mask" in printed
    for skipped in ("1 x folder", "1 x hidden file", "1 x .txt"):
        assert skipped in printed
    assert list(Shards.of([path]).keys) == ["dataset/a", "dataset/b"]


@pytest.mark.parametrize("ending", ["JPG", ".jpg", ".JPG", "jpg"])
def test_an_ending_may_have_a_dot_and_any_case(tmp_path: Path, ending: str) -> None:
    path = write_tar(tmp_path / "train-00000.tar", [("a.JPG", b"x"), ("b.jpg", b"y")])
    assert index_shard(path, extensions=Extensions(image=ending)).keys == ("a", "b")


def test_images_with_the_default_ending_of_masks_are_images(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "train-00000.tar", [("a.png", b"x"), ("b.png", b"y")])
    assert (index_shard(path, extensions=Extensions(image="png")).size[:, 1] == -1).all()


def test_other_endings_of_images_are_named(tmp_path: Path) -> None:
    path = tmp_path / "train-00000.tar"
    for members in ([("a.jpeg", b"x"), ("a.json", b"{}")], [("a.jpeg", b"x")]):
        write_tar(path, members)
        with pytest.raises(UserError, match=r"no (image|samples) \(.jpg\). Passed over 1 x .jpeg.* another --image"):
            scan_shard(path, skipped=Counter())


@pytest.mark.parametrize(
    ("name", "needed"),
    [
        ("00000.tar", "train-00000.tar"),
        ("train_00003.tar", "train-00003.tar"),
        ("val.tar", "val-00000.tar"),
        ("train-00000.TAR", "train-00000.tar"),
    ],
)
def test_a_shard_that_training_would_not_find_is_told_the_name_it_needs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, needed: str
) -> None:
    path = write_tar(tmp_path / name, [("a.jpg", b"x")])
    assert main(["index", str(path)]) == 2
    assert str(tmp_path / needed) in " ".join(capsys.readouterr().err.split())
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(("name", "remedy"), [("", "Name its shards"), ("train-00007.tar", "there is no such shard")])
def test_what_is_no_shard_is_said_to_be_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, remedy: str
) -> None:
    assert main(["index", str(tmp_path / name)]) == 2
    assert remedy in " ".join(capsys.readouterr().err.split())


def test_absent_shards_name_the_tar_that_is_there_under_another_name(tmp_path: Path) -> None:
    write_tar(tmp_path / "00000.tar", [("a.jpg", b"x")])
    with pytest.raises(UserError, match=r"It holds 00000.tar; a shard is named such as val-00000.tar"):
        Shards.open(tmp_path, "val")


# Hostile surroundings


def test_an_emptied_shard_is_said_to_have_0_bytes(tmp_path: Path) -> None:
    (path,) = write_split(tmp_path)
    path.write_bytes(b"")
    for read in (Shards.of, lambda paths: scan_shard(paths[0])):
        with pytest.raises(UserError, match="has 0 bytes"):
            read([path])


@pytest.mark.parametrize("trouble", ["removed", "emptied"])
def test_a_shard_that_is_lost_after_opening_is_one_line(tmp_path: Path, trouble: str) -> None:
    (path,) = write_split(tmp_path)
    shards = Shards.of([path])
    path.unlink() if trouble == "removed" else path.write_bytes(b"")
    with pytest.raises(UserError, match=r"train-00000.tar .*(Bring it back|Copy it again)"):
        shards.read(0)


def test_a_folder_that_may_not_be_read_is_said_to_be_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(folder: Path) -> list[str]:
        raise PermissionError(errno.EACCES, "Permission denied", str(folder))

    monkeypatch.setattr(os, "listdir", refuse)
    with pytest.raises(UserError, match="cannot be read: Permission denied"):
        Shards.open(tmp_path, "train")


@pytest.mark.parametrize(("allowed", "most"), [(12, 3), (1, 1), (1024, 10), (resource.RLIM_INFINITY, 10)])
def test_a_process_has_few_shards_open_where_few_files_may_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, allowed: int, most: int
) -> None:
    monkeypatch.setattr(reader, "_descriptors", OrderedDict())
    monkeypatch.setattr(resource, "getrlimit", lambda _: (allowed, allowed))
    for shards in [Shards.of(write_split(tmp_path / name, per_shard=1)) for name in "ab"]:
        assert [shards.read(number).image for number in range(5)] == [jpeg(number) for number in range(5)]
    assert len(reader._descriptors) == most


def test_descriptors_of_a_shard_that_was_packed_again_are_its_own(tmp_path: Path) -> None:
    for shade in (3, 7):
        with ShardWriter(tmp_path, "train") as writer:
            writer.write("a", image=jpeg(shade), mask=None, meta=b"{}")
        assert Shards.open(tmp_path, "train").read(0).image == jpeg(shade)


def test_a_large_member_and_a_long_tail_are_read_in_pieces(tmp_path: Path) -> None:
    path = tmp_path / "train-00000.tar"
    with tarfile.open(path, "w") as tar, path.open("r+b") as file:
        member = tarfile.TarInfo("a.jpg")
        member.size = 300 << 20
        file.truncate(member.size + 512)
        tar.addfile(member, file)
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size + (300 << 20))
    tracemalloc.start()
    assert scan_shard(path).keys == ("a",)
    assert tracemalloc.get_traced_memory()[1] < 20 << 20
    tracemalloc.stop()


def test_a_header_that_would_fill_the_memory_is_refused(tmp_path: Path) -> None:
    header = tarfile.TarInfo("././@LongLink")
    header.type, header.size = tarfile.GNUTYPE_LONGNAME, 1 << 30
    path = tmp_path / "train-00000.tar"
    path.write_bytes(header.tobuf(tarfile.GNU_FORMAT))
    with path.open("r+b") as file:
        file.truncate(1 << 30)
    with pytest.raises(UserError, match="not an uncompressed tar"):
        scan_shard(path)
