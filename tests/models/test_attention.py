"""Every kernel behind the one entry gives the same answers and gradients, in bounded memory."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import NamedSharding, PartitionSpec

from safetydpo_jax import sharding
from safetydpo_jax.models import attention, tpu_attention
from safetydpo_jax.models.target import compiling_for, target


def qkv(rows, tokens, heads, width, context=None, dtype=jnp.float32):
    shapes = [(rows, n, heads, width) for n in (tokens, context or tokens, context or tokens)]
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def answer_and_gradients(f, q, k, v):
    weights = jnp.asarray(np.random.default_rng(1).normal(size=q.shape), jnp.float32)

    def answers(q, k, v, weights):  # compiled as one
        y, pull_back = jax.vjp(f, q, k, v)
        return y, *pull_back(weights.astype(y.dtype))

    return jax.jit(answers)(q, k, v, weights)


def agree(got, wanted, tolerance):
    for x, y in zip(got, wanted, strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_allclose(
            np.asarray(x, np.float32), np.asarray(y, np.float32), atol=tolerance
        )


@pytest.mark.parametrize(
    ("capability", "has"),
    [("9.0", True), ("8.0", True), ("7.5", False), ("gfx942", False), (None, False)],
)
def test_which_gpus_are_asked_for_cudnns_attention(capability, has, monkeypatch):
    monkeypatch.setattr(
        jax, "devices", lambda: [types.SimpleNamespace(compute_capability=capability)]
    )
    assert not attention._has_cudnn_attention()
    with compiling_for("gpu"):
        assert attention._has_cudnn_attention() == has
        monkeypatch.setenv("SAFETYDPO_PLAIN_ATTENTION", "1")
        assert not attention._has_cudnn_attention()


@pytest.mark.parametrize("parts", [1, 2, 6, 12])
@pytest.mark.parametrize("context", [None, 7])
def test_the_plain_form(parts, context, monkeypatch):
    """Whole, by three heads, by a head, and by a head of two of four rows."""
    tokens = 16 + parts  # JAX keeps traces by shape, not by LOGITS
    q, k, v = qkv(4, tokens, 6, 8, context)
    monkeypatch.setattr(attention, "LOGITS", 4 * 4 * 6 * tokens * k.shape[1] // parts)
    got = answer_and_gradients(attention.dot_product_attention, q, k, v)
    agree(got, answer_and_gradients(jax.nn.dot_product_attention, q, k, v), 1e-5)
    program = str(jax.make_jaxpr(attention.dot_product_attention)(q, k, v))
    assert (f"length={parts}\n" in program) == (parts > 1)


def test_more_devices_with_more_rows_take_the_feed_forward_in_as_many_parts(monkeypatch):
    """Or the step of a pod would be hundreds of times as long a program."""
    monkeypatch.setattr(attention, "WIDEST", 4 * 8 * 2 * 16 * 8 // 4)
    block = attention.TransformerBlock(heads=2, sparing=True)
    products = {}
    for devices in (1, 8):
        x = jnp.ones((2 * devices, 16, 8))
        with jax.set_mesh(sharding.make_mesh(devices=jax.devices()[:devices])):
            params = block.init(jax.random.key(0), x, x)
            text = str(jax.make_jaxpr(block.apply)(params, x, x))
        products[devices] = text.count("= dot_general[")
    assert products[1] == products[8] >= 4 * 2


@pytest.mark.parametrize("context", [None, 8, 7])
def test_the_plain_form_by_tokens(context, monkeypatch):
    """A head's logits being too many: eight queries at a time, and as many keys as fit."""
    q, k, v = qkv(2, 32, 3, 8, context)
    monkeypatch.setattr(attention, "LOGITS", 4 * 8 * k.shape[1])
    got = answer_and_gradients(attention.dot_product_attention, q, k, v)
    agree(got, answer_and_gradients(jax.nn.dot_product_attention, q, k, v), 1e-5)
    program = str(jax.make_jaxpr(attention.dot_product_attention)(q, k, v))
    assert "length=6\n" in program  # heads of rows
    assert "length=4\n" in program  # of its queries


@pytest.mark.parametrize(("rows", "mesh"), [(2, {}), (4, {}), (14, {}), (4, {"tensor": 2})])
def test_devices_take_turns_with_their_own_rows_and_heads(rows, mesh, monkeypatch):
    """Or each would be sent those of all, and compute them all."""
    mesh = sharding.make_mesh(**mesh)
    shards = sharding.num_batch_shards(mesh)
    q, k, v = qkv(rows * shards, 16, 4, 8)
    monkeypatch.setattr(attention, "LOGITS", 4 * 16 * 16)  # those of a row's head
    split = NamedSharding(mesh, PartitionSpec(sharding.BATCH, None, "tensor"))

    def answers(q, k, v):
        y, pull_back = jax.vjp(attention._plain, q, k, v)
        return y, *pull_back(y)

    with jax.set_mesh(mesh):
        f = jax.jit(answers, in_shardings=(split,) * 3, out_shardings=(split,) * 4)
        program = f.lower(q, k, v).compile().as_text()
        got = f(*jax.device_put((q, k, v), split))
    assert "all-gather" not in program
    assert "all-to-all" not in program
    assert "while" in program
    agree(got, answers(q, k, v), 1e-5)


def test_half_precision():
    """Operands are bfloat16, logits and softmax float32: an error of roundings, not of logits."""
    exact = qkv(2, 32, 2, 8)
    exact[0] = 20 * exact[0]  # bfloat16 logits would be off by 0.2
    exact = [x.astype(jnp.bfloat16).astype(jnp.float32) for x in exact]
    rounded = [x.astype(jnp.bfloat16) for x in exact]
    got = attention.dot_product_attention(*rounded)
    assert got.dtype == jnp.bfloat16
    wanted = jax.nn.dot_product_attention(*exact)
    np.testing.assert_allclose(np.asarray(got, np.float32), wanted, atol=0.03)


def largest(jaxpr):
    """Bytes of the largest array that it makes."""
    top = 0
    for equation in jaxpr.eqns:
        for variable in equation.outvars:
            top = max(top, variable.aval.size * variable.aval.dtype.itemsize)
        for value in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "jaxpr")
        ):
            if hasattr(value, "jaxpr"):
                top = max(top, largest(value.jaxpr))
    return top


def test_nothing_larger_than_the_bound_is_made():
    """Of Stable Diffusion's largest self-attention, two rows at 512 pixels: 1.07 GB of logits."""
    q, k, v = qkv(2, 4096, 8, 40)
    gradient = jax.grad(lambda q: attention._plain(q, k, v).sum())
    assert largest(jax.make_jaxpr(gradient)(q).jaxpr) == attention.LOGITS


def test_the_bound_is_that_of_each_device():
    """Or a pod would take turns where one chip does not, with rows that lie on others."""
    q, k, v = qkv(8, 4096, 8, 40)
    with jax.set_mesh(sharding.make_mesh(devices=jax.devices()[:4])):
        made = jax.make_jaxpr(attention._plain)(q, k, v)
    assert largest(made.jaxpr) == 4 * attention.LOGITS


def test_programs_for_another_platform():
    q, k, v = qkv(2, 4096, 8, 40)
    with compiling_for("tpu"):
        made = jax.make_jaxpr(attention._plain)(q, k, v)
    assert largest(made.jaxpr) == attention.ROOMIER["tpu"] * attention.LOGITS


def test_a_program_is_traced_anew_for_another_platform():
    is_tpu = jax.jit(lambda x: x + (target() == "tpu"))
    assert is_tpu(0) == 0
    with compiling_for("tpu"):
        assert is_tpu(0) == 1
    assert is_tpu(0) == 0


@pytest.mark.parametrize(("tokens", "width"), [(256, 40), (128, 160), (384, 64)])
def test_the_tpu_kernel(tokens, width, monkeypatch):
    """Emulated; a width below a TPU's 128 lanes and one above; keys in parts."""
    monkeypatch.setattr(tpu_attention, "KEYS_BACKWARD", 256)
    q, k, v = qkv(1, tokens, 2, width)
    with pltpu.force_tpu_interpret_mode():
        got = answer_and_gradients(tpu_attention.splash, q, k, v)
    agree(got, answer_and_gradients(jax.nn.dot_product_attention, q, k, v), 1e-4)


@pytest.mark.parametrize(("rows", "split"), [(4, True), (3, False)])
def test_the_tpu_kernel_on_a_mesh(rows, split):
    """Each device has its rows, or all of them where they do not divide."""
    q, k, v = qkv(rows, 128, 1, 8)
    mesh = sharding.make_mesh(devices=jax.devices()[:2])
    with jax.set_mesh(mesh), pltpu.force_tpu_interpret_mode():
        placed = jax.device_put(
            [q, k, v], sharding.batch_sharding(mesh) if split else sharding.replicated(mesh)
        )
        got = jax.jit(tpu_attention.splash)(*placed)
    agree([got], [jax.nn.dot_product_attention(q, k, v)], 1e-4)
    assert got.sharding.is_fully_replicated != split


@pytest.mark.parametrize(("tokens", "context", "kernel"), [
    (1024, None, True),
    (9216, None, True),  # 768 pixels
    (4096, 77, False),  # a prompt
    (256, None, False),
    (1064, None, False),  # no tile divides them
])  # fmt: skip
def test_who_gets_the_tpu_kernel(tokens, context, kernel):
    arrays = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in qkv(1, tokens, 1, 40, context)]
    traced = jax.jit(attention.dot_product_attention).trace(*arrays)
    lowered = {x: traced.lower(lowering_platforms=(x,)).as_text() for x in ("tpu", "cpu")}
    assert ("tpu_custom_call" in lowered["tpu"]) == kernel
    assert "tpu_custom_call" not in lowered["cpu"]
