"""The device mesh, and how parameters and batches are laid out on it.

Axes: "data" and "fsdp" split the batch; "fsdp" and "tensor" split parameters, by the config's
rules. The adapters, the optimiser and what no rule names are on every device.

A mesh may be of the devices of several processes. Each then lays out what it holds: of a batch its
own rows, of everything else a copy that all have.
"""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from safetydpo_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")
# The compiler propagates shardings; Explicit axes would make it a type error to mix them.
_AUTO = (AxisType.Auto,) * len(AXES)

# A rule: a regular expression on the dotted parameter path, and one mesh axis or None a dimension.
Rules = Sequence[tuple[str, Sequence[str | None]]]


def make_mesh(
    data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Sequence[Any] | None = None
) -> Mesh:
    """A mesh over all devices, or those given; `data=-1` takes what the other axes leave.

    Raises:
      UserError: the axes do not multiply to the number of devices, or these are of several slices.
    """
    devices = jax.devices() if devices is None else devices
    shape = _shape(data, fsdp, tensor, len(devices))
    # Of GPUs it numbers nodes, among which a job may be spread.
    slices = {getattr(device, "slice_index", 0) for device in devices if device.platform == "tpu"}
    if len(slices) > 1:
        raise UserError("the devices are of several slices of TPUs: a job takes one slice")
    # An axis may be a part of a TPU's own, which jax.make_mesh allows on a v5e alone.
    placed = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(placed, AXES, axis_types=_AUTO)


def abstract_mesh(data: int, fsdp: int, tensor: int, count: int) -> AbstractMesh:
    """The same over so many devices that are not at hand."""
    return AbstractMesh(_shape(data, fsdp, tensor, count), AXES, axis_types=_AUTO)


def _shape(data: int, fsdp: int, tensor: int, count: int) -> tuple[int, int, int]:
    others = fsdp * tensor
    if min(fsdp, tensor) < 1 or data not in (-1, count // others) or count % others:
        raise UserError(
            f"config.mesh: data {data} x fsdp {fsdp} x tensor {tensor} is not the {count} "
            "devices there are; leave mesh.data at -1 to use them all"
        )
    return count // others, fsdp, tensor


def check_batch(mesh: Mesh, **sizes: int) -> None:
    """Raises UserError unless every size is a multiple of the batch's shards."""
    shards = num_batch_shards(mesh)
    for name, size in sizes.items():
        if size % shards:
            less = size - size % shards
            sizes_that_do = f"{less} or {less + shards}" if less else f"{shards}"
            raise UserError(
                f"{name} is {size}, which does not divide over {shards} devices: "
                f"use {sizes_that_do}"
            )


def num_batch_shards(mesh: Mesh | AbstractMesh) -> int:
    """Into how many parts a batch is split."""
    return math.prod(mesh.shape[axis] for axis in BATCH)


def own_batch_shards(mesh: Mesh) -> list[int]:
    """Which of them this process needs."""
    rows = mesh.devices.reshape(num_batch_shards(mesh), -1)
    return [i for i, row in enumerate(rows) if any(map(_is_own, row))]


def _is_own(device: Any) -> bool:
    return device.process_index == jax.process_index()


def replicated(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """On every device, whole."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """The first axis split over the batch's shards."""
    return NamedSharding(mesh, PartitionSpec(BATCH))


def put(tree: Any, sharding: NamedSharding) -> Any:
    """Lays out arrays that every process holds whole; nothing is sent."""
    if sharding.is_fully_addressable:
        return jax.device_put(tree, sharding)

    def lay_out(x: Any) -> jax.Array:
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(lay_out, tree)


def put_rows(tree: Any, mesh: Mesh) -> Any:
    """Lays out a batch of whose rows each process has those of its own shards, in order."""
    split, own, total = batch_sharding(mesh), len(own_batch_shards(mesh)), num_batch_shards(mesh)
    if own == total:
        return put(tree, split)

    def lay_out(x: Any) -> jax.Array:
        shape = (len(x) // own * total, *x.shape[1:])
        return jax.make_array_from_process_local_data(split, x, shape)

    return jax.tree.map(lay_out, tree)


def on_this_host(tree: Any, mesh: Mesh) -> Any:
    """The same arrays on each of this process's devices, whole; all processes must ask for it.

    What is on every device anyway is not copied.
    """
    own = local_mesh(mesh)
    local, whole = replicated(own), replicated(mesh)

    leaves, structure = jax.tree.flatten(tree)
    split = [i for i, x in enumerate(leaves) if not x.is_fully_replicated]
    if split:
        gathered = jax.jit(lambda x: x, out_shardings=whole)([leaves[i] for i in split])
        for i, x in zip(split, gathered, strict=True):
            leaves[i] = x

    def take(x: jax.Array) -> jax.Array:
        parts = {shard.device: shard.data for shard in x.addressable_shards}
        shards = [parts[device] for device in own.devices.flat]
        return jax.make_array_from_single_device_arrays(x.shape, local, shards)

    return structure.unflatten(map(take, leaves))


def local_mesh(mesh: Mesh) -> Mesh:
    """A mesh of this process's devices alone, which share batches, in the order of the mesh."""
    own = np.array([device for device in mesh.devices.flat if _is_own(device)])
    return Mesh(own.reshape(-1, 1, 1), AXES, axis_types=_AUTO)


def spread(fn: Callable[..., Any], mesh: Mesh | None, *split: bool) -> Callable[..., Any]:
    """`fn` compiled; over a mesh, every device runs it on its own share of the rows.

    A device runs the program that it would run alone: nothing is exchanged.

    Args:
      fn: of arrays, or trees of them, to arrays whose first axis is that of the rows.
      mesh: None is one device.
      split: for each argument whether it has a row axis, which is split, or is given to all.
    """
    if mesh is None:
        return jax.jit(fn)
    specs = tuple(PartitionSpec("data") if rows else PartitionSpec() for rows in split)
    return jax.jit(
        jax.shard_map(
            fn, mesh=mesh, in_specs=specs, out_specs=PartitionSpec("data"), check_vma=False
        )
    )


def param_shardings(mesh: Mesh | AbstractMesh, params: Any, rules: Rules = ()) -> Any:
    """A sharding for every parameter: the first rule whose expression its path contains.

    Args:
      mesh: the mesh.
      params: nested dict of arrays or shapes.
      rules: (regex, spec) pairs; without a match a parameter is replicated.

    Returns:
      A tree of NamedSharding like `params`.

    Raises:
      UserError: a rule does not fit the parameter it matches.
    """

    def shard(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        name = ".".join(str(key.key) for key in path)
        for pattern, spec in rules:
            try:
                if re.search(pattern, name):
                    sharding = NamedSharding(mesh, PartitionSpec(*spec))
                    sharding.shard_shape(np.shape(leaf))
                    return sharding
            except re.error as error:
                raise UserError(
                    f"mesh.rules: {pattern!r} is no regular expression: {error}"
                ) from None
            except ValueError as error:
                raise UserError(f"mesh.rules: {pattern!r} does not fit {name}: {error}") from None
        return replicated(mesh)

    return jax.tree_util.tree_map_with_path(shard, params)
