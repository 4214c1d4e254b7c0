"""The command `merge`: experts in, one LoRA out, with votes and a picture of what was done."""

import dataclasses
import functools
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from safetydpo_jax import sharding, storage
from safetydpo_jax.errors import UserError
from safetydpo_jax.lora.adapters import describe, scaled
from safetydpo_jax.lora.base import shapes_for
from safetydpo_jax.lora.keys import BASE_HASH
from safetydpo_jax.lora.writer import save_lora
from safetydpo_jax.merge import summary
from safetydpo_jax.merge.experts import Experts, opened_experts
from safetydpo_jax.merge.layer import Inputs, Votes
from safetydpo_jax.merge.moments import check_categories, voting
from safetydpo_jax.merge.overlap import Overlap, common
from safetydpo_jax.merge.run import ASKS, Merged, by_layer, check, merge
from safetydpo_jax.merge.statistics import Statistics, load_statistics, vote_weights
from safetydpo_jax.pace import Pace

if TYPE_CHECKING:
    from safetydpo_jax.merge.distillation import Lessons

OPTIONS = ("density", "sharpness", "preservation", "ridge")  # of methods


def run(arguments: Any, progress: Callable[[str], None] = print) -> Path:
    """Merges as the command line says.

    Args:
      arguments: of launch/merge.py.
      progress: takes lines of text.

    Returns:
      The merged LoRA's file.

    Raises:
      UserError, MissingFileError: an input is wrong; nothing is written then.
    """
    options = {name: value for name in OPTIONS if (value := getattr(arguments, name)) is not None}
    method = check(arguments.method, options, arguments.rank)
    needs = method.needs
    for name in ("category_weights", "band_weights"):
        if getattr(arguments, name) is not None and needs != "votes":
            raise UserError(f"--{name} weighs votes, which {arguments.method} does not ask for")
    if arguments.out is None:
        raise UserError("no --out: say where the merged LoRA goes, as in --out merged.safetensors")
    if arguments.out.suffix != ".safetensors":
        raise UserError(f"--out is {arguments.out}: its name must end in .safetensors")
    if not arguments.experts:
        raise UserError("no experts: give LoRA files, as in --experts hate.safetensors FILE ...")
    if needs and arguments.stats is None and arguments.model is None:
        raise UserError(
            f"{arguments.method} {ASKS[needs]}: give the base as --model, or --stats with what was "
            "counted before"
        )
    if arguments.seed < 0:
        raise UserError(f"--seed {arguments.seed}: it must be 0 or more")
    if not math.isfinite(arguments.scale):
        raise UserError(f"--scale {arguments.scale}: it must be a finite number")
    counting = needs and arguments.stats is None
    for name, is_used in (
        ("trajectory", counting),
        ("batch_size", counting),
        ("prompts", counting or arguments.distill),
        ("num_prompts", counting or arguments.distill),
    ):
        if getattr(arguments, name) is not None and not is_used:
            why = "--stats has what was counted" if needs else f"{arguments.method} counts nothing"
            raise UserError(f"--{name} says how to count, but {why}: leave it out")
    lessons, weights = _lessons(arguments), _category_weights(arguments)
    files = [Path(file) for file in arguments.experts]
    bases, shapes = shapes_for(files[0], arguments.model, arguments.model_config)
    progress(f"{len(files)} experts of {' or '.join(bases)}")
    with opened_experts(files, shapes, arguments.weights) as experts:
        for name, file, weight in zip(experts.names, experts.files, experts.weights, strict=True):
            progress(f"  {name}: rank {min(file.ranks.values())}, weight {weight:g}, {file.path}")
        with storage.explained_writes(arguments.out):
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
        storage.check_writable(arguments.out)  # now, not after hours
        base_model = _Base(arguments, progress)
        if method.one_rank and len(experts.of_one_rank()) < len(experts.places):
            raise UserError(
                f"{arguments.method} takes rows from experts of one rank and the same layers: use "
                "co_merge for these"
            )
        if lessons is not None:
            check_categories(base_model.prompts(safe=True)[1], experts)
        statistics = votes = None
        if needs:
            statistics = _statistics(arguments, experts, needs, weights, base_model, progress)
            if needs == "votes":
                votes = statistics.votes(weights, arguments.band_weights)
        inputs_of = statistics.inputs if statistics else None
        merged = _merge(arguments, experts, options, votes, inputs_of, progress)
        if lessons is not None:
            merged = _distilled(merged, lessons, experts, base_model, arguments, progress)
        overlap = Overlap(len(files))
        for _, found in by_layer(experts, lambda layer: common(experts.layer(layer))):
            overlap.add(found)
        path = _write(
            arguments, experts, options, lessons, statistics, votes, merged, overlap, progress
        )
    if needs:
        _counted(arguments).unlink(missing_ok=True)  # all of it is in the files now
    if lessons is not None:
        shutil.rmtree(_lessons_folder(arguments))
    return path


def _lessons(arguments: Any) -> "Lessons | None":
    """How the result is taught, if it is to be."""
    options = {
        "learning_rate": arguments.distill_rate,
        "preservation": arguments.distill_preservation,
        "batch_size": arguments.distill_batch_size,
    }
    given = {name: value for name, value in options.items() if value is not None}
    if not arguments.distill:
        if given:
            raise UserError("--distill_... says how to distil, but there is no --distill STEPS")
        return None
    if arguments.model is None:
        raise UserError("--distill trains the result: give the base as --model")
    from safetydpo_jax.merge.distillation import Lessons

    lessons = Lessons(
        steps=arguments.distill,
        seed=arguments.seed,
        remat=arguments.model != "emoji",  # whose activations are small
        **_drawing(arguments),
        **given,
    )
    lessons.check()
    sharding.check_batch(sharding.make_mesh(), distill_batch_size=lessons.batch_size)
    return lessons


def _drawing(arguments: Any) -> dict[str, Any]:
    """How pictures are drawn, for votes and lessons."""
    return {
        "sampler": arguments.sampler,
        "num_steps": arguments.steps,
        "guidance_scale": arguments.guidance_scale,
    }


class _Base:
    """The base model and the prompts, loaded when they are wanted."""

    def __init__(self, arguments: Any, progress: Callable[[str], None]):
        self._arguments, self._progress = arguments, progress

    @functools.cached_property
    def pipeline(self) -> Any:
        from safetydpo_jax.compilation import keep_compiled
        from safetydpo_jax.models.pretrained import load_pipeline

        keep_compiled()
        of = self._arguments
        return load_pipeline(
            of.model, dtype=of.dtype, configs=of.model_config, progress=self._progress
        )

    def prompts(self, *, safe: bool) -> tuple[list[str], list[str]]:
        """Those of the table, or the embedded world's own, with their categories."""
        from safetydpo_jax.merge.prompts import emoji_prompts, read_prompts

        count = self._arguments.num_prompts
        if count is not None and count < 1:
            raise UserError(f"--num_prompts {count}: it must be 1 or more")
        if self._arguments.prompts is not None:
            return read_prompts(self._arguments.prompts, count, safe=safe)
        if self._arguments.model == "emoji":
            return emoji_prompts(count or 16, self._arguments.seed, safe=safe)
        raise UserError(
            "no --prompts: give a CSV with the columns category,prompt, prompts of all the "
            "categories that the experts are for"
        )


def _statistics(
    arguments: Any,
    experts: Experts,
    needs: str,
    weights: dict[str, float],
    base_model: _Base,
    progress: Callable[[str], None],
) -> Statistics:
    """Those of a file, or counted anew and kept beside the result."""
    if arguments.stats is not None:
        found = load_statistics(arguments.stats).ordered(experts.hashes, str(arguments.stats))
    else:
        inputs = needs == "inputs"
        prompts, categories = base_model.prompts(safe=inputs)
        from safetydpo_jax.merge import activity

        how: dict[str, Any] = {
            "batch_size": 8 if arguments.batch_size is None else arguments.batch_size,
            "sampler": arguments.sampler,
            "inputs": inputs,
            "trajectory": arguments.trajectory or "base",
        }
        activity.check(experts, prompts, categories, **how)  # now, not after a model is fetched
        vote_weights(voting(categories), activity.BANDS, weights, arguments.band_weights)
        found = activity.count_votes(
            base_model.pipeline,
            experts,
            prompts,
            categories,
            **how | _drawing(arguments),
            seed=arguments.seed,
            kept=_counted(arguments),
            progress=progress,
        )
        path = arguments.out.with_suffix(".stats.safetensors")
        found.save(path)
        progress(f"statistics: kept in {path}, for --stats")
    progress(
        f"statistics: of {found.about['prompts']} prompts; by either half of them "
        f"{100 * found.agreement():.0f} % of the outputs have the same winner"
    )
    return found


def _category_weights(arguments: Any) -> dict[str, float]:
    """The weights of categories' votes, where they are asked for."""
    weights = {}
    for text in arguments.category_weights or ():
        name, equals, value = text.partition("=")
        try:
            weights[name] = float(value if equals else "")
        except ValueError:
            raise UserError(
                f"--category_weights: {text!r} is no category with a number, as in hate=2"
            ) from None
    return weights


def _merge(
    arguments: Any,
    experts: Experts,
    options: dict[str, Any],
    votes: dict[str, Votes] | None,
    inputs: dict[str, Inputs] | None,
    progress: Callable[[str], None],
) -> Merged:
    pace = Pace(len(experts.places), seconds=5)

    def say(done: int, total: int) -> None:
        if done < total and pace.due(done):
            progress(f"merging: {done}/{total} layers, {pace.left(done):.0f} s left")

    return merge(
        experts,
        arguments.method,
        rank=arguments.rank,
        scale=1.0 if arguments.distill else arguments.scale,  # there it comes at the end
        options=options,
        votes=votes,
        inputs=inputs,
        seed=arguments.seed,
        progress=say,
    )


def _distilled(
    merged: Merged,
    lessons: "Lessons",
    experts: Experts,
    base_model: _Base,
    arguments: Any,
    progress: Callable[[str], None],
) -> Merged:
    from safetydpo_jax.merge.distillation import distill

    adapters = distill(
        base_model.pipeline,
        experts,
        merged.adapters,
        *base_model.prompts(safe=True),
        lessons,
        _lessons_folder(arguments),
        progress=progress,
    )
    return dataclasses.replace(merged, adapters=scaled(adapters, arguments.scale, 1))


def _counted(arguments: Any) -> Path:
    """Where votes are kept until all is written, beside the result."""
    return arguments.out.with_suffix(".counting.safetensors")


def _lessons_folder(arguments: Any) -> Path:
    """Where distillation keeps what it has, beside the result."""
    return arguments.out.with_suffix(".distilling")


def _write(
    arguments: Any,
    experts: Experts,
    options: dict[str, Any],
    lessons: "Lessons | None",
    statistics: Statistics | None,
    votes: dict[str, Votes] | None,
    merged: Merged,
    overlap: Overlap,
    progress: Callable[[str], None],
) -> Path:
    energy = float(np.mean(list(merged.energy.values())))
    header = {
        "method": arguments.method,
        "options": json.dumps(options),
        "experts": json.dumps(
            [
                {"name": name, "sha256": digest, "weight": weight}
                for name, digest, weight in zip(
                    experts.names, experts.hashes, experts.weights, strict=True
                )
            ]
        ),
        "rank": str(merged.rank),
        "scale": str(arguments.scale),
        "seed": str(arguments.seed),
        **{
            name: json.dumps(value)
            for name in ("category_weights", "band_weights")
            if (value := getattr(arguments, name)) is not None
        },
        **({"statistics": json.dumps(statistics.about)} if statistics else {}),
        **({"distillation": json.dumps(dataclasses.asdict(lessons))} if lessons else {}),
        **({} if lessons else {"energy_kept": f"{energy:.4f}"}),  # teaching changes what is kept
        **{
            key: text
            for file in reversed(experts.files)  # the first that says it; others may be foreign
            for key, text in file.header.items()
            if key in ("base", BASE_HASH)
        },
    }
    path = save_lora(arguments.out, merged.adapters, header)
    shares = summary.winners(votes) if votes else None
    then = " before it was taught" if lessons else ""
    progress(
        f"{arguments.method}, {describe(merged.adapters)}, energy kept {100 * energy:.1f} %{then}"
    )
    for line in summary.lines(experts.names, merged.energy, merged.error, shares):
        progress(line)
    for line in summary.overlaps(experts.names, overlap):
        progress(line)
    drawn = path.with_suffix(".png")
    title = f"{len(experts.names)} experts merged by {arguments.method}, rank {merged.rank}"
    image = summary.picture(title, experts.names, overlap, shares)
    with storage.explained_writes(drawn):
        image.save(drawn)
    progress(f"written: {path}, {drawn.name}")
    return path
