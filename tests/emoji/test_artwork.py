import numpy as np
import pytest
from PIL import Image

from launch import build_artwork
from safetydpo_jax.emoji import artwork
from safetydpo_jax.emoji.concepts import CONCEPTS
from safetydpo_jax.errors import UserError


def test_every_concept_has_a_sprite_of_its_own():
    sprites = artwork.load_sheet()
    assert len(sprites) == len(CONCEPTS)
    small = np.stack([np.asarray(s.resize((12, 12))).ravel() for s in sprites]).astype(np.float32)
    distances = np.abs(small[:, None] - small[None]).mean(-1)
    np.fill_diagonal(distances, np.inf)
    assert distances.min() > 8  # of 255


def test_sprites_fill_their_cells():
    for sprite in artwork.load_sheet():
        left, top, right, bottom = sprite.getbbox()
        assert max(right - left, bottom - top) >= artwork.CELL - 4


def test_the_sheet_is_small():
    assert artwork.SHEET.stat().st_size < 2 * 2**20
    assert artwork.SHEET.with_name("NOTICE-artwork.md").is_file()


def test_missing_sheet(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"sprite sheet is missing.*build_artwork"):
        artwork.load_sheet(tmp_path / "none.png")


def test_not_a_picture(tmp_path):
    path = tmp_path / "artwork.png"
    path.write_bytes(b"not a picture")
    with pytest.raises(UserError, match="not a readable picture"):
        artwork.load_sheet(path)


def test_truncated_picture(tmp_path):
    path = tmp_path / "artwork.png"
    path.write_bytes(artwork.SHEET.read_bytes()[:50_000])
    with pytest.raises(UserError, match="not a readable picture"):
        artwork.load_sheet(path)


def test_wrong_size(tmp_path):
    path = tmp_path / "artwork.png"
    Image.new("RGBA", (72, 72)).save(path)
    with pytest.raises(UserError, match=r"72x72 px where \d+ concepts need"):
        artwork.load_sheet(path)


def test_empty_cell(tmp_path):
    path = tmp_path / "artwork.png"
    Image.new("RGBA", artwork.sheet_size()).save(path)
    with pytest.raises(UserError, match=f"cell of '{CONCEPTS[0].name}' is empty"):
        artwork.load_sheet(path)


def test_builder_without_the_font(tmp_path):
    with pytest.raises(UserError, match="fonts-noto-color-emoji"):
        build_artwork.build(str(tmp_path / "none.ttf"), CONCEPTS)
