"""What may pass as a picture, and how it is kept."""

import io

import numpy as np
import pytest
from PIL import Image

from safetydpo_jax.data.inputs import picture as picture_module
from safetydpo_jax.data.inputs.picture import as_kept
from tests.data.inputs.given import encoded, read


def truncated():
    data = encoded("jpeg", size=(256, 256))
    return data[: len(data) // 2]


def huge():
    """A PNG of 100 megapixels in a few kilobytes."""
    file = io.BytesIO()
    Image.new("1", (10_000, 10_000)).save(file, "png")
    return file.getvalue()


def sixteen_bits():
    file = io.BytesIO()
    Image.fromarray(np.full((64, 64), 40_000, np.uint16)).save(file, "png")
    return file.getvalue()


def animated(kind):
    frames = [Image.new("RGB", (64, 64), colour) for colour in ("red", "blue")]
    file = io.BytesIO()
    frames[0].save(file, kind, save_all=True, append_images=frames[1:])
    return file.getvalue()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty file"),
        (b"<svg></svg>", "damaged, or neither JPEG, PNG nor WebP"),
        (truncated(), "damaged, or neither JPEG, PNG nor WebP"),
        (encoded("gif"), "damaged, or neither JPEG, PNG nor WebP"),
        (encoded("tiff"), "damaged, or neither JPEG, PNG nor WebP"),
        (encoded("png")[:-30], "damaged, or neither JPEG, PNG nor WebP"),
        (encoded(size=(1, 1)), "a side of less than 64 pixels"),
        (encoded(size=(640, 63)), "a side of less than 64 pixels"),
        (huge(), "more than 50 megapixels"),
        (animated("webp"), "animated"),
        (animated("png"), "animated"),
        (sixteen_bits(), "neither 8-bit colour nor grey"),
    ],
)
def test_pictures_that_are_skipped(folder, data, reason):
    (folder / "s.png").write_bytes(data)
    assert read(folder)[:2] == ([], [f"safe picture: {reason}"])


def test_plain_pictures_are_kept_as_they_came():
    for data in (encoded("jpeg"), encoded("png")):
        assert as_kept(data) == data


@pytest.mark.parametrize(
    "data",
    [
        encoded("jpeg", "CMYK"),
        encoded("jpeg", "L"),
        encoded("png", "RGBA"),
        encoded("png", "P"),
        encoded("webp"),
    ],
)
def test_others_become_png(folder, data):
    (folder / "s.png").write_bytes(data)
    assert read(folder)[0] == ["pair-000000"]
    kept = Image.open(io.BytesIO(as_kept(data)))
    assert (kept.format, kept.mode, kept.size) == ("PNG", "RGB", (64, 64))


def test_damaged_exif_costs_no_picture():
    data = encoded(exif=b"Exif\0\0junk")
    assert as_kept(data) == data
    kept = Image.open(io.BytesIO(as_kept(encoded(mode="L", exif=b"Exif\0\0junk"))))
    assert (kept.format, kept.mode) == ("PNG", "RGB")


def test_a_turned_picture_is_turned_back():
    exif = Image.Exif()
    exif[picture_module._ORIENTATION] = 6
    data = encoded("jpeg", size=(64, 96), exif=exif.tobytes())
    assert Image.open(io.BytesIO(as_kept(data))).size == (96, 64)
