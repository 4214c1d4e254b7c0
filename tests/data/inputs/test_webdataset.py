"""Shards of WebDataset, right and wrong."""

import io
import json
import tarfile

import pytest

from safetydpo_jax.data.inputs import read_input
from safetydpo_jax.errors import UserError
from tests.data.inputs.given import encoded, read


def write_shard(path, members):
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            if isinstance(data, str):
                member.type, member.linkname = tarfile.SYMTYPE, data
                tar.addfile(member)
            else:
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def sample(key, said=None):
    said = {"prompt_unsafe": "bad", "prompt_safe": "good", "category": "hate"} | (said or {})
    return {
        f"{key}.unsafe.jpg": encoded("jpeg", size=(64, 65)),
        f"{key}.safe.png": encoded(),
        f"{key}.json": json.dumps(said).encode(),
    }


def test_shards(tmp_path):
    members = sample("dir/000") | sample("../../001", {"category": ["sexual", "hate"]})
    write_shard(tmp_path / "wds" / "0.tar", members)
    write_shard(tmp_path / "wds" / "1.tar", sample("000"))
    kind, found = read_input(tmp_path / "wds")
    assert kind == "webdataset"
    assert [(p.id, p.categories) for p in found.pairs] == [
        ("shard-000000-000000", ("hate",)),
        ("shard-000000-000001", ("sexual", "hate")),
        ("shard-000001-000000", ("hate",)),
    ]
    assert found.pairs[0].safe.read() == members["dir/000.safe.png"]
    assert len(read(tmp_path / "wds")[0]) == 3


def test_a_sample_without_a_category(tmp_path):
    write_shard(tmp_path / "wds" / "0.tar", sample("0", {"category": None}))
    assert [pair.categories for pair in read_input(tmp_path / "wds")[1].pairs] == [()]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"0.json": b"{"}, "damaged .json"),
        ({"0.json": b"[" * 100_000}, "damaged .json"),
        ({"0.json": b"[]"}, "damaged .json"),
        ({"0.json": b'{"prompt_unsafe": 1, "prompt_safe": "x"}'}, "damaged .json"),
        (
            {"0.json": b'{"prompt_unsafe": "\\ud800", "prompt_safe": "x"}'},
            "prompt that is no text",
        ),
        ({"0.json": b" " * (2**20 + 1)}, "damaged .json"),
        ({"0.safe.png": "/etc/passwd"}, "sample without its .json, .unsafe.jpg or .safe.jpg"),
        ({"0.safe.png": b""}, "safe picture: empty file"),
    ],
)
def test_samples_that_are_skipped(tmp_path, change, reason):
    write_shard(tmp_path / "wds" / "0.tar", sample("0") | change)
    assert read(tmp_path / "wds")[1] == [reason]


def test_shards_that_are_refused(tmp_path):
    path = tmp_path / "wds" / "0.tar"
    write_shard(path, sample("0"))
    whole = path.read_bytes()
    negative = bytearray(whole)
    negative[124:136] = (-512).to_bytes(12, "big", signed=True)
    chksum = sum(negative[:148]) + 8 * 32 + sum(negative[156:512])
    negative[148:156] = b"%06o\0 " % chksum
    for data in (negative, b"no tar", whole[:700], b"\x1f\x8b" + whole):
        path.write_bytes(data)
        with pytest.raises(UserError, match="no tar file, or a damaged or compressed one"):
            read(tmp_path / "wds")
