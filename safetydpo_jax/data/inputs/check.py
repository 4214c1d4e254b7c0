"""Which pairs of an input can be used: both pictures are decoded, in as many threads as cores."""

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from safetydpo_jax.data.inputs.pair import BadPictureError, InputPair, InputSet
from safetydpo_jax.data.inputs.picture import check_picture

REPORT_SECONDS = 10.0


def usable(found: InputSet, progress: Callable[[str], None]) -> InputSet:
    """The input without the pairs of which a picture is bad; those are among its skipped.

    Args:
      found: from a reader.
      progress: takes a line now and then: done, rate, time left.
    """
    kept = InputSet(skipped=dict(found.skipped), test=found.test)
    count, began = len(found.pairs), time.monotonic()
    said = began
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for done, (pair, reason) in enumerate(
            zip(found.pairs, pool.map(_fault, found.pairs), strict=True), 1
        ):
            if reason:
                kept.skipped[pair.id] = reason
            else:
                kept.pairs.append(pair)
            if done == count or time.monotonic() - said > REPORT_SECONDS:
                said = time.monotonic()
                rate = done / max(said - began, 1e-9)
                left = (count - done) / rate
                progress(f"{done}/{count} pairs decoded, {rate:.0f}/s, {left:.0f} s left")
    return kept


def _fault(pair: InputPair) -> str:
    for side, picture in (("unsafe", pair.unsafe), ("safe", pair.safe)):
        try:
            check_picture(picture.read())
        except BadPictureError as error:
            return f"{side} picture: {error}"
    return ""
