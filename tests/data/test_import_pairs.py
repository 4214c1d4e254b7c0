"""From CoProV2's layout to pair sets and a TFDS dataset: counted right, resumed, reported."""

import collections
import json
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

import safetydpo_jax.data.coprov2  # noqa: F401 (registers the builder)
from benchmarks.coprov2 import LISTED, NUM_PAIRS, write_coprov2
from launch.import_pairs import main
from safetydpo_jax.csv_file import read_rows
from safetydpo_jax.data import PairSet, PictureFile, make_cache, make_pairs, write_pairs
from safetydpo_jax.data.import_pairs import import_pairs, is_held_out
from safetydpo_jax.data.inputs import read_input
from safetydpo_jax.data.inputs.pair import BadPictureError, InputPair, InputPicture
from safetydpo_jax.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
SHARE = 0.004  # 63 pairs in 65 listings


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A small CoProV2; only to be read."""
    folder = tmp_path_factory.mktemp("coprov2") / "CoProV2"
    write_coprov2(folder, pixels=64, share=SHARE)
    return folder


@pytest.fixture(scope="module")
def imported(source, tmp_path_factory):
    """What it becomes; only to be read."""
    out = tmp_path_factory.mktemp("imported") / "pairs"
    import_pairs(source, out, validation=0.2, progress=lambda line: None)
    return out


def test_a_pair_set_a_category(source, imported):
    found = read_input(source)[1].pairs
    counts = collections.Counter(name for pair in found for name in pair.categories)
    assert sum(counts.values()) == 65
    assert len(found) == 63
    for name, count in counts.items():
        sets = [PairSet(f) for f in (imported / name, imported / "validation" / name) if f.is_dir()]
        assert sum(pairs.num_pairs for pairs in sets) == count
        assert all(pairs.card["settings"]["category"] == name for pairs in sets)
        of_category = {p.id: p for p in found if name in p.categories}
        for pairs in sets:
            sides = zip(pairs.pictures("unsafe"), pairs.pictures("safe"), strict=True)
            for unsafe, safe in sides:
                pair = of_category.pop(unsafe.id)
                assert (unsafe.prompt, safe.prompt) == (pair.unsafe.prompt, pair.safe.prompt)
                assert safe.id == pair.id
                assert safe.pixels.shape == (64, 64, 3)
        assert not of_category


def test_files_are_kept_as_they_came(source, tmp_path):
    pair = read_input(source)[1].pairs[0]
    picture = PictureFile(pair.id, pair.unsafe.prompt, pair.unsafe.read())
    write_pairs(tmp_path / "pairs", [picture], [picture], [], {})
    dataset = tfds.builder_from_directory(tmp_path / "pairs" / "safety_pairs" / "1.0.0")
    raw = dataset.as_data_source("safe", decoders={"image": tfds.decode.SkipDecoding()})
    assert raw[0]["image"] == picture.data
    assert dataset.as_data_source("safe")[0]["image"].shape == (64, 64, 3)


def test_a_cache_is_made_of_them(imported, config, pipeline, tmp_path):
    config.pairs.path = str(imported / "hate")
    cache = make_cache(config, pipeline, tmp_path, lambda line: None)
    moments, _ = cache.read(np.arange(2))
    assert moments["mean"].shape == (2, 4, 4, 3)


def test_pairs_of_another_category_make_no_expert(imported, config, pipeline, tmp_path):
    config.category, config.pairs.path = "hate", str(imported)
    with pytest.raises(UserError, match=rf"this expert is of hate: .*path={imported}/hate$"):
        make_pairs(config, pipeline, tmp_path)
    config.pairs.path = str(imported / "violence")
    with pytest.raises(UserError, match="has pairs of violence, and .* of hate: give pairs"):
        make_pairs(config, pipeline, tmp_path)
    config.category = "all"
    assert make_pairs(config, pipeline, tmp_path, lambda line: None) == imported / "violence"


def test_several_sets_of_others_make_no_expert(source, config, pipeline, tmp_path):
    pair = read_input(source)[1].pairs[0]
    for name in ("gambling", "weapons"):
        sides = [[PictureFile(name, x.prompt, x.read())] for x in (pair.unsafe, pair.safe)]
        card = {"settings": {"category": name}}
        write_pairs(tmp_path / "pairs" / name, sides[0], sides[1], [], card)
    config.category, config.pairs.path = "gambling", str(tmp_path / "pairs")
    with pytest.raises(UserError, match=r"has pairs of weapons, .* give .*path=.*pairs/gambling$"):
        make_pairs(config, pipeline, tmp_path)
    config.pairs.path += "/weapons"  # the same harm by another name, for all that is known
    assert make_pairs(config, pipeline, tmp_path, lambda line: None) == tmp_path / "pairs/weapons"


def test_pairs_of_any_category_make_no_expert_of_one(source, config, pipeline, tmp_path):
    import_pairs(source, tmp_path / "pairs", sets=["all"], progress=lambda line: None)
    config.category, config.pairs.path = "hate", str(tmp_path / "pairs")
    with pytest.raises(UserError, match="has pairs of any category, and this expert is of hate"):
        make_pairs(config, pipeline, tmp_path)
    config.category = "all"
    made = make_pairs(config, pipeline, tmp_path, lambda line: None)
    assert made == tmp_path / "pairs" / "all"


def test_an_input_without_pairs(tmp_path):
    (tmp_path / "in").mkdir()
    tarfile.open(tmp_path / "in" / "0.tar", "w").close()
    with pytest.raises(UserError, match="in holds no pairs"):
        main(["--input", str(tmp_path / "in"), "--out", str(tmp_path / "pairs")])


def test_the_report(imported):
    report = json.loads((imported / "report.json").read_text())
    assert report["format"] == "coprov2"
    assert (report["pairs"], report["in_several_categories"]) == (63, 2)
    assert (report["test_prompts"], report["test_prompts_not_in_train"]) == (32, 29)
    assert report["skipped_ids"] == {}
    with Image.open(imported / "pairs.png") as picture:
        assert picture.size[0] > 400


def test_prompts_to_evaluate_with(imported, source):
    tables = (imported / "test.csv", imported / "test_clean.csv", source / "CoProv2_test.csv")
    test, clean, given = ([row for _, row in read_rows(path, ["prompt"])] for path in tables)
    assert [row["prompt"] for row in test] == [row["prompt"] for row in given]
    assert clean == test[3:]
    assert (test[1]["image"], test[1]["category"]) == ("coprov2-test-00001.png", "sexual")


def test_no_prompt_is_said(source, tmp_path, capsys):
    main(["--input", str(source), "--out", str(tmp_path / "pairs"), "--sets", "hate"])
    said = capsys.readouterr().out + (tmp_path / "pairs" / "report.json").read_text()
    assert "pair sets     " in said
    assert '"quoted"' not in said
    assert "harm" not in said


def test_an_import_goes_on(source, imported, tmp_path):
    out = tmp_path / "pairs"
    shutil.copytree(imported, out)
    before = {f: f.stat().st_mtime_ns for f in out.rglob("card.json")}
    shutil.rmtree(out / "sexual")
    said = []
    import_pairs(source, out, validation=0.2, progress=said.append)
    after = {f: f.stat().st_mtime_ns for f in out.rglob("card.json")}
    changed = {f.parent.name for f in after if before[f] != after[f]}
    assert changed == {"sexual"}
    assert sum("there already" in line for line in said) == len(before) - 1
    assert (
        PairSet(out / "sexual").card["content_hash"]
        == PairSet(imported / "sexual").card["content_hash"]
    )


def test_other_pairs_there(source, imported, tmp_path):
    out = tmp_path / "pairs"
    shutil.copytree(imported, out)
    with pytest.raises(UserError, match="was made with pairs_hash = .* choose another one"):
        import_pairs(source, out, validation=0.5, progress=lambda line: None)


def test_other_pictures_of_the_same_prompts(source, imported, tmp_path):
    """As if the other model's pictures were imported to the same place."""
    given, out = tmp_path / "given", tmp_path / "pairs"
    given.mkdir()
    shutil.copytree(imported, out)
    shutil.copy(source / "CoProv2_train.csv", given)
    shutil.unpack_archive(source / "images.zip", given)
    one, other = sorted((given / "images").glob("u_*"))[:2]
    one.write_bytes(other.read_bytes())
    with pytest.raises(UserError, match="was made with pairs_hash"):
        import_pairs(given, out, validation=0.2, progress=print)


def test_held_back_pairs_of_before_are_not_left(source, imported, tmp_path):
    out = tmp_path / "pairs"
    shutil.copytree(imported, out)
    for name in ("hate", "harassment"):
        shutil.rmtree(out / name)
    with pytest.raises(UserError, match=r"validation/\w+ was made with pairs_hash"):
        import_pairs(source, out, sets=["hate", "harassment"], validation=0, progress=print)


def test_an_output_that_is_the_input(source):
    with pytest.raises(UserError, match="is the input itself"):
        import_pairs(source, source, progress=print)


def test_a_category_of_which_no_pair_can_be_used(source, tmp_path):
    given = tmp_path / "given"
    given.mkdir()
    pair = read_input(source)[1].pairs[0]
    (given / "good.jpg").write_bytes(pair.safe.read())
    (given / "bad.jpg").write_bytes(b"")
    head = "prompt_unsafe,prompt_safe,image_unsafe,image_safe,category\n"
    rows = "bad,good,good.jpg,good.jpg,hate\nworse,good,bad.jpg,good.jpg,violence\n"
    (given / "pairs.csv").write_text(head + rows)
    assert import_pairs(given, tmp_path / "out", validation=0, progress=print) == {"hate": 1}
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["pairs_by_set"] == {"hate": 1, "violence": 0}


def test_no_pairs_left_to_train_on(source, tmp_path):
    with pytest.raises(UserError, match="leaves no pairs to train on, as 63 are held back"):
        import_pairs(source, tmp_path / "pairs", validation=0.99999, progress=print)


@pytest.mark.parametrize("name", ["../out", "all", "Validation", "a b"])
def test_a_category_that_cannot_be(source, tmp_path, name):
    with pytest.raises(UserError, match="the category: a category must be 1 to 40 letters"):
        import_pairs(source, tmp_path / "pairs", category=name, progress=print)


def test_chosen_sets(source, tmp_path):
    counts = import_pairs(source, tmp_path, sets=["all", "hate"], validation=0, progress=print)
    assert counts["all"] == 63
    assert set(counts) == {"hate", "all"}
    assert not (tmp_path / "validation").exists()
    with pytest.raises(UserError, match="no pairs of gambling: there are hate, harassment"):
        import_pairs(source, tmp_path, sets=["gambling"], progress=print)


def test_a_category_for_pairs_without_one(tmp_path, source):
    pair = read_input(source)[1].pairs[0]
    given = tmp_path / "given"
    given.mkdir()
    for side in ("unsafe", "safe"):
        (given / f"{side}.jpg").write_bytes(getattr(pair, side).read())
    head = "prompt_unsafe,prompt_safe,image_unsafe,image_safe,category\n"
    (given / "pairs.csv").write_text(head + "bad,good,unsafe.jpg,safe.jpg,\n")
    said: list[str] = []
    assert import_pairs(given, tmp_path / "a", category="gambling", validation=0) == {"gambling": 1}
    assert import_pairs(given, tmp_path / "b", validation=0, progress=said.append) == {"all": 1}
    assert "name no category" not in "".join(said)
    row = "worse,better,unsafe.jpg,safe.jpg,gambling\n"
    (given / "pairs.csv").write_text(head + "bad,good,unsafe.jpg,safe.jpg,\n" + row)
    counts = import_pairs(given, tmp_path / "c", validation=0, progress=said.append)
    assert counts == {"gambling": 1, "all": 2}
    assert "1 of 2 pairs name no category: only the set 'all' has them" in "".join(said)


def test_a_picture_that_goes_away_meanwhile(source, tmp_path, monkeypatch):
    def gone(data):
        raise BadPictureError("empty file")

    monkeypatch.setattr("safetydpo_jax.data.import_pairs.as_kept", gone)
    with pytest.raises(UserError, match=r"its unsafe picture could be used a while ago, .*empty"):
        import_pairs(source, tmp_path, progress=lambda line: None)
    assert not (tmp_path / "report.json").exists()


@pytest.fixture
def broken(source, tmp_path):
    """The input as a folder, with one empty picture and one that is missing."""
    folder = tmp_path / "broken"
    folder.mkdir()
    shutil.unpack_archive(source / "images.zip", folder)
    shutil.copy(source / "CoProv2_train.csv", folder)
    (folder / "images" / "u_idx_0000003_0.jpg").write_bytes(b"")
    (folder / "images" / "s_idx_0000005_0.jpg").unlink()
    return folder


def test_bad_pairs_are_counted(broken, tmp_path):
    out = tmp_path / "pairs"
    import_pairs(broken, out, progress=print)
    report = json.loads((out / "report.json").read_text())
    assert report["pairs"] == 61
    assert report["skipped_ids"] == {
        "coprov2-0000003_0": "unsafe picture: empty file",
        "coprov2-0000005_0": "safe picture: no such picture",
    }


def test_bad_pairs_are_an_error_if_asked(broken, tmp_path):
    with pytest.raises(UserError, match=r"2 cannot be used and 61 can, .*report\.json lists them"):
        import_pairs(broken, tmp_path / "pairs", strict=True, progress=print)
    assert [f.name for f in (tmp_path / "pairs").iterdir()] == ["report.json"]


def test_no_pair_that_can_be_used(broken, tmp_path):
    for file in (broken / "images").iterdir():
        file.write_bytes(b"x")
    with pytest.raises(UserError, match="63 cannot be used and 0 can"):
        import_pairs(broken, tmp_path / "pairs", progress=print)


@pytest.mark.parametrize("share", [-0.1, 1.0])
def test_a_share_that_cannot_be(source, tmp_path, share):
    with pytest.raises(UserError, match="the validation share is"):
        import_pairs(source, tmp_path, validation=share)


def test_an_output_that_is_a_file(source, tmp_path):
    (tmp_path / "pairs").write_text("")
    with pytest.raises(UserError, match="cannot be used: "):
        main(["--input", str(source), "--out", str(tmp_path / "pairs")])


def test_a_place_that_cannot_be_written(source):
    with pytest.raises(UserError, match="/proc/pairs cannot be used: "):
        main(["--input", str(source), "--out", "/proc/pairs"])


def test_a_full_disk(source, tmp_path):
    """A limit on the size of files stands for it: both end in a failed write."""
    script = (
        "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000));"
        "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    given = ["--input", str(source), "--out", str(tmp_path / "pairs")]
    done = subprocess.run(
        [sys.executable, "-c", script, str(ROOT / "launch" / "import_pairs.py"), *given],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert "could not write" in done.stderr
    assert "free some space" in done.stderr
    assert not list((tmp_path / "pairs").rglob("card.json"))


def test_what_is_held_out():
    def pair(i):
        texts = (f"Bad {i}", f"good {i} ")
        unsafe, safe = (InputPicture(text, lambda: b"") for text in texts)
        return InputPair(f"{i}", unsafe, safe, ())

    held = [is_held_out(pair(i), 0.2) for i in range(2000)]
    assert 320 < sum(held) < 480
    assert all(is_held_out(pair(i), 0.3) for i in range(2000) if held[i])
    other = InputPair("x", InputPicture("bad 0", bytes), InputPicture("GOOD 0", bytes), ("hate",))
    assert is_held_out(other, 0.2) == held[0]
    assert not any(is_held_out(pair(i), 0) for i in range(100))


def test_the_tfds_dataset(source, tmp_path):
    config = tfds.download.DownloadConfig(manual_dir=source)
    built = {}
    for name in ("sd15", "prompts"):
        builder = tfds.builder(f"coprov2/{name}", data_dir=tmp_path)
        builder.download_and_prepare(download_config=config)
        built[name] = builder
    sizes = {s: i.num_examples for b in built.values() for s, i in b.info.splits.items()}
    pairs = read_input(source)[1].pairs
    held_out = [pair.id for pair in pairs if is_held_out(pair, 0.05)]
    assert sizes == {
        "train": 63 - len(held_out),
        "validation": len(held_out),
        "test": 32,
        "test_clean": 29,
    }
    found = {}
    for split in ("train", "validation"):
        for example in built["sd15"].as_data_source(split):
            found[example["id"].decode()] = example
    kinds = built["sd15"].info.features["categories"].feature
    for pair in pairs:
        example = found.pop(pair.id)
        assert example["prompt_unsafe"].decode() == pair.unsafe.prompt
        assert example["image_safe"].shape == (64, 64, 3)
        assert tuple(kinds.int2str(int(i)) for i in example["categories"]) == pair.categories
    assert not found
    assert built["prompts"].as_data_source("test_clean")[0]["id"] == b"coprov2-test-00003"


def test_the_tfds_dataset_counts_what_it_skips(broken, tmp_path):
    builder = tfds.builder("coprov2/sdxl", data_dir=tmp_path)
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(manual_dir=broken))
    assert tfds.builder("coprov2/sdxl", data_dir=tmp_path).info.metadata["skipped"] == {
        "unsafe picture: empty file": 1,
        "safe picture: no such picture": 1,
    }


def test_the_tfds_dataset_without_test_prompts(broken, tmp_path):
    builder = tfds.builder("coprov2/prompts", data_dir=tmp_path)
    with pytest.raises(UserError, match="holds nothing for test or test_clean"):
        builder.download_and_prepare(
            download_config=tfds.download.DownloadConfig(manual_dir=broken)
        )


@pytest.mark.slow
def test_as_many_as_published(tmp_path):
    """The whole set's numbers, with small pictures."""
    write_coprov2(tmp_path / "given", pixels=64)
    counts = import_pairs(tmp_path / "given", tmp_path / "out", validation=0, progress=print)
    spelt = {"Harrasment": "harassment", "self-harm": "self_harm"}
    names = {spelt.get(x, x.lower().replace(" ", "_")): count for x, count in LISTED.items()}
    assert counts == names
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["pairs"] == NUM_PAIRS == 15_690
    assert (report["test_prompts"], report["test_prompts_not_in_train"]) == (8000, 7272)
