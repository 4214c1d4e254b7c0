"""A plan to read: what was compiled, what is estimated from it, and what is assumed."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from safetydpo_jax.evaluate.pictures import font
from safetydpo_jax.plan.passes import PASSES

GIB = 2**30
COLORS = {
    "attention": "#0072b2",
    "attention kernels": "#56b4e9",
    "convolution": "#d55e00",
    "linear": "#e69f00",
    "norm": "#009e73",
    "other": "#999999",
}


def lines(plan: Mapping[str, Any]) -> list[str]:
    """What the terminal shows; each figure says where it is from."""
    if "assumed_mfu" in plan:
        return _lines_of_gpus(plan)
    sizes = plan["bytes_per_chip"]
    said = [*_head(plan), f"fits            {'yes' if plan['fits'] else 'NO'}"]
    if sizes["all"] is None:
        said.append("memory          more than there is (compiled)")
    else:
        parts = [k for k in ("arguments", "temporaries", "results", "program") if k in sizes]
        detail = ", ".join(f"{name} {sizes[name] / GIB:.2f}" for name in parts)
        said.append(
            f"memory a chip   {sizes['all'] / GIB:.2f} of {sizes['memory'] / GIB:.2f} GiB"
            + (f": {detail}" if detail else "")
            + " (compiled)"
        )
    said.append(f"model FLOPs     {plan['flops_per_chip'] / 1e12:.2f} T a chip and step (counted)")
    if not plan["fits"]:
        return [*said, *_said_of_remedies(plan)]
    total = sum(plan["cycles"].values())
    said += [
        f"step            {1000 * plan['estimated_step_seconds']:.0f} ms, "
        f"{plan['cycles_per_pair'] / 1e6:.1f} M cycles a pair (estimated)",
        *(
            f"  {kind:18}{100 * n / total:3.0f} %"
            for kind, n in sorted(plan["cycles"].items(), key=lambda item: -item[1])
        ),
        f"MFU             {100 * plan['estimated_mfu']:.0f} % (estimated)",
        _said_of_pairs(plan, "chip"),
    ]
    for sent in plan["collectives"]:
        said.append(
            f"  {sent['kind']:18} {sent['count']} of {sent['bytes'] / 1e6:.1f} MB a step, "
            f"among {sent['chips']} chips (compiled)"
        )
    said += [
        f"sent            {100 * plan['collective_share']:.2f} % of the step (estimated)",
        "chips           "
        + ", ".join(f"{n}: {1000 * s:.0f} ms" for n, s in plan["weak_scaling"].items())
        + " a step, with as many pairs each (estimated)",
        _said_of_run(plan, "chip"),
    ]
    said += _said_of_passes(plan)
    programs = {"the step": plan, **plan.get("passes", {}).get("programs", {})}
    for name, program in programs.items():
        for kernel, n in program.get("unknown_kernels", {}).items():
            said.append(f"{n} calls of the kernel {kernel} are not counted: {name} takes longer")
        if n := program.get("branches"):
            said.append(f"{name}: of {n} choices made at run time the longest way is counted")
        if n := program.get("loops_of_unknown_length"):
            said.append(f"{name}: {n} loops are counted as if they turned once")
    return said


def _lines_of_gpus(plan: Mapping[str, Any]) -> list[str]:
    """The same of what is counted for GPUs alone."""
    sizes = plan["bytes_per_chip"]
    said = [
        *_head(plan),
        f"fits            {'NO' if plan['fits'] is False else 'not known: nothing is compiled'}",
        f"memory a GPU    {sizes['arguments'] / GIB:.2f} of {sizes['memory'] / GIB:.0f} GiB for "
        "parameters, state and batch (counted), activations besides",
        f"model FLOPs     {plan['flops_per_chip'] / 1e12:.2f} T a GPU and step (counted)",
    ]
    if plan["fits"] is False:
        return [*said, *_said_of_remedies(plan)]
    return [
        *said,
        f"MFU             {100 * plan['assumed_mfu']:.0f} % of the peak in {plan['products']} "
        "(assumed; --mfu takes what a few steps measured)",
        f"step            {1000 * plan['estimated_step_seconds']:.0f} ms (estimated)",
        _said_of_pairs(plan, "GPU"),
        _said_of_run(plan, "GPU"),
    ]


def _head(plan: Mapping[str, Any]) -> list[str]:
    return [
        f"{plan['config']}, {plan['pairs']} pairs a step, {plan['chips']} x {plan['chip']}",
        *([f"with {plan['changed']}"] if plan["changed"] else []),
        "",
    ]


def _said_of_remedies(plan: Mapping[str, Any]) -> list[str]:
    return ["", "to make it fit: " + "; ".join(plan["remedies"])]


def _said_of_pairs(plan: Mapping[str, Any], chip: str) -> str:
    rate = plan["pairs_per_second"]
    return (
        f"pairs           {rate / plan['chips']:.2f} a second and {chip}, "
        f"{rate:.0f} in all (estimated)"
    )


def _said_of_run(plan: Mapping[str, Any], chip: str) -> str:
    return f"the run         {plan['steps']} steps in {plan['hours']:.2f} h (estimated); " + (
        f"${plan['dollars']:.2f} at ${plan['price']:.2f} for an hour of a {chip} (assumed)"
        if plan["price"]
        else "no price known: --price"
    )


def _said_of_passes(plan: Mapping[str, Any]) -> Iterator[str]:
    """What comes before the steps, a line each."""
    if (passes := plan.get("passes")) is None:
        return
    for name, parts in PASSES.items():
        if not passes[name]["fits"]:
            yield f"{name:16}does NOT fit; to make it fit: {'; '.join(passes[name]['remedies'])}"
            continue
        rate = passes[name]["pictures_per_second"]
        programs = [passes["programs"][part] for part in parts]
        size = max(
            program["bytes_per_chip"]["all"] + program["bytes_beside"] for program in programs
        )
        # Pairs are drawn by one host, or by a factory on as many as one likes.
        everywhere = (
            f", {rate * plan['chips']:.0f} in all where hosts share a workdir, of one in a bucket "
            "the first host's alone"
            if name == "cache" and plan["chips"] > 1
            else ""
        )
        yield (
            f"{name:16}{rate:.2f} pictures a second and chip{everywhere} (estimated); "
            f"{size / GIB:.2f} GiB a chip (compiled)"
        )


def draw(plan: Mapping[str, Any], path: Path) -> None:
    """Writes the split of a step's time as a picture, PNG."""
    width, height, left = 900, 190, 20
    canvas = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(canvas)
    title = (
        f"{plan['config']} on {plan['chips']} x {plan['chip']}: "
        f"{1000 * plan['estimated_step_seconds']:.0f} ms a step, "
        f"{plan['pairs_per_second'] / plan['chips']:.2f} pairs a second and chip"
    )
    pen.text((left, 12), title, fill="black", font=font(18))
    shares = sorted(plan["cycles"].items(), key=lambda item: -item[1])
    total, x = sum(n for _, n in shares), float(left)
    for i, (kind, n) in enumerate(shares):
        end = x + (width - 2 * left) * n / total
        pen.rectangle((x, 50, end, 100), fill=COLORS.get(kind, "#999999"))
        column, row = i % 3, i // 3
        place = left + 290 * column, 118 + 32 * row
        pen.rectangle((*place, place[0] + 16, place[1] + 16), fill=COLORS.get(kind, "#999999"))
        text = f"{kind} {100 * n / total:.0f} %"
        pen.text((place[0] + 24, place[1] - 2), text, fill="black", font=font(16))
        x = end
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.save(path, format="PNG")
