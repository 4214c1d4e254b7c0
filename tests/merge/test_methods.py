"""Every method against a slow reference on whole matrices in float64, written from the papers."""

import dataclasses
import zlib

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from safetydpo_jax.errors import UserError
from safetydpo_jax.merge import METHODS
from safetydpo_jax.merge.factors import Factors, cut, cut_dense, stack
from safetydpo_jax.merge.layer import Inputs, Layer, Votes
from safetydpo_jax.merge.run import check, cut_of

SETTINGS = hypothesis.settings(max_examples=40, deadline=None)
DENSE = ("ties", "dare", "dare_ties", "magnitude_prune", "orthogonal")
LINEAR = ("average", "task_arithmetic", "concat", "svd")


SEEDS = st.integers(0, 2**32 - 1)


def drawn_inputs(rows, count):
    """What a layer sees under each expert's prompts, of few directions, and under safe ones."""
    rng = np.random.default_rng(rows)
    shapes = [(40, 3), (3, rows), (40, rows)]
    parts = [[rng.normal(size=shape) for shape in shapes] for _ in range(count + 1)]
    return [x @ y + 0.1 * noise for x, y, noise in parts]


def inputs_of(experts):
    rows = next(x.a.shape[0] for x in experts if x is not None)
    *seen, safe = drawn_inputs(rows, len(experts))
    return Inputs(
        sum(x.T @ x for x, expert in zip(seen, experts, strict=True) if expert is not None),
        safe.T @ safe,
        [None if e is None else x.T @ (x @ e.a) for x, e in zip(seen, experts, strict=True)],
    )


def layer_of(seed, least=1, same_rank=False):
    """Experts of any ranks, weights within; unless of one rank, some without the layer."""
    rng = np.random.default_rng(seed)
    count, rank = rng.integers(least, 6), rng.integers(1, 5)
    # More rows than an expert's rank: orthogonal bases of few have entries of equal size.
    rows, columns = rng.integers(8, 16), rng.integers(2, 13)
    experts = []
    for _ in range(count):
        r = rank if same_rank else rng.integers(1, 6)
        a = rng.normal(size=(rows, r)).astype(np.float32)
        b = (rng.choice([1, 1, -0.5, 2]) * rng.normal(size=(r, columns))).astype(np.float32)
        experts.append(Factors(a, b) if same_rank or rng.random() < 0.8 else None)
    if not any(x is not None for x in experts):
        experts[0] = Factors(a, b)
    votes = Votes(
        rng.integers(0, 9, (count, columns)).astype(float),
        rng.integers(0, 9, (count, rank)).astype(float) if same_rank else None,
    )
    seed, shape = int(rng.integers(4)), (int(rows), int(columns))
    return Layer("block.to_q", shape, experts, votes, seed, inputs_of(experts))


def whole(layer):
    return [
        np.zeros(layer.shape) if x is None else x.a.astype(np.float64) @ x.b.astype(np.float64)
        for x in layer.experts
    ]


def trimmed(x, density):
    """The largest entries, one by one."""
    kept = max(round(density * x.size), 1)
    order = sorted(np.ndindex(x.shape), key=lambda i: -abs(x[i]))
    out = np.zeros_like(x)
    for i in order[:kept]:
        out[i] = x[i]
    return out


def elected(changes):
    out = np.zeros_like(changes[0])
    for i in np.ndindex(out.shape):
        values = [x[i] for x in changes]
        sign = np.sign(sum(values))
        agreeing = [v for v in values if v != 0 and np.sign(v) == sign]
        out[i] = sum(agreeing) / len(agreeing) if agreeing else 0.0
    return out


def dropped(layer, density):
    rng = np.random.default_rng([layer.seed, zlib.crc32(layer.name.encode())])
    return [
        np.where(rng.random(x.shape, np.float32) < density, x / density, 0) for x in whole(layer)
    ]


def co_merged(layer, share):
    out = np.zeros(layer.shape)
    for j in range(layer.shape[1]):
        for weight, delta in zip(share(layer.votes.outputs[:, j]), whole(layer), strict=True):
            out[:, j] += weight * delta[:, j]
    return out


def knots(layer, density):
    """As the paper has it: (out, in) matrices side by side, one SVD, TIES on the V."""
    deltas = [x.T for x in whole(layer)]
    u, s, vt = np.linalg.svd(np.concatenate(deltas, 1), full_matrices=False)
    kept = s > 1e-6 * s[0]
    u, s, vt = u[:, kept], s[kept], vt[kept]
    # What is 0 but for rounding, such as an expert's that leaves the layer alone, has no sign.
    parts = np.split(np.where(np.abs(vt) > 1e-12, vt, 0), len(deltas), axis=1)
    return ((u * s) @ elected([trimmed(x, density) for x in parts])).T


def least_squares(layer, preservation, ridge):
    """What `regmean` looks for, from the inputs themselves: one tall least-squares problem."""
    *seen, safe = drawn_inputs(layer.shape[0], len(layer.experts))
    rows = [x for x, expert in zip(seen, layer.experts, strict=True) if expert is not None]
    deltas = [
        d for d, expert in zip(whole(layer), layer.experts, strict=True) if expert is not None
    ]
    wanted = [x @ delta for x, delta in zip(rows, deltas, strict=True)]
    rows = np.concatenate([*rows, np.sqrt(preservation) * safe])
    size = layer.shape[0]
    rows = np.concatenate([rows, np.sqrt(ridge * np.square(rows).sum() / size) * np.eye(size)])
    wanted = np.concatenate(wanted)
    wanted = np.concatenate([wanted, np.zeros((len(rows) - len(wanted), layer.shape[1]))])
    solution = np.linalg.lstsq(rows, wanted, rcond=None)[0]
    # Of all changes of a rank, the one whose residual on all rows is the smallest: an SVD of R D.
    r = np.linalg.qr(rows, mode="r")
    u, s, vt = np.linalg.svd(r @ solution, full_matrices=False)
    return lambda rank: np.linalg.solve(r, (u[:, :rank] * s[:rank]) @ vt[:rank])


def winner(votes):
    return [float(i == list(votes).index(max(votes))) for i in range(len(votes))]


def shares(votes):
    total = votes.sum()
    return votes / total if total else votes


REFERENCES = {
    "average": lambda x, d: sum(whole(x)) / len(x.experts),
    "task_arithmetic": lambda x, d: sum(whole(x)),
    "concat": lambda x, d: sum(whole(x)),
    "svd": lambda x, d: sum(whole(x)),
    "magnitude_prune": lambda x, d: sum(trimmed(y, d) for y in whole(x)),
    "ties": lambda x, d: elected([trimmed(y, d) for y in whole(x)]),
    "dare": lambda x, d: sum(dropped(x, d)),
    "dare_ties": lambda x, d: elected(dropped(x, d)),
    "orthogonal": knots,
    "co_merge": lambda x, d: co_merged(x, winner),
    "co_merge_soft": lambda x, d: co_merged(x, shares),
    "regmean": lambda x, d: least_squares(x, **options("regmean", d))(99),
}


def dense(change):
    if isinstance(change, np.ndarray):
        return change
    factors = change if isinstance(change, Factors) else cut_of(change, 999).factors
    return factors.a.astype(np.float64) @ factors.b


def options(name, density):
    if name == "regmean":
        return {"preservation": 1.0 - density, "ridge": 0.0 if density == 1 else 1e-3}
    return {"density": density} if name in DENSE else {}


def test_all_methods_have_a_reference():
    assert METHODS.keys() - REFERENCES.keys() == {"co_merge_rows"}  # below, as it needs one rank


@pytest.mark.parametrize("name", REFERENCES)
@SETTINGS
@hypothesis.given(seed=SEEDS, density=st.sampled_from([0.1, 0.35, 1.0]))
def test_against_the_reference(name, seed, density):
    layer = layer_of(seed)
    ours = dense(METHODS[name].change(layer, **options(name, density)))
    wanted = REFERENCES[name](layer, density)
    scale = max(np.abs(x).max() for x in whole(layer))
    np.testing.assert_allclose(ours, wanted, atol=2e-5 * scale / min(density, 1))


@SETTINGS
@hypothesis.given(seed=SEEDS)
def test_rows_against_the_reference(seed):
    layer = layer_of(seed, same_rank=True)
    ours = METHODS["co_merge_rows"].change(layer)
    units = [winner(x).index(1.0) for x in layer.votes.ranks.T]
    outputs = [winner(x).index(1.0) for x in layer.votes.outputs.T]
    for i, expert in enumerate(units):
        np.testing.assert_array_equal(ours.a[:, i], layer.experts[expert].a[:, i])
    for j, expert in enumerate(outputs):
        np.testing.assert_array_equal(ours.b[:, j], layer.experts[expert].b[:, j])


@pytest.mark.parametrize("name", sorted(REFERENCES.keys() - {"dare", "dare_ties"}))
@SETTINGS
@hypothesis.given(seed=SEEDS, data=st.data())
def test_the_order_of_experts_is_nothing(name, seed, data):
    """But for equal votes, of which the first wins; and dropping draws in the experts' order."""
    layer = layer_of(seed, least=2)
    order = data.draw(st.permutations(range(len(layer.experts))))
    unequal = layer.votes.outputs + np.arange(len(order))[:, None] / 100
    layer = dataclasses.replace(layer, votes=Votes(unequal, None))
    other = dataclasses.replace(
        layer,
        experts=[layer.experts[i] for i in order],
        votes=Votes(unequal[list(order)], None),
        inputs=dataclasses.replace(layer.inputs, images=[layer.inputs.images[i] for i in order]),
    )
    one, two = (dense(METHODS[name].change(x)) for x in (layer, other))
    np.testing.assert_allclose(one, two, atol=2e-5 * max(1, np.abs(one).max()))


@pytest.mark.parametrize("name", sorted(METHODS.keys() - {"co_merge_rows"}))
@SETTINGS
@hypothesis.given(seed=SEEDS, factor=st.sampled_from([0.25, -1.0, 3.0]))
def test_weights_scale_all_methods(name, seed, factor):
    """A common factor of the weights is one of the result."""
    layer = layer_of(seed)
    experts = [x and Factors(x.a, x.b * np.float32(factor)) for x in layer.experts]
    other = dataclasses.replace(layer, experts=experts)
    one, two = (dense(METHODS[name].change(x)) for x in (layer, other))
    np.testing.assert_allclose(factor * one, two, atol=1e-4 * max(1, np.abs(two).max()))


@pytest.mark.parametrize("name", METHODS)
@SETTINGS
@hypothesis.given(seed=SEEDS)
def test_one_expert_is_what_comes_out(name, seed):
    layer = layer_of(seed, same_rank=True)
    first = layer.experts[0]
    votes = Votes(np.ones((1, layer.shape[1])), np.ones((1, first.rank)))
    alone = Layer(layer.name, layer.shape, [first], votes, inputs=inputs_of([first]))
    ours = dense(METHODS[name].change(alone, **options(name, 1.0)))
    np.testing.assert_allclose(ours, dense(first), atol=2e-5 * np.abs(dense(first)).max())


@pytest.mark.parametrize("name", METHODS)
@SETTINGS
@hypothesis.given(seed=SEEDS)
def test_a_weight_of_zero_silences(name, seed):
    """Whatever the second expert is, as long as its weight is 0."""
    layer = layer_of(seed, least=2, same_rank=True)
    first, second = layer.experts[:2]
    votes = Votes(layer.votes.outputs[:2], layer.votes.ranks[:2])
    results = []
    for other in (second, Factors(second.a, 7 * second.b)):
        silent = Factors(other.a, 0 * other.b)
        pair = Layer(
            layer.name, layer.shape, [first, silent], votes, inputs=inputs_of([first, second])
        )
        results.append(dense(METHODS[name].change(pair, **options(name, 1.0))))
    np.testing.assert_array_equal(*results)
    if name in (*LINEAR[1:], "ties", "magnitude_prune", "orthogonal"):
        np.testing.assert_allclose(results[0], dense(first), atol=2e-5 * np.abs(first.b).max() * 9)


@SETTINGS
@hypothesis.given(seed=SEEDS, rank=st.integers(1, 12))
def test_cuts_are_the_best_of_their_rank(seed, rank):
    """Of factors exactly, of a whole matrix as nearly as is said."""
    layer = layer_of(seed)
    whole_matrix = dense(layer.total)
    left, singular, right = np.linalg.svd(whole_matrix, full_matrices=False)
    best = (left[:, :rank] * singular[:rank]) @ right[:rank]
    total = np.square(singular).sum()
    energy = np.square(singular[:rank]).sum() / total if total else 1.0
    scale = singular[0] + 1e-12
    for found in (cut(layer.total, rank), cut_dense(whole_matrix.astype(np.float32), rank)):
        assert found.factors.rank <= max(rank, min(rank, layer.total.rank))
        assert found.energy == pytest.approx(energy, abs=1e-5)
        assert found.error == 0  # so small a matrix is decomposed whole
        gap = singular[rank - 1] - singular[rank] if rank < len(singular) else 1.0
        if gap > 0.05 * scale:  # else the last direction is anyone's
            np.testing.assert_allclose(dense(found.factors), best, atol=2e-4 * scale)


@pytest.mark.parametrize("noise", [0, 1e-9, 1e-4])
def test_a_cut_of_experts_that_agree(noise):
    """Whose factors hardly differ, or not at all."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(40, 4)), rng.normal(size=(4, 30))
    parts = [
        Factors((a + noise * rng.normal(size=a.shape)).astype(np.float32), (b + i).astype("f4"))
        for i in range(3)
    ]
    matrix = sum(dense(x) for x in parts)
    singular = np.linalg.svd(matrix, compute_uv=False)
    for rank in (2, 4, 8):
        found = cut(stack(parts), rank)
        lost = np.square(matrix - dense(found.factors)).sum()
        assert lost == pytest.approx(np.square(singular[rank:]).sum(), abs=1e-9 * singular[0] ** 2)


def test_a_large_cut_says_how_far_it_may_be_off():
    rng = np.random.default_rng(0)
    spectrum = 0.8 ** np.arange(200)
    left, right = (np.linalg.qr(rng.normal(size=(600, 200)))[0] for _ in range(2))
    delta = ((left * spectrum) @ right.T).astype(np.float32)
    found = cut_dense(delta, 8)
    best = np.square(spectrum[:8]).sum() / np.square(spectrum).sum()
    assert 0 < found.error < 1e-3
    assert best - found.error <= found.energy <= best + 1e-6


def test_nothing_stays_nothing():
    nothing = Factors(np.zeros((6, 3), np.float32), np.zeros((3, 5), np.float32))
    votes = Votes(np.zeros((2, 5)), np.zeros((2, 3)))
    inputs = Inputs(np.zeros((6, 6)), np.zeros((6, 6)), [np.zeros((6, 3))] * 2)
    layer = Layer("x", (6, 5), [nothing, nothing], votes, inputs=inputs)
    for method in METHODS.values():
        change = method.change(layer)
        assert not dense(change).any()
        found = cut_of(change, 1)
        assert not dense(found.factors).any()
        assert (found.energy, found.error) == (1, 0)


def test_rows_of_experts_that_differ():
    a, b = np.ones((6, 3), np.float32), np.ones((3, 5), np.float32)
    for experts in ([Factors(a, b), Factors(a[:, :2], b[:2])], [Factors(a, b), None]):
        layer = Layer("x", (6, 5), experts, Votes(np.ones((2, 5)), None))
        with pytest.raises(UserError, match="x: co_merge_rows takes rows from experts of one rank"):
            METHODS["co_merge_rows"].change(layer)


def test_votes_that_are_not_there():
    layer = Layer("x", (6, 5), [Factors(np.ones((6, 1)), np.ones((1, 5)))])
    with pytest.raises(UserError, match="x: the statistics have no votes on this layer"):
        METHODS["co_merge"].change(layer)


@pytest.mark.parametrize(
    ("method", "given", "message"),
    [
        ("mean", {}, "the method is 'mean': it must be one of co_merge, "),
        ("average", {"density": 0.5}, "average has no option 'density'; those it has: none"),
        ("ties", {"layer": 1}, "ties has no option 'layer'; those it has: density"),
        ("ties", {"density": 0}, "density is 0: it must be above 0 and at most 1"),
        ("dare", {"density": float("nan")}, "density is nan"),
        ("co_merge_soft", {"sharpness": -1}, "sharpness is -1: it must be finite and at least 0"),
    ],
)
def test_methods_and_options_that_there_are_not(method, given, message):
    with pytest.raises(UserError, match=message):
        check(method, given)


@SETTINGS
@hypothesis.given(SEEDS, st.floats(0, 10), st.integers(1, 30))
def test_regmean_cut_to_a_rank(seed, preservation, rank):
    layer = layer_of(seed)
    change = METHODS["regmean"].change(layer, preservation=preservation, ridge=1e-3)
    found = cut_of(change, rank).factors
    wanted = least_squares(layer, preservation, 1e-3)(rank)
    np.testing.assert_allclose(dense(found), wanted, atol=1e-3 * max(1, np.abs(wanted).max()))


def test_regmean_of_a_layer_of_which_nothing_is_known():
    layer = dataclasses.replace(layer_of(0), inputs=None)
    with pytest.raises(UserError, match="block.to_q: the statistics have no inputs of this layer"):
        METHODS["regmean"].change(layer)
    few = np.outer(np.arange(8), np.arange(8)) + np.zeros((8, 8))
    factors = Factors(np.ones((8, 1)), np.ones((1, 2)))
    layer = Layer("x", (8, 2), [factors], inputs=Inputs(few, 0 * few, [np.ones((8, 1))]))
    with pytest.raises(UserError, match="x: the inputs are of fewer directions .* a ridge above 0"):
        METHODS["regmean"].change(layer, ridge=0.0)
