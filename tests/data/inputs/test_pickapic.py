"""Pick-a-Pic, in parquet files right and wrong."""

import errno
import os

import pyarrow
import pyarrow.parquet
import pytest

from safetydpo_jax.data.inputs import read_input
from safetydpo_jax.errors import UserError
from tests.data.inputs.given import encoded, read, write_parquet


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


def test_a_value_that_many_rows_share_is_held_once(tmp_path):
    row = pick(1) | {"jpg_0": bytes(2**20)}
    path = tmp_path / "pick" / "a.parquet"
    path.parent.mkdir()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row] * 200), path)
    (_, found), before = read_input(path.parent), pyarrow.total_allocated_bytes()
    assert len(found.pairs[0].safe.read()) == 2**20
    assert pyarrow.total_allocated_bytes() - before < 20 * 2**20


def test_parquet_that_is_refused(tmp_path, monkeypatch):
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

    def refused(*args, **options):
        raise OSError(errno.EMFILE, "too many")

    monkeypatch.setattr(pyarrow.parquet, "ParquetFile", refused)
    with pytest.raises(UserError, match=r"train-0.parquet cannot be read: Too many open files"):
        read(tmp_path / "pick")


def test_no_file_is_held_open(tmp_path):
    for i in range(8):
        write_parquet(tmp_path / "pick" / f"train-{i}.parquet", [pick(2 * i), pick(2 * i + 1)])
    before = len(os.listdir("/proc/self/fd"))
    _, found = read_input(tmp_path / "pick")
    assert all(pair.unsafe.read() for pair in found.pairs)
    assert len(os.listdir("/proc/self/fd")) <= before
