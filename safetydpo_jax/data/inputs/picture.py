"""What may pass as a picture: it is decoded whole, once, before anything is made of it."""

import io
import threading
import warnings

from PIL import Image, ImageOps

from safetydpo_jax.data.inputs.pair import BadPictureError

FORMATS = ("JPEG", "PNG", "WEBP")
MAX_BYTES = 64 * 2**20
MAX_PIXELS = 50_000_000
_TOO_MANY = f"more than {MAX_PIXELS // 1_000_000} megapixels"
MIN_SIDE = 64  # of the embedded model's pictures
# Modes that lose nothing but transparency by becoming RGB.
_MODES = ("RGB", "RGBA", "L", "LA", "P", "CMYK", "YCbCr")
_ORIENTATION = 0x0112  # EXIF
_filters = threading.Lock()  # warnings' filters are the process's, and pictures come in threads


def check_picture(data: bytes) -> None:
    """Decodes a picture.

    Args:
      data: a JPEG, PNG or WebP file.

    Raises:
      BadPictureError: it is damaged, animated, of another format or mode, too small or too large.
    """
    if not data:
        raise BadPictureError("empty file")
    try:
        image = _opened(data)
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise BadPictureError(_TOO_MANY)
        if min(width, height) < MIN_SIDE:
            raise BadPictureError(f"a side of less than {MIN_SIDE} pixels")
        if getattr(image, "is_animated", False):
            raise BadPictureError("animated")
        if image.mode not in _MODES:
            raise BadPictureError("neither 8-bit colour nor grey")
        image.load()
    except (BadPictureError, MemoryError):
        raise
    except Exception as error:  # Pillow's decoders raise whatever their parsers stumble on
        raise BadPictureError("damaged, or neither JPEG, PNG nor WebP") from error


def as_kept(data: bytes) -> bytes:
    """A checked picture's file as a pair set has it: as it is, or PNG if it is no plain RGB one."""
    image = _opened(data)
    try:
        turned = image.getexif().get(_ORIENTATION, 1) != 1
    except Exception:  # as above; the picture itself is whole
        turned = False
    if image.mode == "RGB" and image.format in ("JPEG", "PNG") and not turned:
        return data
    png = io.BytesIO()
    image = ImageOps.exif_transpose(image) if turned else image
    image.convert("RGB").save(png, "png")
    return png.getvalue()


def _opened(data: bytes) -> Image.Image:
    """Only its header is read; Pillow's own warning of many pixels comes later than our bound."""
    with _filters, warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        try:
            return Image.open(io.BytesIO(data), formats=FORMATS)
        except Image.DecompressionBombError as error:
            raise BadPictureError(_TOO_MANY) from error
