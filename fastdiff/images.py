"""Image grids as PNG, with the request that made them in the file's metadata."""

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, PngImagePlugin
from torch import Tensor

from fastdiff.atomic import atomically

KEY = "fastdiff"
SHOWN = 512  # small grids are enlarged by a whole number until they are about this wide


def to_uint8(images: Tensor) -> np.ndarray:
    """float [n, C, H, W] in [-1, 1] -> uint8 [n, H, W, C]."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def grid(images: Tensor, columns: int | None = None, gap: int = 2) -> np.ndarray:
    """[n, C, H, W] -> one uint8 picture [rows, columns, C], row by row."""
    tiles = to_uint8(images)
    n, h, w, c = tiles.shape
    columns = columns or math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    sheet = np.zeros((rows * (h + gap) + gap, columns * (w + gap) + gap, c), np.uint8)
    for i, tile in enumerate(tiles):
        y, x = gap + i // columns * (h + gap), gap + i % columns * (w + gap)
        sheet[y : y + h, x : x + w] = tile
    return sheet


def save_image(image: Tensor, path: str | os.PathLike) -> None:
    """Write one image [C, H, W], 1 or 3 channels, as PNG: all of the file or nothing."""
    if image.shape[0] not in (1, 3):
        raise ValueError(f"image: {image.shape[0]} channels cannot be shown as PNG; give 1 (grey) or 3 (RGB)")
    pixels = to_uint8(image[None])[0]
    picture = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    atomically(path, lambda temporary: picture.save(temporary, format="PNG"))


def save_grid(
    images: Tensor, path: str | os.PathLike, metadata: dict[str, Any] | None = None, columns: int | None = None
) -> None:
    """Write a grid of images [n, C, H, W], 1 or 3 channels, as PNG; `metadata` goes into the file as JSON."""
    if images.shape[1] not in (1, 3):
        raise ValueError(f"images: {images.shape[1]} channels cannot be shown as PNG; give 1 (grey) or 3 (RGB)")
    sheet = grid(images, columns)
    factor = max(1, round(SHOWN / sheet.shape[1]))
    sheet = sheet.repeat(factor, 0).repeat(factor, 1)
    picture = Image.fromarray(sheet[..., 0] if sheet.shape[-1] == 1 else sheet)
    info = PngImagePlugin.PngInfo()
    if metadata is not None:
        info.add_text(KEY, json.dumps(metadata))
    atomically(path, lambda temporary: picture.save(temporary, format="PNG", pnginfo=info))


def read_metadata(path: str | os.PathLike) -> dict[str, Any]:
    """What `save_grid` stored; ValueError where the file holds nothing of the kind."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"like: {path} is no file; give a PNG written by fastdiff sample")
    try:
        with Image.open(path) as picture:
            text = picture.info.get(KEY)
    except OSError as error:
        raise ValueError(f"like: {path} is no readable image ({error})") from error
    if text is None:
        raise ValueError(f"like: {path} has no fastdiff metadata; only files written by fastdiff sample can be repeated")
    return json.loads(text)
