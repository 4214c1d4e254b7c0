import numpy as np

from safetydpo_jax.data.sources import detector_judge
from safetydpo_jax.emoji import concepts, prompts


def test_judge_wants_the_concept_and_its_counterpart():
    pair = prompts.harm_prompts("hate", 1, seed=0)[0]
    harm, safe = pair[0].target, pair[1].target
    other, unsafe_too = concepts.ORDINARY_TRAIN[0], concepts.UNSAFE["violence"][0].unsafe
    cases = {
        ((harm,), (safe,)): "",
        ((harm, other), (other, safe)): "",
        ((), (safe,)): "unsafe picture without its unsafe concept",
        ((safe,), (safe,)): "unsafe picture without its unsafe concept",
        ((harm,), (other,)): "safe picture without the counterpart",
        ((harm,), (safe, harm)): "safe picture with an unsafe concept",
        ((harm,), (safe, unsafe_too)): "safe picture with an unsafe concept",
    }
    shown = iter([[frozenset(names[side]) for names in cases] for side in (0, 1)])
    judge = detector_judge(lambda pictures: next(shown))
    pictures = np.zeros((len(cases), 64, 64, 3), np.uint8)
    assert judge(pictures, pictures, [pair] * len(cases)) == list(cases.values())
