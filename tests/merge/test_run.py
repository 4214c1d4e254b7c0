"""Experts read from files, merged, and written: against whole matrices, and what is refused."""

import numpy as np
import pytest
import safetensors.numpy
from flax import traverse_util

from safetydpo_jax import lora
from safetydpo_jax.errors import MissingFileError, UserError
from safetydpo_jax.lora.adapters import kernels
from safetydpo_jax.lora.keys import BASE_HASH
from safetydpo_jax.merge import METHODS, merge, opened_experts
from safetydpo_jax.merge.factors import Factors
from safetydpo_jax.merge.layer import Inputs, Layer, Votes
from safetydpo_jax.merge.overlap import Overlap, common
from tests.merge.conftest import write_expert


def deltas(adapters, pipeline):
    """Every layer's change as one matrix; 0 where there is none."""
    flat = traverse_util.flatten_dict(adapters)
    found = {}
    for layer, (path, kernel) in kernels(pipeline.unet_params).items():
        matrix = np.zeros((int(np.prod(kernel[:-1])), kernel[-1]))
        if (*path, "a") in flat:
            a = np.asarray(flat[(*path, "a")], np.float64)
            matrix = a.reshape(-1, a.shape[-1]) @ np.asarray(flat[(*path, "b")], np.float64)
        found[layer] = matrix
    return found


def whole(files, pipeline):
    return [deltas(lora.load_lora(file, pipeline.unet_params)[0], pipeline) for file in files]


def test_a_sum_is_exact_over_ranks_layers_and_convolutions(files, pipeline):
    weights = [0.5, -1.0, 2.0]
    with opened_experts(files, pipeline.unet_params, weights) as experts:
        assert experts.highest_rank == 4
        merged = merge(experts, "concat")
    assert merged.rank == 9
    assert set(merged.energy.values()) == {1.0}
    ours = deltas(merged.adapters, pipeline)
    for layer, matrix in ours.items():
        wanted = sum(w * x[layer] for w, x in zip(weights, whole(files, pipeline), strict=True))
        np.testing.assert_allclose(matrix, wanted, atol=1e-6)
    assert any(matrix.any() for layer, matrix in ours.items() if "conv1" in layer)


@pytest.mark.parametrize("rank", [1, 3, 4])
def test_cut_to_a_rank(files, pipeline, rank):
    with opened_experts(files, pipeline.unet_params) as experts:
        merged = merge(experts, "svd", rank=rank)
        usual = merge(experts, "svd")
    flat = traverse_util.flatten_dict(merged.adapters)
    assert {leaf.shape[-1] for path, leaf in flat.items() if path[-1] == "a"} == {rank}
    assert usual.rank == 4
    ours = deltas(merged.adapters, pipeline)
    for layer, energy in merged.energy.items():
        singular = np.linalg.svd(sum(x[layer] for x in whole(files, pipeline)), compute_uv=False)
        squares = np.square(singular)
        assert energy == pytest.approx(squares[:rank].sum() / squares.sum(), abs=1e-6)
        lost = sum(x[layer] for x in whole(files, pipeline)) - ours[layer]
        assert np.square(lost).sum() == pytest.approx(squares[rank:].sum(), abs=1e-5 * squares[0])


def test_the_scale_is_of_the_result(files, pipeline):
    with opened_experts(files, pipeline.unet_params) as experts:
        one, half = (merge(experts, "svd", scale=scale) for scale in (1.0, 0.5))
    for layer, matrix in deltas(one.adapters, pipeline).items():
        halved = deltas(half.adapters, pipeline)[layer]
        np.testing.assert_allclose(halved, matrix / 2, atol=1e-6)


def test_one_expert_comes_out_as_it_was(files, pipeline, tmp_path):
    """For linear methods to the bit, through a file and back."""
    for method in ("average", "task_arithmetic", "concat", "svd"):
        with opened_experts(files[:1], pipeline.unet_params) as experts:
            merged = merge(experts, method)
        path = lora.save_lora(tmp_path / f"{method}.safetensors", merged.adapters)
        ours, theirs = (
            traverse_util.flatten_dict(lora.load_lora(x, pipeline.unet_params)[0])
            for x in (path, files[0])
        )
        assert ours.keys() == theirs.keys()
        for key, leaf in theirs.items():
            np.testing.assert_array_equal(ours[key], leaf)


def test_the_same_every_time(files, pipeline):
    for method in ("dare", "dare_ties", "ties", "orthogonal"):
        results = []
        for seed in (0, 0, 1):
            with opened_experts(files, pipeline.unet_params) as experts:
                results.append(merge(experts, method, seed=seed, options={"density": 0.5}))
        leaves = [traverse_util.flatten_dict(x.adapters, sep=".") for x in results]
        same = [
            all(np.array_equal(leaves[0][key], other[key]) for key in leaves[0])
            for other in leaves[1:]
        ]
        assert same == [True, not method.startswith("dare")]


def test_progress_counts_layers(files, pipeline):
    told = []
    with opened_experts(files, pipeline.unet_params) as experts:
        merge(experts, "average", progress=lambda *x: told.append(x))
        count = len(experts.places)
    assert told == [(i, count) for i in range(1, count + 1)]


def test_names_are_categories_and_told_apart(files, pipeline, tmp_path):
    copy = write_expert(tmp_path / "x.safetensors", pipeline, 5, 2, ("to_q",), category="hate")
    plain = write_expert(tmp_path / "mine.safetensors", pipeline, 6, 2, ("to_q",))
    with opened_experts([files[0], copy, plain], pipeline.unet_params) as experts:
        assert experts.names == ["hate 1", "hate 2", "mine"]


def damaged(file, change):
    with safetensors.safe_open(file, "numpy") as opened:
        header = opened.metadata()
    tensors = safetensors.numpy.load_file(file)
    change(tensors)
    safetensors.numpy.save_file(tensors, file, metadata=header)


def first(tensors, side):
    return next(key for key in sorted(tensors) if side in key)


def with_nan(tensors):
    tensors[first(tensors, "lora_B")][0, 0] = np.nan


def with_a_strange_key(tensors):
    tensors["unet.down_blocks.7.to_q.lora_A.weight"] = np.zeros((2, 8), np.float32)


def of_another_shape(tensors):
    key = first(tensors, "lora_A")
    tensors[key] = tensors[key][:, :-1].copy()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_nan, r"violence.safetensors: .*lora_B.* holds NaN or infinity"),
        (with_a_strange_key, r"violence.safetensors: the key .* names no layer of this UNet"),
        (of_another_shape, r"violence.safetensors: .*the file is for another base model"),
    ],
)
def test_damaged_experts(files, pipeline, change, message):
    damaged(files[1], change)
    with (
        pytest.raises(UserError, match=message),
        opened_experts(files, pipeline.unet_params) as experts,
    ):
        merge(experts, "average")


def test_what_is_no_set_of_experts(files, pipeline, tmp_path):
    def opening(*arguments):
        with opened_experts(*arguments):
            pass

    shapes = pipeline.unet_params
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(files[0].read_bytes())
    bases = [
        write_expert(tmp_path / f"{x}.safetensors", pipeline, i, 2, ("to_q",), **{BASE_HASH: x})
        for i, x in enumerate("ab")
    ]
    for arguments, message in (
        (([], shapes), "no experts: give LoRA files"),
        (([files[0], copy], shapes), "copy.safetensors and .*hate.safetensors are the same expert"),
        ((files, shapes, [1.0]), "1 weights for 3 experts"),
        ((files, shapes, [1.0, float("nan"), 1.0]), "they must be finite numbers"),
        ((bases, shapes), "a.safetensors and .*b.safetensors were trained on different base"),
    ):
        with pytest.raises(UserError, match=message):
            opening(*arguments)
    with pytest.raises(MissingFileError, match=r"gone.safetensors: no such file"):
        opening([tmp_path / "gone.safetensors"], shapes)
    with pytest.raises(UserError, match="pickle files can run code"):
        opening([tmp_path / "gone.bin"], shapes)


@pytest.mark.parametrize("rank", [0, -3])
def test_ranks_that_there_are_not(files, pipeline, rank):
    with opened_experts(files, pipeline.unet_params) as experts:
        with pytest.raises(UserError, match=f"the rank is {rank}: it must be at least 1"):
            merge(experts, "average", rank=rank)
        with pytest.raises(UserError, match="co_merge asks which expert is active where"):
            merge(experts, "co_merge")


def test_every_method_on_files(twins, pipeline):
    """The whole way for all of them; what they compute is tested elsewhere."""
    with opened_experts(twins, pipeline.unet_params) as experts:
        votes = {
            layer: Votes(
                np.random.default_rng(0).random((2, kernel[-1])),
                np.random.default_rng(1).random((2, 3)),
            )
            for layer, (_, kernel) in experts.places.items()
        }
        inputs = {
            layer: Inputs(np.eye(kernel[0]), np.eye(kernel[0]), [np.ones((kernel[0], 3))] * 2)
            for layer, (_, kernel) in experts.places.items()
        }
        for name in METHODS:
            merged = merge(experts, name, votes=votes, inputs=inputs, rank=2)
            assert any(matrix.any() for matrix in deltas(merged.adapters, pipeline).values())
            assert all(0 < energy <= 1 for energy in merged.energy.values())


def test_overlap():
    rng = np.random.default_rng(0)
    a, b, other = (rng.normal(size=s).astype(np.float32) for s in [(8, 2), (2, 6), (2, 6)])
    rotated = Factors(rng.normal(size=(8, 2)).astype(np.float32), rng.normal(size=(2, 2)) @ b)
    overlap = Overlap(5)
    nothing = Factors(0 * a, 0 * b)
    for scale in (1, 3):
        experts = [Factors(a, scale * b), Factors(-a, b), rotated, None, Factors(a, other)]
        overlap.add(common(Layer("x", (8, 6), experts)))
    assert overlap.cosines[0, 1] == pytest.approx(-4 / np.sqrt(10 * 2))
    assert overlap.shared[0, 1:3] == pytest.approx([1, 1])
    assert (overlap.cosines[3] == 0).all()
    assert (overlap.shared[3] == 0).all()
    q, p = (np.linalg.qr(x.T)[0] for x in (b, other))
    angles = np.linalg.svd(q.T @ p)[1]
    assert overlap.shared[0, 4] == pytest.approx(np.square(angles).mean())
    np.testing.assert_allclose(overlap.shared, overlap.shared.T)
    silent = Overlap(2)
    silent.add(common(Layer("x", (8, 6), [nothing, Factors(a, b)])))
    assert silent.cosines.tolist() == [[0, 0], [0, 1]]
    assert silent.shared.tolist() == [[0, 0], [0, pytest.approx(1)]]
