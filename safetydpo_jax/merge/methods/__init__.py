"""Merge methods, one file each."""

from safetydpo_jax.merge.layer import Method
from safetydpo_jax.merge.methods import (
    average,
    co_merge,
    co_merge_rows,
    co_merge_soft,
    concat,
    dare,
    dare_ties,
    magnitude_prune,
    orthogonal,
    regmean,
    svd,
    task_arithmetic,
    ties,
)

METHODS: dict[str, Method] = {
    module.__name__.rpartition(".")[2]: module.METHOD
    for module in (
        co_merge,
        co_merge_soft,
        co_merge_rows,
        average,
        task_arithmetic,
        concat,
        svd,
        ties,
        dare,
        dare_ties,
        magnitude_prune,
        orthogonal,
        regmean,
    )
}
