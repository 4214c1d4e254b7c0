import numpy as np
import pytest

from safetydpo_jax.errors import UserError
from safetydpo_jax.evaluate.pictures import CELL, Row, Section, blurred, picture_grid


def detailed(n, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, 64, 64, 3), dtype=np.uint8)


def section(n=3, labels=None):
    return Section(
        "Unsafe prompts",
        labels or [f"hate-test-{i:05d}" for i in range(n)],
        [
            Row("base", detailed(n), ["unsafe"] * n, np.full(n, True)),
            Row("step 125\nIP 2 %", detailed(n, 1), ["counterpart"] * n, np.full(n, False)),
        ],
    )


def edges(picture):
    picture = np.asarray(picture).astype(float)
    return float(np.abs(np.diff(picture, axis=0)).mean() + np.abs(np.diff(picture, axis=1)).mean())


def cells(grid, n):
    """The grid's cells: (2, n) pictures, base over expert."""
    from safetydpo_jax.evaluate import pictures as p

    image, found = np.asarray(grid), []
    for row in range(2):
        top = 140 + 60 + row * (CELL + p.CAPTION + p.GAP // 2) + p.FRAME
        lefts = [p.MARGIN + p.SIDE + i * (CELL + p.GAP) + p.FRAME for i in range(n)]
        side = CELL - 2 * p.FRAME
        found.append([image[top : top + side, left : left + side] for left in lefts])
    return found


@pytest.mark.parametrize("size", [64, 512])
def test_blur_destroys_detail(size):
    yy, xx = np.mgrid[:size, :size] * 64 // size
    shape = ((xx // 4 + yy // 4) % 2 * 255).astype(np.uint8)  # a checkerboard of 4-pixel squares
    picture = np.repeat(shape[:, :, None], 3, axis=2)
    hidden = blurred(picture)
    assert hidden.shape == picture.shape
    assert hidden.std() < 0.02 * picture.std()
    assert edges(hidden) < 0.02 * edges(picture)


def test_blur_keeps_no_more_than_sixteen_colours_of_a_drawing():
    rng = np.random.default_rng(0)
    base = rng.integers(0, 256, (4, 4, 3)).repeat(16, 0).repeat(16, 1)
    noise = rng.integers(-60, 60, (64, 64, 3))
    means = (base + noise).clip(0, 255)
    means = means.reshape(4, 16, 4, 16, 3).mean((1, 3)).round()
    smooth = means.astype(np.uint8).repeat(16, 0).repeat(16, 1)
    with_detail = (base + noise).clip(0, 255).astype(np.uint8)
    difference = blurred(with_detail).astype(int) - blurred(smooth).astype(int)
    assert np.abs(difference).max() <= 2  # what is left depends on the patches' means alone


def test_only_what_is_hidden_is_blurred():
    (before, after) = cells(picture_grid([section()], title="t"), 3)
    assert max(map(edges, before)) < 10 < 40 < min(map(edges, after))


def test_reveal_shows_all():
    hidden = picture_grid([section()], title="t")
    shown = picture_grid([section()], title="t", reveal=True)
    assert min(edges(c) for row in cells(shown, 3) for c in row) > 40
    assert np.array_equal(cells(hidden, 3)[1], cells(shown, 3)[1])


def test_long_labels_and_one_column_fit():
    grid = picture_grid([section(1, labels=["illegal_activity-held_out_concepts-00012"])] * 2,
                             title="t")  # fmt: skip
    assert grid.mode == "RGB"
    border = np.asarray(grid)[:, -20:]
    assert (border == 255).all()


def test_wrong_sections():
    with pytest.raises(UserError, match="at least one section"):
        picture_grid([], title="t")
    with pytest.raises(UserError, match="unequal length"):
        picture_grid([section(labels=["a", "b"])], title="t")
    with pytest.raises(UserError, match="unequal length"):
        picture_grid([section(0)], title="t")
    with pytest.raises(UserError, match="unequal length"):
        picture_grid([Section("no rows", ["a"], [])], title="t")
