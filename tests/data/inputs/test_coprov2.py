"""CoProV2 as it is published: tables with pictures, and the files of the hub."""

import zipfile

import pytest

from safetydpo_jax.data.inputs import read_input
from safetydpo_jax.errors import UserError
from tests.data.inputs.given import read, write_parquet


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
