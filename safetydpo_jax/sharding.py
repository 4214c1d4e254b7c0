"""The device mesh, and how parameters and batches are laid out on it.

Axes: "data" splits the batch; "fsdp" and "tensor" split parameters, by the config's rules. The
adapters, the optimiser and, unless a rule says otherwise, the base model are on every device.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from safetydpo_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")

# A rule: a regular expression on the dotted parameter path, and one mesh axis or None a dimension.
Rules = Sequence[tuple[str, Sequence[str | None]]]


def make_mesh(
    data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Sequence[Any] | None = None
) -> Mesh:
    """A mesh over all devices, or those given; `data=-1` takes what the other axes leave.

    Raises:
      UserError: the axes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    others = fsdp * tensor
    if min(fsdp, tensor) < 1 or data not in (-1, len(devices) // others) or len(devices) % others:
        raise UserError(
            f"config.mesh: data {data} x fsdp {fsdp} x tensor {tensor} is not the {len(devices)} "
            "devices there are; leave mesh.data at -1 to use them all"
        )
    # Auto: the compiler propagates shardings; Explicit axes would make it a type error to mix them.
    shape = (len(devices) // others, fsdp, tensor)
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def check_batch(mesh: Mesh, **sizes: int) -> None:
    """Raises UserError unless every size is a multiple of the mesh's data axis."""
    devices = mesh.shape["data"]
    for name, size in sizes.items():
        if size % devices:
            raise UserError(
                f"{name} is {size}, which does not divide over {devices} devices: "
                f"use {size - size % devices or devices} or {size - size % devices + devices}"
            )


def replicated(mesh: Mesh) -> NamedSharding:
    """On every device, whole."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The first axis split over "data"."""
    return NamedSharding(mesh, PartitionSpec("data"))


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


def param_shardings(mesh: Mesh, params: Any, rules: Rules = ()) -> Any:
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
            if re.search(pattern, name):
                sharding = NamedSharding(mesh, PartitionSpec(*spec))
                try:
                    sharding.shard_shape(np.shape(leaf))
                except ValueError as error:
                    raise UserError(
                        f"mesh.rules: {pattern!r} does not fit {name}: {error}"
                    ) from None
                return sharding
        return replicated(mesh)

    return jax.tree_util.tree_map_with_path(shard, params)
