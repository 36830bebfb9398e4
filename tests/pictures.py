"""Small pictures of every kind, byte by byte, for the tests of data sets."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

from PIL import Image


def chunk(kind: bytes, content: bytes) -> bytes:
    """One chunk of a PNG file."""
    checksum = zlib.crc32(kind + content)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)


def png(
    width: int, height: int, rows: bytes, *, depth: int = 8, color: int = 0, before: bytes = b""
) -> bytes:
    """A PNG file of raw rows; color 0 is grey, 2 colour, 3 palette, 4 and 6 with transparency."""
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    step = len(rows) // height
    data = b"".join(b"\0" + rows[step * y : step * (y + 1)] for y in range(height))
    chunks = chunk(b"IHDR", header) + before + chunk(b"IDAT", zlib.compress(data))
    return b"\x89PNG\r\n\x1a\n" + chunks + chunk(b"IEND", b"")


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    """A picture as a file of Pillow's."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def folder_of_one_picture(root: Path) -> Path:
    """A `folder` data set of 4 x 2 pixels: the left half has id 3, a lake, the right 9, a road."""
    for part in ("images", "labels"):
        (root / part / "train").mkdir(parents=True)
    (root / "images" / "train" / "a.png").write_bytes(saved(Image.new("L", (4, 2), 7), "PNG"))
    (root / "labels" / "train" / "a.png").write_bytes(png(4, 2, bytes([3, 3, 9, 9] * 2)))
    (root / "label_map.json").write_text('{"9": "road", "3": "lake", "0": null}')
    return root
