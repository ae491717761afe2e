"""Draws docs/images/demo.png: a running server's answers about four photos.

`python docs/images/demo.py`
"""

import base64
import io

import httpx
import numpy as np
import skimage.data
from PIL import Image, ImageDraw, ImageFont

URL = "http://127.0.0.1:8000"
TILE = (400, 300)


def main() -> None:
    tiles = [tile(name) for name in ("chelsea", "coffee", "astronaut", "rocket")]
    width, height = tiles[0].size
    sheet = Image.new("RGB", (width * len(tiles), height), "white")
    for number, drawn in enumerate(tiles):
        sheet.paste(drawn, (number * width, 0))
    sheet.quantize(256).save("docs/images/demo.png", optimize=True)


def tile(name: str) -> Image.Image:
    """The photo, darkened outside its mask, over the three best classes."""
    photo = Image.fromarray(getattr(skimage.data, name)())
    buffer = io.BytesIO()
    photo.save(buffer, "PNG")
    classes, segments = (
        httpx.post(f"{URL}/{route}", content=buffer.getvalue()).json()["results"][0]
        for route in ("classify?top_k=3", "segment")
    )
    mask = np.asarray(Image.open(io.BytesIO(base64.b64decode(segments["mask"])))) > 0
    pixels = np.asarray(photo).copy()
    pixels[~mask] //= 4
    shown = Image.fromarray(pixels)
    shown.thumbnail(TILE)
    drawn = Image.new("RGB", (TILE[0], TILE[1] + 80), "white")
    drawn.paste(shown, ((TILE[0] - shown.width) // 2, (TILE[1] - shown.height) // 2))
    lines = [f"{p['label']}  {p['score']:.2f}" for p in classes["predictions"]]
    font = ImageFont.load_default(16)
    ImageDraw.Draw(drawn).multiline_text((20, TILE[1] + 6), "\n".join(lines), "black", font)
    return drawn


if __name__ == "__main__":
    main()
