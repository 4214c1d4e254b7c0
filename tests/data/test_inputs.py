"""Pair sets of others, well made and hostile: read, counted, or refused by one clear sentence."""

import io
import json
import os
import tarfile
import tracemalloc
import zipfile

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from safetydpo_jax.data.inputs import picture as picture_module
from safetydpo_jax.data.inputs import read_input
from safetydpo_jax.data.inputs.check import usable
from safetydpo_jax.data.inputs.picture import as_kept
from safetydpo_jax.errors import MissingFileError, UserError

HEADER = "prompt_unsafe,prompt_safe,image_unsafe,image_safe,category\n"
ROW = "bad word,good word,u.png,s.png,hate\n"


def encoded(kind="png", mode="RGB", size=(64, 64), **options):
    noise = np.random.default_rng(sum(size)).integers(0, 256, (8, 8, 3), np.uint8)
    image = Image.fromarray(noise).resize(size).convert(mode)
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.fixture
def folder(tmp_path):
    """A folder with pairs.csv and the two pictures of its one pair."""
    path = tmp_path / "given"
    path.mkdir()
    (path / "pairs.csv").write_text(HEADER + ROW)
    (path / "u.png").write_bytes(encoded(size=(64, 80)))
    (path / "s.png").write_bytes(encoded())
    return path


def read(folder, kind=""):
    """(ids of the usable pairs, reasons of the skipped ones, what was said)."""
    said = []
    found = usable(read_input(folder, kind)[1], said.append)
    return [pair.id for pair in found.pairs], sorted(found.skipped.values()), said


def test_a_folder(folder):
    kind, found = read_input(folder)
    (pair,) = found.pairs
    assert (kind, pair.id, pair.categories) == ("folder", "pair-000000", ("hate",))
    assert (pair.unsafe.prompt, pair.safe.prompt) == ("bad word", "good word")
    assert pair.unsafe.read() == (folder / "u.png").read_bytes()
    ids, skipped, said = read(folder)
    assert (ids, skipped) == (["pair-000000"], [])
    assert said[0].startswith("1/1 pairs decoded")


@pytest.mark.parametrize(
    "text",
    [
        "\ufeff" + HEADER + ROW,
        (HEADER + ROW).replace("\n", "\r\n"),
        HEADER + '"bad, ""bad"" word\nand more",good word,u.png,s.png,hate;violence\n',
        HEADER + "bad word,good word,u.png,s.png,\n",
        "category," + HEADER.replace(",category", ",more") + "hate,bad,good,u.png,s.png,x\n",
    ],
    ids=["mark", "CRLF", "quotes", "no category", "other columns"],
)
def test_tables_that_are_right(folder, text):
    (folder / "pairs.csv").write_bytes(text.encode())
    assert read(folder)[:2] == (["pair-000000"], [])


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("bad,good,../outside.png,s.png,", "unsafe picture: path that leads out of the"),
        ("bad,good,u.png,/etc/passwd,", "safe picture: path that leads out of the"),
        ("bad,good,a/../../outside.png,s.png,", "unsafe picture: path that leads out of the"),
        ("bad,good,..\\outside.png,s.png,", "unsafe picture: path that leads out of the"),
        ("bad,good,u\0.png,s.png,", "unsafe picture: path that leads out of the"),
        ("bad,good,,s.png,", "unsafe picture: path that leads out of the"),
        ("bad,good,missing.png,s.png,", "unsafe picture: no such picture"),
        ("bad,good,link.png,s.png,", "unsafe picture: path that leads out of the"),
        ("bad,good,pipe,s.png,", "unsafe picture: no regular file"),
        ("bad,good,twice.png,s.png,", "unsafe picture: several pictures of this name"),
        (" ,good,u.png,s.png,", "empty prompt"),
        ("b\0d,good,u.png,s.png,", "NUL in a prompt"),
    ],
)
def test_rows_that_are_skipped(folder, row, reason):
    (folder.parent / "outside.png").write_bytes(encoded())
    (folder / "link.png").symlink_to(folder.parent / "outside.png")
    os.mkfifo(folder / "pipe")
    for name in ("a", "b"):
        (folder / name).mkdir()
        (folder / name / "twice.png").write_bytes(encoded())
    (folder / "pairs.csv").write_text(HEADER + row + "\n" + ROW)
    ids, skipped, _ = read(folder)
    assert ids == ["pair-000001"]
    assert len(skipped) == 1
    assert skipped[0].startswith(reason)


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


def test_a_file_that_is_too_large(folder, monkeypatch):
    from safetydpo_jax.data.inputs import files

    monkeypatch.setattr(files, "MAX_BYTES", 1000)
    (folder / "s.png").write_bytes(b"x" * 1001)
    assert "file of more than 0 MiB" in read(folder)[1][0]


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


def test_a_turned_picture_is_turned_back():
    exif = Image.Exif()
    exif[picture_module._ORIENTATION] = 6
    data = encoded("jpeg", size=(64, 96), exif=exif.tobytes())
    assert Image.open(io.BytesIO(as_kept(data))).size == (96, 64)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "the first line lacks the column prompt_unsafe and prompt_safe"),
        (HEADER.encode(), "the table has no rows"),
        ((HEADER + "a,b,c\n").encode(), "line 2: not as many fields"),
        ((HEADER + '"a,b,c,d,e\n').encode(), "line 2: not valid CSV"),
        ((HEADER + "a" * 200_000 + ",b,c,d,e\n").encode(), "line 2: not valid CSV"),
        (HEADER.encode() + b"\xff\xfe,b,c,d,e\n", "not UTF-8"),
        ((HEADER + ROW.replace("hate", "../x")).encode(), "line 2: a category must be 1 to 40"),
        ((HEADER.strip() + ",category\n" + ROW).encode(), "names the column category twice"),
    ],
)
def test_tables_that_are_refused(folder, text, message):
    (folder / "pairs.csv").write_bytes(text)
    with pytest.raises(UserError, match=message):
        read(folder)


def test_folders_that_hold_no_pairs(tmp_path):
    with pytest.raises(MissingFileError, match="there is no such folder"):
        read_input(tmp_path / "none")
    with pytest.raises(UserError, match="does not look like any of coprov2, folder, pickapic"):
        read_input(tmp_path)
    for kind in ("coprov2", "folder", "pickapic", "webdataset"):
        with pytest.raises(MissingFileError):
            read_input(tmp_path, kind)
    with pytest.raises(UserError, match="there is no format 'zarr': there are coprov2"):
        read_input(tmp_path, "zarr")


# CoProV2


@pytest.fixture
def coprov2(tmp_path):
    """Pairs 0 and 1, the second in two categories, and a test prompt of each kind."""
    path = tmp_path / "coprov2"
    path.mkdir()
    rows = ["prompt,image,category"]
    for side in "us":
        rows += [f"{side} zero,{side}_idx_0000000_0.jpg,Hate"]
        rows += [f"{side} one,{side}_idx_0000001_0.jpg,{c}" for c in ("Harrasment", "self-harm")]
    (path / "CoProv2_train.csv").write_text("\n".join(rows))
    test = ["prompt,image,category", "U ONE ,1.jpg,sexual", "two,2.jpg,Illegal Activity"]
    (path / "CoProv2_test.csv").write_text("\n".join(test))
    with zipfile.ZipFile(path / "images.zip", "w") as archive:
        for i, name in enumerate(("u_idx_0000000", "s_idx_0000000", "u_idx_0000001")):
            archive.writestr(f"images/{name}_0.jpg", encoded("jpeg", size=(64, 64 + i)))
        archive.writestr("images/s_idx_0000001_0.jpg", encoded("jpeg", size=(70, 70)))
    return path


def test_coprov2(coprov2):
    kind, found = read_input(coprov2)
    assert kind == "coprov2"
    assert [(p.id, p.categories) for p in found.pairs] == [
        ("coprov2-0000000_0", ("hate",)),
        ("coprov2-0000001_0", ("harassment", "self_harm")),
    ]
    assert [p.unsafe.prompt for p in found.pairs] == ["u zero", "u one"]
    assert [(p.category, p.in_train) for p in found.test] == [
        ("sexual", True),
        ("illegal_activity", False),
    ]
    assert len(read(coprov2)[0]) == 2


def test_coprov2_in_a_folder(coprov2):
    with zipfile.ZipFile(coprov2 / "images.zip") as archive:
        archive.extractall(coprov2)
    (coprov2 / "images.zip").unlink()
    assert len(read(coprov2)[0]) == 2


def add_row(coprov2, row):
    with (coprov2 / "CoProv2_train.csv").open("a") as file:
        file.write(f"\n{row}")


def test_what_is_no_pair_of_coprov2(coprov2):
    add_row(coprov2, "alone,u_idx_0000002_0.jpg,Hate")
    add_row(coprov2, "odd,../u_idx_0000003_0.png.jpg,Hate")
    ids, skipped, _ = read(coprov2)
    assert len(ids) == 2
    assert skipped == ["pair without its safe picture", "picture named neither u_idx nor s_idx"]


def test_an_unknown_category_is_not_shown(coprov2):
    add_row(coprov2, "hate,u_idx_0000002_0.jpg,some words")
    with pytest.raises(UserError, match="line 8: its category is none of hate") as raised:
        read(coprov2)
    assert "some words" not in str(raised.value)


def test_two_tables_or_archives(coprov2):
    (coprov2 / "b.zip").write_bytes((coprov2 / "images.zip").read_bytes())
    with pytest.raises(UserError, match="several archives: b.zip, images.zip"):
        read(coprov2)
    (coprov2 / "my_train.csv").write_text("prompt,image,category\n")
    with pytest.raises(UserError, match="several tables for train"):
        read(coprov2)


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


# The hub's files of CoProV2, and Pick-a-Pic's


def write_parquet(path, rows, **options):
    path.parent.mkdir(exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=1, **options)


def hub_rows(folder):
    """As the hub's files have them: a row a picture, both pictures' names in each."""
    with zipfile.ZipFile(folder / "images.zip") as archive:
        return [
            {
                "image": {"bytes": archive.read(f"images/{name}"), "path": name},
                "jpg_0": f"images/s_idx_000000{i}_0.jpg",
                "jpg_1": f"images/u_idx_000000{i}_0.jpg",
                "label_0": 1,
                "caption": f"{side} {i}",
            }
            for side in "su"
            for i in (0, 1)
            for name in [f"{side}_idx_000000{i}_0.jpg"]
        ]


def test_the_hubs_files(coprov2, tmp_path):
    rows = hub_rows(coprov2)
    hub = tmp_path / "hub"
    hub.mkdir()
    for i in range(2):
        write_parquet(hub / "data" / f"train-0000{i}-of-00002.parquet", rows[2 * i : 2 * i + 2])
    kind, found = read_input(hub)
    assert kind == "coprov2"
    assert [p.categories for p in found.pairs] == [(), ()]
    table = coprov2 / "CoProv2_train.csv"
    (hub / table.name).write_bytes(table.read_bytes())
    pairs, same = read_input(hub)[1].pairs, read_input(coprov2)[1].pairs
    for pair, other in zip(pairs, same, strict=True):
        assert (pair.id, pair.categories) == (other.id, other.categories)
        assert pair.unsafe.read() == other.unsafe.read()
        assert pair.safe.read() == other.safe.read()
        assert pair.unsafe.prompt == f"u {pairs.index(pair)}"


def test_rows_of_the_hub_that_are_skipped(coprov2, tmp_path):
    rows = hub_rows(coprov2)
    rows[0]["label_0"] = 0
    rows[1]["image"]["path"] = "s_idx_0000009_0.jpg"
    rows[3]["image"]["bytes"] = None
    write_parquet(tmp_path / "hub" / "a.parquet", rows)
    assert read(tmp_path / "hub")[1] == [
        "pair without its safe picture",
        "pair without its safe picture",
        "row that does not prefer the safe picture",
        "row whose picture is none of its pair's",
    ]


def pick(label, **more):
    first, second = encoded("jpeg", size=(64, 65)), encoded("jpeg", size=(64, 66))
    return {"jpg_0": first, "jpg_1": second, "label_0": label, "caption": "words", **more}


def test_pick_a_pic(tmp_path):
    rows = [pick(1.0), pick(0.0), pick(0.5), pick(float("nan")), pick(None)]
    write_parquet(tmp_path / "pick" / "train-0.parquet", rows)
    kind, found = read_input(tmp_path / "pick")
    assert kind == "pickapic"
    assert [p.id for p in found.pairs] == ["row-000000", "row-000001"]
    first, second = found.pairs
    assert first.safe.read() == second.unsafe.read() == rows[0]["jpg_0"]
    assert set(found.skipped.values()) == {"no preference"}
    assert len(read(tmp_path / "pick")[0]) == 2


def test_pick_a_pic_with_more_columns(tmp_path):
    rows = [pick(1, category="violence", has_label=True), pick(1, category="hate", has_label=False)]
    rows[0] |= {"jpg_0": {"bytes": rows[0]["jpg_0"], "path": None}}
    rows[1] |= {"jpg_0": {"bytes": None, "path": None}}
    write_parquet(tmp_path / "pick" / "train-0.parquet", rows)
    (pair,) = read_input(tmp_path / "pick")[1].pairs
    assert pair.categories == ("violence",)
    assert read(tmp_path / "pick")[:2] == (["row-000000"], ["no preference"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"caption": 3}, "the column caption holds no texts"),
        ({"category": ["hate"]}, "the column category holds no texts"),
        ({"jpg_0": "u.jpg"}, "the column jpg_0 holds no files"),
        ({"jpg_1": {"path": "u.jpg"}}, "the column jpg_1 holds no files"),
        ({"label_0": "1"}, "the column label_0 holds no numbers"),
        (
            {"category": "validation"},
            "1 to 40 letters, .* not all or validation",
        ),
    ],
)
def test_columns_of_another_type(tmp_path, change, message):
    write_parquet(tmp_path / "pick" / "train-0.parquet", [pick(1, category="hate") | change])
    with pytest.raises(UserError, match=message):
        read(tmp_path / "pick")


def test_the_hubs_columns_of_another_type(coprov2, tmp_path):
    rows = [row | {"image": row["image"]["bytes"]} for row in hub_rows(coprov2)]
    write_parquet(tmp_path / "hub" / "a.parquet", rows)
    with pytest.raises(UserError, match=r"the column image.path holds no texts"):
        read(tmp_path / "hub")


def test_rows_of_the_hub_without_names(coprov2, tmp_path):
    rows = hub_rows(coprov2)
    rows[0] |= {"jpg_0": None, "jpg_1": None, "image": {**rows[0]["image"], "path": None}}
    write_parquet(tmp_path / "hub" / "a.parquet", rows)
    assert "row whose picture is none of its pair's" in read(tmp_path / "hub")[1]


def test_a_value_that_many_rows_share_is_held_once(tmp_path):
    row = pick(1) | {"jpg_0": bytes(2**20)}
    path = tmp_path / "pick" / "a.parquet"
    path.parent.mkdir()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row] * 200), path)
    (_, found), before = read_input(path.parent), pyarrow.total_allocated_bytes()
    assert len(found.pairs[0].safe.read()) == 2**20
    assert pyarrow.total_allocated_bytes() - before < 20 * 2**20


def test_parquet_that_is_refused(tmp_path):
    path = tmp_path / "pick" / "train-0.parquet"
    write_parquet(path, [{"jpg_0": b"", "jpg_1": b"", "caption": ""}])
    with pytest.raises(UserError, match="lacks the column label_0"):
        read(tmp_path / "pick")
    write_parquet(path.with_name("train-1.parquet"), [pick(1)])
    with pytest.raises(UserError, match="its columns are not those of"):
        read(tmp_path / "pick")
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match="no parquet file, or a damaged one"):
        read(tmp_path / "pick")


# WebDataset


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
