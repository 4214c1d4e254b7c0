import functools
import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import jax
import ml_dtypes
import numpy as np
import pytest

from safetydpo_jax.data import Cache, PairSet, cache, encode, encode_part, make_cache
from safetydpo_jax.data.encode import square
from safetydpo_jax.errors import MissingFileError, UserError
from tests.data.conftest import killed_at_the_fourth_shard


@pytest.fixture
def made(config, pipeline, write, tmp_path):
    """Makes the cache of the pairs in tmp_path/run; returns it and what was said."""

    def make():
        said = []
        return make_cache(config, pipeline, tmp_path / "run", said.append), said

    return make


def test_records_are_what_the_model_computes(made, write, pipeline, monkeypatch):
    monkeypatch.setattr(encode, "ENCODE_BATCH", 4)
    pairs = PairSet(write())
    stored, _ = made()
    assert (stored.num_pairs, stored.num_preserve, stored.orientations) == (5, 3, 1)
    pictures = [p for split in ("unsafe", "safe", "preserve") for p in pairs.pictures(split)]
    mean, logvar = pipeline.encode_images(np.stack([p.pixels for p in pictures]))
    records = np.array([12, 0, 7])
    found, told = stored.read(records)
    np.testing.assert_array_equal(found["mean"], mean[records])
    np.testing.assert_array_equal(found["logvar"], logvar[records])
    embeds = pipeline.encode_prompts([pictures[i].prompt for i in records]).prompt_embeds
    np.testing.assert_array_equal(told.prompt_embeds, embeds)
    wanted = pipeline.encode_negative([""]).prompt_embeds[0]
    np.testing.assert_array_equal(stored.null.prompt_embeds, wanted)


def test_what_does_not_fit_the_model_is_counted(made, write, pipeline, monkeypatch, tmp_path):
    write(last_size=8)
    monkeypatch.setattr(type(pipeline), "num_cut", lambda self, prompts: 2)
    _, said = made()
    assert any("pictures are enlarged to 16 px, the first of 8:" in line for line in said)
    assert "cache: 1 of 13 pictures are smaller than 16 px and were enlarged" in said
    assert any("2 of 13 pictures have a prompt of more tokens than" in line for line in said)
    monkeypatch.undo()
    shutil.rmtree(tmp_path / "run")
    write()
    assert not any("enlarged" in line or "tokens" in line for line in made()[1])


def test_mirror_images(made, write, config):
    write()
    config.cache.flip = True
    stored, _ = made()
    plain, mirrored = (stored.read(np.array([2]), np.array([o]))[0] for o in (0, 1))
    assert stored.orientations == 2
    pixels = list(PairSet(stored.folder.parent / "pairs").pictures("unsafe"))[2].pixels
    np.testing.assert_array_equal(
        mirrored["mean"][0], pixels[::4, ::-1][:, ::4] / np.float32(127.5) - 1
    )
    assert not np.array_equal(plain["mean"], mirrored["mean"])


@pytest.mark.parametrize(
    ("dtype", "numpy_dtype"), [("float16", np.float16), ("bfloat16", ml_dtypes.bfloat16)]
)
def test_half_precision(made, write, config, dtype, numpy_dtype):
    write()
    config.cache.dtype = "float32"
    exact = made()[0].read(np.arange(13))[1].prompt_embeds
    config.cache.dtype = dtype
    half = made()[0].read(np.arange(13))[1].prompt_embeds
    assert half.dtype == numpy_dtype
    np.testing.assert_array_equal(half, exact.astype(numpy_dtype))


def test_read_from_disk_as_from_memory(made, write, monkeypatch):
    write()
    held = made()[0]
    monkeypatch.setattr(cache, "IN_MEMORY_BYTES", 0)
    on_disk = made()[0]
    records = np.array([3, 3, 11])
    for orientation in (None, np.zeros(3, int)):
        read = [cache.read(records, orientation) for cache in (on_disk, held)]
        jax.tree.map(np.testing.assert_array_equal, *read)


def test_computed_once(made, write, pipeline, monkeypatch):
    write()
    key = made()[0].key
    monkeypatch.setattr(type(pipeline), "encode_images", None)
    again, said = made()
    assert (again.key, said) == (key, [])


@pytest.mark.parametrize("what", ["pairs", "vae", "text", "compute", "dtype", "flip"])
def test_stale_cache_is_never_used(made, write, config, pipeline, what):
    write()
    key = made()[0].key
    match what:
        case "pairs":
            write(mark="v")
        case "vae":
            (pipeline.path / "vae" / "config.json").write_text("{}")
        case "text":
            (pipeline.path / "tokenizer" / "merges.txt").write_text("a b")
        case "compute":
            pipeline.text_params = {"weight": np.ones(1, np.float16)}
        case "dtype":
            config.cache.dtype = "float16"
        case "flip":
            config.cache.flip = True
    stored, said = made()
    assert stored.key != key
    assert said[0] == "cache: of other pairs, another model or other settings; computed again"


def test_a_killed_computation_goes_on(made, write, monkeypatch):
    write()
    whole = made()[0]
    records = whole.read(np.arange(13))
    (whole.folder / "card.json").unlink()
    shutil.rmtree(whole.folder)
    monkeypatch.setattr(encode, "ENCODE_BATCH", 2)
    with killed_at_the_fourth_shard():
        made()
    assert not whole.folder.exists()
    again, said = made()
    assert said[0] == "cache: encoding 13 pictures in 7 shards, 3 there already"
    assert said[-1].startswith("cache: 7/7 pictures, ")
    jax.tree.map(np.testing.assert_array_equal, again.read(np.arange(13)), records)
    assert not again.folder.with_name("cache.partial").exists()


def test_parts_make_one_cache(made, write, config, pipeline, tmp_path, monkeypatch):
    write()
    whole = made()[0]
    records = whole.read(np.arange(13))
    key = whole.key
    shutil.rmtree(whole.folder)
    monkeypatch.setattr(encode, "ENCODE_BATCH", 2)
    made_by, said = [], []
    for part in ((2, 3), (0, 3), (1, 3)):
        made_by.append(encode_part(config, pipeline, tmp_path / "run", said.append, part))
    assert made_by[:2] == [None, None]
    assert said[0] == "cache: encoding 13 pictures in 7 shards, part 2 of 3: 2 of them"
    assert said[1].startswith("cache: 4/4 pictures, ")
    assert "lacks shards of other parts" in said[2]
    assert made_by[2].key == key
    jax.tree.map(np.testing.assert_array_equal, made_by[2].read(np.arange(13)), records)
    with pytest.raises(UserError, match="part 3 of 3: parts are numbered from 0"):
        encode_part(config, pipeline, tmp_path / "run", said.append, (3, 3))


def test_a_half_removed_cache_is_in_nobodys_way(made, write):
    write()
    folder = made()[0].folder
    (folder / "card.json").unlink()  # as a kill may leave it
    again = made()[0]
    assert again.num_pairs == 5
    assert not folder.with_name("cache.old").exists()


def test_a_twin_of_a_part_may_end_first(made, write, monkeypatch):
    """Its shards are taken from under it; the cache is there, and that is what was wanted."""
    write()
    write_shard, twins = encode._write_shard, []

    def late(file, encoded, dtype):
        if not twins:
            twins.append(file)
            made()
        write_shard(file, encoded, dtype)

    monkeypatch.setattr(encode, "_write_shard", late)
    assert made()[0].num_pairs == 5


def test_shards_of_other_settings_stay(made, write, config, tmp_path):
    write()
    other = tmp_path / "run" / "cache.partial" / "0123456789abcdef"
    other.mkdir(parents=True)
    made()
    assert other.is_dir()


def test_whoever_comes_second_takes_the_cache_of_the_first(made, write, monkeypatch):
    write()
    finish = encode._finish

    def twice(partial, folder, *rest):
        finish(partial, folder, *rest)
        finish(partial, folder, *rest)

    monkeypatch.setattr(encode, "_finish", twice)
    assert made()[0].num_pairs == 5


def test_threads_read_what_one_reads(made, write, monkeypatch):
    write(num_pairs=50)
    monkeypatch.setattr(cache, "IN_MEMORY_BYTES", 0)
    monkeypatch.setattr(encode, "ENCODE_BATCH", 16)
    stored = made()[0]
    asked = [np.random.default_rng(i).integers(0, 103, 20) for i in range(200)]
    wanted = [stored.read(records) for records in asked]
    with ThreadPoolExecutor(8) as pool:
        for one, other in zip(wanted, pool.map(stored.read, asked), strict=True):
            jax.tree.map(np.testing.assert_array_equal, one, other)


def test_other_unet_does_not_matter(made, write, pipeline):
    write()
    made()
    (pipeline.path / "unet" / "config.json").write_text("{}")
    assert made()[1] == []


def test_half_written_cache_is_not_seen(made, write, tmp_path):
    write()
    stored = made()[0]
    partial = tmp_path / "run" / "cache.partial" / stored.key[:16]
    partial.mkdir(parents=True)
    shutil.rmtree(stored.folder)
    (partial / "pictures-00000-of-00001.array_record.1.writing").write_bytes(b"half")
    assert made()[0].num_pairs == 5
    assert not partial.parent.exists()


def test_unknown_dtype(made, write, config):
    write()
    config.cache.dtype = "int8"
    with pytest.raises(
        UserError, match=r"config\.cache\.dtype is 'int8': it must be one of float32"
    ):
        made()


def test_pictures_of_other_sizes_are_made_square(made, write):
    write(last_size=32)
    assert made()[0].read(np.arange(5))[0]["mean"].shape == (5, 4, 4, 3)


def test_the_middle_of_a_picture_is_kept():
    pixels = np.zeros((8, 24, 3), np.uint8)
    pixels[:, 8:16] = 200
    assert np.all(square(pixels, 8) == 200)
    assert square(pixels, 4).shape == square(pixels.transpose(1, 0, 2), 4).shape == (4, 4, 3)
    assert square(np.full((333, 1000, 3), 7, np.uint8), 512).shape == (512, 512, 3)


@pytest.mark.parametrize("side", [-4, 18])
def test_a_resolution_that_makes_no_latents(made, write, config, side):
    write()
    config.cache.resolution = side
    with pytest.raises(UserError, match=r"must be a multiple of 4, the pixels to a latent"):
        made()


def test_no_pair_set(made):
    with pytest.raises(MissingFileError, match="there is no folder .*pairs: "):
        made()


def test_full_disk(made, write, monkeypatch):
    write()
    full = functools.partial(encode.ArrayRecordWriter, "/dev/full")
    monkeypatch.setattr(encode, "ArrayRecordWriter", lambda path, options: full(options))
    with pytest.raises(UserError, match=r"could not write .*free some space"):
        made()


def test_changed_bytes(made, write):
    write()
    file = made()[0].folder / "pictures-00000-of-00001.array_record"
    data = bytearray(file.read_bytes())
    data[400] ^= 255
    file.write_bytes(data)
    with pytest.raises(UserError, match=r"cache is damaged .*remove that folder"):
        made()


def test_cut_file(made, write):
    write()
    folder = made()[0].folder
    file = folder / "pictures-00000-of-00001.array_record"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(UserError, match="is damaged: it is not the file that card"):
        Cache(folder)


def test_fewer_records_than_the_card_says(made, write):
    write()
    folder = made()[0].folder
    card = json.loads((folder / "card.json").read_text())
    (folder / "card.json").write_text(json.dumps(card | {"num_pairs": 6}))
    with pytest.raises(UserError, match="is damaged: 13 records of 15"):
        Cache(folder)
