"""Pictures of label maps and predictions, in the colours of the label space."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from uda import checkpoint
from uda.datasets import LABEL_SPACES, LabelSpace

TITLES = ("image", "ground truth", "source only", "adapted")
_GAP = 4  # pixels around each picture
_LINE = 22  # pixels of a line of text


def colorize(labels: torch.Tensor, space: LabelSpace) -> np.ndarray:
    """Paint a (H, W) map of classes as a (H, W, 3) uint8 picture; other values become black."""
    classes = labels.detach().cpu().long()
    classes = classes.where((classes >= 0) & (classes < len(space)), len(space))
    palette = np.array([*space.colors, (0, 0, 0)], dtype=np.uint8)
    return palette[classes.numpy()]


def panel(
    rows: Sequence[Sequence[torch.Tensor]],
    path: str | Path,
    *,
    space: LabelSpace = LABEL_SPACES[19],
    titles: Sequence[str] = TITLES,
) -> None:
    """Write rows of pictures with a title above each column and the classes' colours below.

    Args:
        rows: each has an image, (3, H, W) uint8 as `datasets.to_rgb` returns it, then one (H, W)
            map of classes for each further title.
        path: PNG file to write.
        space: names and colours of the classes.
        titles: one for each column.

    Raises:
        UserError: the file cannot be written.
    """
    columns = [
        [image.permute(1, 2, 0).cpu().numpy(), *(colorize(labels, space) for labels in maps)]
        for image, *maps in rows
    ]
    height, width = columns[0][0].shape[:2]
    step_x, step_y = width + _GAP, height + _GAP
    legend_columns = max(1, (len(titles) * step_x) // 130)
    legend_lines = -(-len(space) // legend_columns)
    bottom = _LINE + _GAP + len(rows) * step_y
    sheet = Image.new(
        "RGB", (len(titles) * step_x + _GAP, bottom + legend_lines * _LINE + _GAP), "white"
    )
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=14)
    for column, title in enumerate(titles):
        center = _GAP + column * step_x + width // 2
        pen.text((center, _LINE // 2 + 2), title, fill="black", font=font, anchor="mm")
    for row, pictures in enumerate(columns):
        for column, picture in enumerate(pictures):
            # A map may differ from the image in size: the ground truth has full resolution.
            picture = Image.fromarray(picture).resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(picture, (_GAP + column * step_x, _LINE + _GAP + row * step_y))
    for c, (name, color) in enumerate(zip(space.names, space.colors, strict=True)):
        line, column = divmod(c, legend_columns)
        x, y = _GAP + column * (sheet.width // legend_columns), bottom + line * _LINE
        pen.rectangle((x, y + 4, x + 14, y + 18), fill=color, outline="black")
        pen.text((x + 20, y + _LINE // 2), name, fill="black", font=font, anchor="lm")
    checkpoint.write(Path(path), lambda file: sheet.save(file, "png"))
