"""Work taken in parts, so that memory holds one at a time."""


def num_parts(count: int, size: int, most: int) -> int:
    """Into how many parts to split `count` things of `size` bytes for none to be above `most`."""
    fitting = (n for n in range(1, count) if count % n == 0 and size <= n * most)
    return next(fitting, count)
