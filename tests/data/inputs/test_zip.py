"""Zips that are damaged, or meant to do harm."""

import tracemalloc
import zipfile

import pytest

from safetydpo_jax.errors import UserError
from tests.data.inputs.given import encoded, read


@pytest.mark.parametrize("data", [b"no zip", b"PK\x03\x04 cut short", b""])
def test_a_damaged_zip(coprov2, data):
    (coprov2 / "images.zip").write_bytes(data)
    with pytest.raises(UserError, match="no zip file, or a damaged one"):
        read(coprov2)


def test_members_of_a_zip_that_are_skipped(coprov2):
    with zipfile.ZipFile(coprov2 / "images.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("u_idx_0000000_0.jpg", bytes(65 * 2**20))  # in 65 kB
        archive.writestr("s_idx_0000000_0.jpg", encoded("jpeg"))
        for place in ("../", "a/"):  # nothing is unpacked: a name that leads out is but a name
            archive.writestr(f"{place}u_idx_0000001_0.jpg", encoded("jpeg"))
        archive.writestr("s_idx_0000001_0.jpg", encoded("jpeg"))
    assert read(coprov2)[1] == [
        "unsafe picture: file of more than 64 MiB",
        "unsafe picture: several pictures of this name",
    ]


def test_a_member_that_is_damaged_or_encrypted(coprov2):
    path = coprov2 / "images.zip"
    with zipfile.ZipFile(path) as archive:
        first, *_, last = archive.infolist()
    data = bytearray(path.read_bytes())
    data[first.header_offset + 100] ^= 255  # its checksum no longer fits
    data[data.rindex(b"PK\x01\x02") + 8] |= 1  # the last member's flag in the directory
    path.write_bytes(data)
    assert last.filename.endswith("s_idx_0000001_0.jpg")
    assert read(coprov2)[1] == [
        "safe picture: encrypted",
        "unsafe picture: file that cannot be read",
    ]


def test_a_member_that_unpacks_to_more_than_it_says(coprov2):
    """Only what it says is unpacked, and that is no picture, or not its whole."""
    path = coprov2 / "images.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("u_idx_0000000_0.jpg", bytes(100 * 2**20))
        archive.writestr("s_idx_0000000_0.jpg", encoded("jpeg"))
    data = bytearray(path.read_bytes())
    at = data.index(b"PK\x01\x02")
    data[at + 24 : at + 28] = (1000).to_bytes(4, "little")
    path.write_bytes(data)
    tracemalloc.start()
    assert "unsafe picture: file that cannot be read" in read(coprov2)[1]
    assert tracemalloc.get_traced_memory()[1] < 20e6
    tracemalloc.stop()


@pytest.mark.parametrize("kind", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_members_that_are_packed_without_a_bound(coprov2, kind):
    with zipfile.ZipFile(coprov2 / "images.zip", "w", kind) as archive:
        for name in ("u_idx_0000000_0.jpg", "s_idx_0000000_0.jpg"):
            archive.writestr(name, encoded("jpeg"))
    assert "unsafe picture: compressed in an uncommon way" in read(coprov2)[1]
