"""B22: a shard can hold nothing that is run."""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tars import write_tar

from multidomain_cct.data.batches.views import decode
from multidomain_cct.data.domain import Domain, LabelClass
from multidomain_cct.data.shards.reader import BadSample, Shards
from multidomain_cct.data.shards.scan import Extensions, index_shard
from multidomain_cct.errors import UserError

ENDINGS = (
    "pkl",
    "pickle",
    "pyd",
    "pth",
    "pt",
    "npy",
    "npz",
    "so",
    "dill",
    "joblib",
    "PKL",
    "Pth",
    "pkl.gz",
    "jpg.gz",
    "jpg.pkl",
    "py",
    "",
)
DOMAIN = Domain("yard", "folder", {}, (LabelClass("ground", (0, 0, 0)),))


class Payload:
    """Unpickled, it makes a folder."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.canary),)


def payloads(canary: Path) -> dict[str, bytes]:
    """The payload as a plain pickle and inside an array of objects."""
    array = io.BytesIO()
    np.save(array, np.array([Payload(canary)], dtype=object), allow_pickle=True)
    return {"pickle": pickle.dumps(Payload(canary)), "npy": array.getvalue()}


def jpeg() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "JPEG")
    return buffer.getvalue()


def test_b22_members_that_could_be_run_are_refused_by_name(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    canary = tmp_path / "canary"
    tried = 0
    for kind, content in payloads(canary).items():
        for ending in ENDINGS:
            name = f"a.{ending}" if ending else "a"
            path = write_tar(tmp_path / "train-00000.tar", [("a.jpg", jpeg()), (name, content)])
            with pytest.raises(UserError) as error:
                index_shard(path)
            assert repr(name) in str(error.value), kind
            assert str(path) in str(error.value), kind
            with pytest.raises(UserError, match="has no index"):
                Shards.of([path])
            tried += 1
    assert not canary.exists()
    record_property("B22", f"{tried} members refused by name, canary 0")


@pytest.mark.parametrize("ending", ["jpg", "pkl", "npy"])
def test_b22_a_member_that_is_taken_for_an_image_or_mask_is_only_ever_decoded_as_one(
    tmp_path: Path, ending: str
) -> None:
    canary = tmp_path / "canary"
    for content in payloads(canary).values():
        for image, mask in ((content, jpeg()), (jpeg(), content)):
            path = write_tar(tmp_path / "train-00000.tar", [(f"a.{ending}", image), ("a.mask", mask)])
            index_shard(path, extensions=Extensions(image=ending, mask="mask"))
            with pytest.raises(BadSample, match="key 'a': the (image|mask) cannot be read"):
                decode(Shards.of([path]).read(0), DOMAIN)
    assert not canary.exists()
