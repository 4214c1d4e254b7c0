import json

import pytest

from safetydpo_jax.data import PairSet, write_pairs
from safetydpo_jax.data.pairs import dataset
from safetydpo_jax.errors import MissingFileError, UserError


def record_file(folder):
    return next(folder.rglob("*-safe.array_record*"))


def test_written_pictures_are_read_back(write, capsys):
    pairs = PairSet(write(), verify=True)
    assert (pairs.num_pairs, pairs.num_preserve) == (5, 3)
    first = next(pairs.pictures("unsafe"))
    assert (first.id, first.prompt, first.seed, first.pixels.shape) == (
        "u0",
        "words u0",
        0,
        (16, 16, 3),
    )
    assert [p.id for p in pairs.pictures("preserve")] == ["p0", "p1", "p2"]
    assert capsys.readouterr() == ("", "")


def test_a_split_in_several_files(write, monkeypatch):
    monkeypatch.setattr(dataset, "PICTURES", 2)
    monkeypatch.setattr(dataset, "AT_ONCE", 3)
    pairs = PairSet(write(), verify=True)
    assert len(list(pairs.folder.rglob("*-unsafe.array_record*"))) == 3
    assert [p.id for p in pairs.pictures("unsafe")] == ["u0", "u1", "u2", "u3", "u4"]
    assert [p.id for p in pairs.pictures("unsafe", range(3, 5))] == ["u3", "u4"]


def test_content_hash_tells_sets_apart(write):
    hashes = [PairSet(write(**kw)).card["content_hash"] for kw in ({}, {"mark": "v"}, {})]
    assert hashes[0] == hashes[2] != hashes[1]


def test_preservation_pictures_may_be_missing(write):
    pairs = PairSet(write(num_preserve=0))
    assert pairs.num_preserve == 0
    assert list(pairs.pictures("preserve")) == []


def test_no_pairs(tmp_path):
    with pytest.raises(UserError, match="no pairs to write"):
        write_pairs(tmp_path / "pairs", [], [], [], {})
    assert not (tmp_path / "pairs").exists()


def test_uneven_sides(write, tmp_path):
    unsafe = list(PairSet(write()).pictures("unsafe"))
    with pytest.raises(UserError, match="5 unsafe and 4 safe pictures are no pairs"):
        write_pairs(tmp_path / "pairs", unsafe, unsafe[1:], [], {})
    assert list(tmp_path.glob("pairs*")) == []


def test_missing_card(write):
    folder = write()
    (folder / "card.json").unlink()
    with pytest.raises(
        MissingFileError,
        match=r"has no card\.json: if a run drew it, remove that folder .* import_pairs",
    ):
        PairSet(folder)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"files": {"a": 1}}'])
def test_card_of_something_else(write, text):
    folder = write()
    (folder / "card.json").write_text(text)
    with pytest.raises(UserError, match=r"card\.json is not a card of this program"):
        PairSet(folder)


def test_other_format(write):
    folder = write()
    card = json.loads((folder / "card.json").read_text())
    (folder / "card.json").write_text(json.dumps(card | {"format": 99}))
    with pytest.raises(UserError, match="pair set of format 99, this program reads 1"):
        PairSet(folder)


def test_missing_file(write):
    folder = write()
    record_file(folder).unlink()
    with pytest.raises(MissingFileError, match=r"listed in card\.json, is not there"):
        PairSet(folder)


def test_cut_file(write):
    folder = write()
    file = record_file(folder)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match="is damaged"):
        PairSet(folder)


@pytest.mark.parametrize("key", ["pythonClassName", "python_class_name", "type"])
def test_features_of_other_modules(key, write):
    """TFDS would import them."""
    folder = write()
    (file,) = folder.rglob("features.json")
    size = len(file.read_text())
    file.write_text(json.dumps({"x": [{key: "os.path"}]}).ljust(size))
    with pytest.raises(UserError, match="asks for os.path: that is no pair set"):
        next(PairSet(folder).pictures("safe"))
    file.write_text("{" * size)
    with pytest.raises(UserError, match="features.json is missing or damaged"):
        next(PairSet(folder).pictures("safe"))


def test_changed_bytes(write):
    folder = write()
    file = record_file(folder)
    data = bytearray(file.read_bytes())
    data[300] ^= 255
    file.write_bytes(data)
    with pytest.raises(UserError, match="is damaged"):
        PairSet(folder, verify=True)
    with pytest.raises(UserError, match=r"record \d of split safe is damaged"):
        list(PairSet(folder).pictures("safe"))
