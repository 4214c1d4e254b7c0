"""Which pairs of an input can be used: both pictures are decoded, in as many threads as cores."""

import hashlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from safetydpo_jax.data.inputs.pair import BadPictureError, InputPair, InputSet
from safetydpo_jax.data.inputs.picture import check_picture
from safetydpo_jax.pace import Pace


def usable(found: InputSet, progress: Callable[[str], None]) -> InputSet:
    """The input without the pairs of which a picture is bad; those are among its skipped.

    Args:
      found: from a reader.
      progress: takes a line now and then: done, rate, time left.
    """
    kept = InputSet(skipped=dict(found.skipped), test=found.test)
    count = len(found.pairs)
    pace = Pace(count)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for done, (pair, (digest, fault)) in enumerate(
            zip(found.pairs, pool.map(_looked_at, found.pairs), strict=True), 1
        ):
            if fault:
                kept.skipped[pair.id] = fault
            else:
                kept.pairs.append(pair)
                kept.digests[pair.id] = digest
            if pace.due(done):
                rate, left = pace.rate(done), pace.left(done)
                progress(f"{done}/{count} pairs decoded, {rate:.0f}/s, {left:.0f} s left")
    return kept


def _looked_at(pair: InputPair) -> tuple[str, str]:
    """The digest of both pictures' files, and what is wrong with one of them."""
    digest = hashlib.sha256()
    for side, picture in (("unsafe", pair.unsafe), ("safe", pair.safe)):
        try:
            data = picture.read()
            check_picture(data)
        except BadPictureError as error:
            return "", f"{side} picture: {error}"
        digest.update(hashlib.sha256(data).digest())
    return digest.hexdigest(), ""
