"""What chips send each other: as libtpu writes it, and of programs that it compiles here."""

import importlib.util

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from safetydpo_jax import sharding
from safetydpo_jax.plan import chips, collectives
from safetydpo_jax.plan.chips import CHIPS
from safetydpo_jax.plan.cost import cost_of

pytestmark = pytest.mark.usefixtures("optimised")

compiler = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="no TPU compiler: pip install 'safetydpo-jax[tpu]'",
)
MIB = 2**20
# One all-gather that runs beside a product: started, fused with it, and awaited.
ASYNC = """\
HloModule jit_f, is_scheduled=true, num_partitions=4

%started (p: bf16[2048,256]) -> (bf16[2048,256], bf16[2048,512]) {
  %p = bf16[2048,256]{1,0} parameter(0)
  %all-gather.25 = bf16[2048,512]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=5, replica_groups=mesh['axis_0'=1,'axis_1'=2,'axis_2'=2], device_ids=([2,2]T(1,0)) {'axis_1'}, dimensions={1}, backend_config={"async_collective_fusion_config":{"flag_start":"-1"}}
  ROOT %begin = (bf16[2048,256]{1,0}, bf16[2048,512]{1,0}) custom-call(%all-gather.25), custom_call_target="AsyncCollectiveStart"
}

%beside (p.1: bf16[2048,256]) -> bf16[2048,512] {
  %p.1 = bf16[2048,256]{1,0} parameter(0)
  ROOT %all-gather.27 = bf16[2048,512]{1,0:T(8,128)(2,1)} all-gather(%p.1), channel_id=5, replica_groups=mesh['axis_0'=1,'axis_1'=2,'axis_2'=2], device_ids=([2,2]T(1,0)) {'axis_1'}, dimensions={1}, backend_config={"async_collective_fusion_config":{"flag_start":"2"}}
}

%awaited (p.2: bf16[2048,256]) -> bf16[2048,512] {
  %p.2 = bf16[2048,256]{1,0} parameter(0)
  %all-gather.33 = bf16[2048,512]{1,0:T(8,128)(2,1)} all-gather(%p.2), channel_id=5, replica_groups=mesh['axis_0'=1,'axis_1'=2,'axis_2'=2], device_ids=([2,2]T(1,0)) {'axis_1'}, dimensions={1}, backend_config={"async_collective_fusion_config":{"flag_start":"-1"}}
  ROOT %end = bf16[2048,512]{1,0} custom-call(%all-gather.33), custom_call_target="AsyncCollectiveDone"
}

%all-reduce-scatter (input: bf16[1024,2048]) -> bf16[512,2048] {
  %input = bf16[1024,2048]{1,0} parameter(0)
  %all-reduce.2 = bf16[1024,2048]{1,0} all-reduce(%input), channel_id=3, replica_groups={{0,1},{2,3}}, to_apply=%add
  ROOT %kept = bf16[512,2048]{1,0} dynamic-slice(%all-reduce.2, %i, %j), dynamic_slice_sizes={512,2048}
}

ENTRY %main (a: bf16[2048,256]) -> bf16[2048,512] {
  %a = bf16[2048,256]{1,0} parameter(0)
  %s = (bf16[2048,256]{1,0}, bf16[2048,512]{1,0}) fusion(%a), kind=kCustom, calls=%started
  %b = bf16[2048,512]{1,0} fusion(%s), kind=kOutput, calls=%beside
  %r = bf16[512,2048]{1,0} fusion(%b), kind=kCustom, calls=%all-reduce-scatter
  ROOT %d = bf16[2048,512]{1,0} fusion(%b), kind=kCustom, calls=%awaited
}
"""  # noqa: E501


@pytest.mark.parametrize(
    ("line", "chips", "data", "kind", "group", "over_data", "size"),
    [
        # An all-gather's result is whole, and what a reduce-scatter leaves is a part.
        ("f32[64] all-gather(%x), replica_groups=[2,2]<=[4]", 4, 2, "all-gather", 2, False, 256),
        (
            "f32[16] reduce-scatter(%x), replica_groups=[2,4]<=[2,2,2]T(0,2,1)",
            *(8, 2, "reduce-scatter", 4, False, 256),
        ),
        # Chips 0, 2, 4 and 6: all four shards of data, on a mesh of 4 x 2.
        (
            "(f32[8]{0}, bf16[2,4]) all-reduce(%x, %y), replica_groups=[2,4]<=[4,2]T(1,0)",
            *(8, 4, "all-reduce", 4, True, 48),
        ),
        (
            "f32[8] all-reduce(%x), replica_groups=[1,256]<=[256]",
            *(256, 32, "all-reduce", 256, True, 32),
        ),
        ("f32[8] all-reduce(%x), replica_groups={{0,2},{1,3}}", 4, 2, "all-reduce", 2, True, 32),
        ("f32[8] all-reduce(%x), replica_groups={}", 4, 4, "all-reduce", 4, True, 32),
        (
            "f32[8] all-to-all(%x), replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}",
            *(8, 2, "all-to-all", 4, False, 32),
        ),
        (
            "f32[8] all-to-all(%x), replica_groups=mesh['axis_0'=2,'axis_1'=4] "
            "{'axis_0','axis_1':(2)2}",
            *(8, 2, "all-to-all", 4, True, 32),
        ),
        (
            "f32[8] all-reduce(%x), replica_groups=mesh['a'=1,'b'=2,'c'=2], "
            "device_ids=([2,2]T(1,0)) {'c'}",
            *(4, 2, "all-reduce", 2, True, 32),
        ),
        (
            "(f32[8]{0}, f32[8]{0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%x), "
            "source_target_pairs={{0,1},{1,0},{2,3},{3,2}}",
            *(4, 2, "collective-permute", 2, False, 32),
        ),
        (
            "(bf16[4,8]{1,0}, bf16[16,8]{1,0}) all-gather-start(%b), replica_groups={{0,1,2,3}}",
            *(4, 1, "all-gather", 4, False, 256),
        ),
    ],
)  # fmt: skip
def test_groups_and_sizes(line, chips, data, kind, group, over_data, size):
    opcode = next(word for word in line.split() if word.startswith(kind)).partition("(")[0]
    found = collectives.read(f"  %x.1 = {line}, channel_id=1", opcode, chips, data)
    assert found == ((kind, group, over_data), size)


def test_what_each_chip_sends():
    for kind, sent in (
        ("all-reduce", 1.5),
        ("all-gather", 0.75),
        ("reduce-scatter", 0.75),
        ("all-to-all", 0.75),
        ("collective-permute", 1),
    ):
        assert collectives.share(kind, 4) == sent


def test_what_is_in_fusions_counts_once():
    cost = cost_of(ASYNC, CHIPS["v5e"], data=2)
    assert cost.counts == {("all-gather", 2, False): 1, ("reduce-scatter", 2, False): 1}
    assert cost.sizes == {
        ("all-gather", 2, False): 2 * MIB,
        ("reduce-scatter", 2, False): 4 * MIB,
    }


def compiled(topology, fsdp, tensor, f, *shapes):
    """The text for four chips of f's, arrays of bfloat16 being given by shape and axes."""
    _, devices = chips.slice_of(topology)
    mesh = sharding.make_mesh(-1, fsdp, tensor, devices)

    def laid_out(shape, *axes):
        layout = NamedSharding(mesh, PartitionSpec(*axes))
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=layout)

    arrays = [laid_out(*shape) for shape in shapes]
    jitted = jax.jit(f(mesh))
    text = jitted.trace(*arrays).lower(lowering_platforms=("tpu",)).compile().as_text()
    cost = cost_of(text, CHIPS[topology[:3]], mesh.shape["data"])
    return {tuple(group): (n, cost.sizes[group] / MIB) for group, n in cost.counts.items()}


def gradient(mesh):
    """Of two layers, 512 to 2048 and back, over 1024 rows."""

    def loss(weights, x):
        for up, down in weights:
            x = jax.nn.gelu(x @ up) @ down
        return (x.astype(jnp.float32) ** 2).sum()

    return lambda a, b, c, d, x: jax.grad(loss)(((a, b), (c, d)), x)


LAYERS = (((512, 2048), "fsdp", "tensor"), ((2048, 512), "tensor", "fsdp")) * 2
ROWS = ((1024, 512), ("data", "fsdp"))


@compiler
def test_split_weights_are_gathered():
    """Four of 2 MiB among two chips; their gradients are summed over all rows, by all four."""
    assert compiled("v5e:2x2", 2, 1, gradient, *LAYERS, ROWS) == {
        ("all-gather", 2, False): (4, 8),
        ("all-reduce", 4, True): (1, 8),
    }


@compiler
def test_split_products_are_summed():
    """Three results (512 rows of 512) among two chips; gradients of half a weight by two others."""
    assert compiled("v5e:2x2", 1, 2, gradient, *LAYERS, ROWS) == {
        ("all-reduce", 2, False): (3, 1.5),
        ("all-reduce", 2, True): (1, 4),
    }


def six_layers_in_five_turns(mesh):
    def turn(x, weights):
        for up, down in zip(*weights, strict=True):
            x = jax.nn.gelu(x @ up) @ down
        return x, None

    return lambda up, down, x: jax.lax.scan(turn, x, (up, down))[0]


@compiler
def test_each_turn_of_a_loop_gathers():
    """Six weights of 2 MiB in each, one of them beside the products."""
    up = ((5, 3, 512, 2048), None, None, "fsdp", None)
    down = ((5, 3, 2048, 512), None, None, None, "fsdp")
    found = compiled("v5e:2x2", 2, 1, six_layers_in_five_turns, up, down, ROWS)
    assert found == {("all-gather", 2, False): (5 * 6, 5 * 12)}


def every_kind(mesh):
    def f(x):  # 2 MiB
        return (
            jax.lax.psum_scatter(x, "fsdp", tiled=True),
            jax.lax.all_to_all(x, "data", 0, 1, tiled=True),
            jax.lax.ppermute(x, "fsdp", [(0, 1), (1, 0)]),
            jax.lax.all_gather(x, "data", tiled=True),
            jax.lax.all_gather(x, ("data", "fsdp"), tiled=True),
        )

    rows = PartitionSpec(("data", "fsdp"))
    return jax.shard_map(f, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=False)


@compiler
@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_every_kind(topology):
    """Which here share the number of their channel."""
    assert compiled(topology, 2, 1, every_kind, ((4096, 1024), ("data", "fsdp"))) == {
        ("reduce-scatter", 2, False): (1, 2),
        ("all-to-all", 2, True): (1, 2),
        ("collective-permute", 2, False): (1, 2),
        ("all-gather", 2, True): (1, 4),
        ("all-gather", 4, True): (1, 8),
    }
