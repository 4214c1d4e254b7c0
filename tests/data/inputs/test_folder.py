"""A folder with pairs.csv, well made and hostile; and folders that are none of the layouts."""

import os

import pytest

from safetydpo_jax.data.inputs import read_input
from safetydpo_jax.errors import MissingFileError, UserError
from tests.data.inputs.given import HEADER, ROW, encoded, read


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
        ("bad,good,unsafe\\1.png,s.png,", "unsafe picture: backslash in its name: write folder/"),
        ("bad,good,u\0.png,s.png,", "unsafe picture: path that leads out of the"),
        ("bad,good,,s.png,", "unsafe picture: path that leads out of the"),
        ("bad,good,missing.png,s.png,", "unsafe picture: no such picture"),
        ("bad,good,u.png,safe/u.png,", "safe picture: no such picture"),
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


def test_a_file_that_is_too_large(folder, monkeypatch):
    from safetydpo_jax.data.inputs import files

    monkeypatch.setattr(files, "MAX_BYTES", 1000)
    (folder / "s.png").write_bytes(b"x" * 1001)
    assert "file of more than 0 MiB" in read(folder)[1][0]


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
