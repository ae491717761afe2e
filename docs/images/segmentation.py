"""Draws docs/images/segmentation.jpg: the demo's segmenters on four photos, and its attention.

`python docs/images/segmentation.py`
"""

import base64
import io
from typing import Any

import skimage.data
from PIL import Image, ImageDraw, ImageFont

from models import Registry

PHOTOS = ("chelsea", "coffee", "astronaut", "rocket")
COLUMNS = (
    ("photo", None, {}),
    ("dinov2-focus (trained)", "dinov2-focus", {"task": "segment"}),
    ("dinov2-cut (TokenCut)", "dinov2-cut", {"task": "segment"}),
    ("dinov2-attention (DINO)", "dinov2-attention", {"task": "segment", "min_area": 400}),
    ("/attention", "dinov2-focus", {"task": "attention"}),
)
TILE = (260, 200)
TITLE = 24


def main() -> None:
    registry = Registry.from_catalog("demo", device="cpu")
    size = (len(COLUMNS) * TILE[0], TITLE + len(PHOTOS) * TILE[1])
    sheet = Image.new("RGB", size, "white")
    font = ImageFont.load_default(15)
    for column, (title, model, options) in enumerate(COLUMNS):
        ImageDraw.Draw(sheet).text((column * TILE[0] + 8, 3), title, "black", font)
        for row, name in enumerate(PHOTOS):
            photo = Image.fromarray(getattr(skimage.data, name)())
            drawn = photo if model is None else overlay(registry, model, photo, options)
            drawn.thumbnail((TILE[0] - 4, TILE[1] - 4))
            sheet.paste(drawn, (column * TILE[0] + 2, TITLE + row * TILE[1] + 2))
    sheet.save("docs/images/segmentation.jpg", quality=85)


def overlay(
    registry: Registry, model: str, photo: Image.Image, options: dict[str, Any]
) -> Image.Image:
    [answer] = registry.get(model).predict([photo], output="overlay", **options)
    encoded = answer["mask" if "mask" in answer else "attention"]
    return Image.open(io.BytesIO(base64.b64decode(encoded)))


if __name__ == "__main__":
    main()
