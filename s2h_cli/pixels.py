"""How an image file becomes 8-bit pixels. The infer scripts contain the source of `decode`, to see what training saw."""

import numpy as np
from PIL import Image, ImageOps


def decode(image: Image.Image, mode: str) -> Image.Image:
    """Turns an opened image upright, as its EXIF data says, and converts it to mode "RGB" or "L".

    Of an animation this is the first frame. Transparency is dropped. Grey values of 16 bits are scaled to 8 bits.
    Pillow's modes "I" and "F" do not tell their range: it is 0..1 ("F" only), 0..255 or 0..65535, the first of these
    that holds all values.

    Raises:
        ValueError: a grey value is above 65535.
    """
    image.load()
    try:
        image = ImageOps.exif_transpose(image)
    except Exception:  # EXIF data that cannot be read names no orientation
        pass
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        values = np.nan_to_num(np.asarray(image).astype(np.float64)).clip(0)
        top = next((top for top in (1, 255, 65535) if values.max() <= top and (top > 1 or image.mode == "F")), None)
        if top is None:
            raise ValueError("its grey values are above 65535; save it with 8 or 16 bits")
        image = Image.fromarray((values * (255 / top)).astype(np.uint8))
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # Pillow warns about any other way
    elif image.mode in ("LAB", "La"):  # Pillow cannot convert these to every mode
        image = image.convert({"LAB": "RGB", "La": "LA"}[image.mode])
    return image.convert(mode)
