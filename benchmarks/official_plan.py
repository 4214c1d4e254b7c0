"""The official recipe's step, as a plain translation to JAX would have it, compiled beside ours.

    python benchmarks/official_plan.py      # needs pip install 'safetydpo-jax[tpu]', no TPU

What is plain about it: two UNets, of which one never changes; the text encoder and the
autoencoder's encoder within the step; W + BA formed for each adapter; attention that forms its
probabilities; norms and GEGLU as the books write them. Stable Diffusion 1.5 at 512 px, all of it
in bfloat16, on one chip of a v5e, AdamW on float32 factors; remat where it does not fit without.
Minutes for each number of pairs on two cores. Writes
benchmarks/results/plans/official_sd15_v5e.json, with our own step's figure from there.
"""

import argparse
import contextlib
import dataclasses
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import traverse_util
from jax.sharding import Mesh

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for benchmarks and configs

from benchmarks.machine import machine
from configs import hate
from safetydpo_jax import plan, sharding
from safetydpo_jax.errors import run_main
from safetydpo_jax.lora import init_adapters
from safetydpo_jax.models import attention, layers, norms
from safetydpo_jax.models.pipeline import Pipeline
from safetydpo_jax.plan.estimate import compiled_for
from safetydpo_jax.plan.programs import Planned, laid_out, lowered, token_shapes
from safetydpo_jax.storage import write_file
from safetydpo_jax.train.losses import dpo, preference_margin, squared_error
from safetydpo_jax.train.settings import resolve

PLANS = Path(__file__).resolve().parent / "results" / "plans"
TOPOLOGY = "v5e:2x2"  # of which each chip does the same, and sends nothing but gradients
SD15 = Path(plan.__file__).parents[1] / "models" / "published" / "sd15"


def main(argv: list[str] | None = None) -> None:
    """Compiles the plain step and writes what it takes, a pair, beside ours."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--pairs", type=int, nargs="+", default=[1, 4], metavar="N", help="a chip (1 4)"
    )
    args = parser.parse_args(argv)
    plan.use_cpu()
    chip, devices = plan.slice_of(TOPOLOGY)
    mesh = sharding.make_mesh(devices=devices[:1])
    ours = json.loads((PLANS / "sd15_v5e_4.json").read_text())["cycles_per_pair"]
    result: dict[str, Any] = {
        "machine": machine(),
        "topology": TOPOLOGY,
        "our_cycles_a_pair": ours,  # at four pairs a chip, without remat
    }
    file = PLANS / "official_sd15_v5e.json"
    for pairs in args.pairs:
        for remat in (False, True):
            with plain_layers():
                found = compiled_for(plain_step(mesh, pairs, remat), TOPOLOGY, chip, print)
            what = f"{pairs} pairs, {'with' if remat else 'without'} remat"
            if fits := "cycles" in found:
                cycles = sum(found["cycles"].values()) / pairs
                found |= {"cycles_a_pair": round(cycles), "to_ours": round(cycles / ours, 2)}
                print(f"{what}: {cycles / 1e6:.1f} M cycles each, ours {ours / 1e6:.1f} M")
            else:
                print(f"{what}: does not fit: {found['bytes_per_chip']}")
            result[what] = found
            write_file(file, (json.dumps(result, indent=1) + "\n").encode())
            if fits:
                break
    print(f"written: {file}")


def plain_step(mesh: Mesh, pairs: int, remat: bool) -> Any:
    """The whole step, lowered: pictures, token ids and a key in; factors and moments out."""
    config = hate.get_config("sd15")
    config.dtype, config.pairs.path, config.batch_size = "bfloat16", ".", pairs
    config.accumulation, config.remat = 1, remat
    config = resolve(config)
    pipeline = in_half(Planned(config, str(SD15), mesh).pipeline)
    optimizer = optax.adamw(config.optimizer.learning_rate)
    unet, schedule = pipeline.unet, pipeline.schedule

    def first() -> Any:
        key, rank = jax.random.key(0), config.lora.rank
        lora = init_adapters(key, pipeline.unet_params, rank=rank, targets=config.lora.targets)
        return lora, optimizer.init(lora)

    def step(
        state: Any, policy: Any, reference: Any, others: Any, pictures: Any, tokens: Any, key: Any
    ) -> Any:
        """`pictures` are uint8: all winners, then all losers."""
        lora, opt_state = state
        of_latents, of_noise, of_time = jax.random.split(key, 3)
        mean, logvar = pipeline.encode(others["vae"], pictures)
        std = jnp.exp(0.5 * logvar)
        latents = mean + std * jax.random.normal(of_latents, mean.shape)
        told = pipeline.encode_tokens(others["text"], tokens)
        noise = jax.random.normal(of_noise, (pairs, *mean.shape[1:]))
        steps = jax.random.randint(of_time, (pairs,), 0, schedule.num_train_timesteps)
        noise, steps = jnp.concatenate([noise] * 2), jnp.concatenate([steps] * 2)
        told = jax.tree.map(lambda x: jnp.concatenate([x] * 2), told)
        noisy = schedule.add_noise(latents, noise, steps)

        def errors(params: Any) -> Any:
            said = unet.apply({"params": params}, noisy, steps, *told)
            return jnp.split(squared_error(said, noise), 2)

        def loss(lora: Any) -> Any:
            winner, loser = errors(
                with_adapters(policy, lora, config.lora.alpha / config.lora.rank)
            )
            known_winner, known_loser = errors(reference)
            margin = preference_margin(winner - known_winner, loser - known_loser, config.loss.beta)
            return dpo(margin).mean()

        value, gradient = jax.value_and_grad(loss)(lora)
        updates, opt_state = optimizer.update(gradient, opt_state, lora)
        return (optax.apply_updates(lora, updates), opt_state), value

    whole, split = sharding.replicated(mesh), sharding.batch_sharding(mesh)

    def on_chip(tree: Any, layout: Any = whole) -> Any:
        return jax.tree.map(lambda x: laid_out(x, layout), tree)

    side = pipeline.resolution
    pictures = jax.ShapeDtypeStruct((2 * pairs, side, side, 3), np.uint8)
    key = jax.eval_shape(lambda: jax.random.key(0))
    others = {"vae": pipeline.vae_params, "text": pipeline.text_params}
    return lowered(
        jax.jit(step, donate_argnums=0),
        on_chip(jax.eval_shape(first)),
        on_chip(pipeline.unet_params),
        on_chip(pipeline.unet_params),
        on_chip(others),
        on_chip(pictures, split),
        on_chip(token_shapes(pipeline, pairs), split),
        on_chip(key),
    )


def in_half(pipeline: Pipeline) -> Pipeline:
    """With its autoencoder in bfloat16, as the official recipe runs it in half precision."""
    half = jnp.bfloat16
    vae = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, half), pipeline.vae_params)
    networks = pipeline.networks | {"vae": pipeline.vae.clone(dtype=half)}
    return dataclasses.replace(pipeline, networks=networks, params=pipeline.params | {"vae": vae})


def with_adapters(params: Any, lora: Any, scale: float) -> Any:
    """The parameters with each W replaced by W + scale BA."""
    flat = dict(traverse_util.flatten_dict(params))
    factors: dict[tuple[str, ...], Any] = dict(traverse_util.flatten_dict(lora))
    for *module, _ in {(*path[:-1], "") for path in factors}:
        a, b, place = factors[(*module, "a")], factors[(*module, "b")], (*module, "kernel")
        flat[place] = (flat[place] + scale * a @ b).astype(flat[place].dtype)
    return traverse_util.unflatten_dict(flat)


@contextlib.contextmanager
def plain_layers() -> Iterator[None]:
    """Has our models compute what their books say, in place of what we found to be faster."""

    def plain_linear(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
        """In one product, whose result is taken apart where parts are wanted."""
        module = context.module
        called = isinstance(module, layers.Dense) and context.method_name == "__call__"
        if not called or module.is_initializing():
            return next_fun(*args, **kwargs)
        y = args[0].astype(module.dtype) @ module.get_variable("params", "kernel").astype(
            module.dtype
        )
        if module.use_bias:
            y = y + module.get_variable("params", "bias").astype(module.dtype)
        return y if module.parts == 1 else tuple(jnp.split(y, module.parts, -1))

    with contextlib.ExitStack() as stack:
        for place, name, plain in (
            (attention, "dot_product_attention", plain_attention),
            (attention, "geglu", lambda x, gate: x * jax.nn.gelu(gate, approximate=False)),
            (norms, "_group_norm", plain_group_norm),
            (norms, "_layer_norm", plain_layer_norm),
            (layers, "convolution", plain_convolution),
        ):
            stack.enter_context(mock.patch.object(place, name, plain))
        stack.enter_context(nn.intercept_methods(plain_linear))
        yield


def plain_convolution(x: Any, kernel: Any, strides: int, padding: Any) -> Any:
    """Pictures (b, h, w, i) with a kernel (kh, kw, i, o)."""
    dimensions = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(
        x, kernel, (strides, strides), padding, dimension_numbers=dimensions
    )


def plain_attention(q: Any, k: Any, v: Any, *, causal: bool = False) -> Any:
    """softmax(q k^T / sqrt(d)) v with all its probabilities, in its type; (b, t, h, d)."""
    logits = jnp.einsum("bthd,bshd->bhts", q, k) / math.sqrt(q.shape[-1])
    if causal:
        logits = jnp.where(jnp.tri(q.shape[1], dtype=bool), logits, -jnp.inf)
    weights = jax.nn.softmax(logits, -1)
    return jnp.einsum("bhts,bshd->bthd", weights, v)


def plain_group_norm(x: Any, scale: Any, bias: Any, groups: int, eps: float, dtype: Any) -> Any:
    """Of pixels (b, n, c), the mean before the variance, in float32."""
    grouped = x.astype(jnp.float32).reshape(*x.shape[:2], groups, -1)
    mean = grouped.mean((1, 3), keepdims=True)
    variance = jnp.square(grouped - mean).mean((1, 3), keepdims=True)
    y = ((grouped - mean) * jax.lax.rsqrt(variance + eps)).reshape(x.shape)
    return (y * scale + bias).astype(dtype)


def plain_layer_norm(x: Any, scale: Any, bias: Any, eps: float, dtype: Any) -> Any:
    """Over the last axis, the mean before the variance, in float32."""
    x = x.astype(jnp.float32)
    mean = x.mean(-1, keepdims=True)
    variance = jnp.square(x - mean).mean(-1, keepdims=True)
    return ((x - mean) * jax.lax.rsqrt(variance + eps) * scale + bias).astype(dtype)


if __name__ == "__main__":
    run_main(main)
