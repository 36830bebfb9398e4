"""Label maps become pictures in the colours of their space."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from uda import plots
from uda.datasets import LABEL_SPACES
from uda.errors import UserError


@pytest.mark.parametrize("classes", [19, 16, 13])
def test_colorize_paints_each_class_in_its_color(classes: int) -> None:
    space = LABEL_SPACES[classes]
    picture = plots.colorize(torch.arange(classes).view(1, -1), space)
    assert picture.dtype == np.uint8
    assert picture.shape == (1, classes, 3)
    assert [tuple(pixel) for pixel in picture[0].tolist()] == list(space.colors)


def test_colorize_paints_what_is_no_class_black() -> None:
    picture = plots.colorize(torch.tensor([[-1, 255, 19]]), LABEL_SPACES[19])
    assert not picture.any()


def test_panel_shows_every_picture_in_its_place(tmp_path: Path) -> None:
    height, width = 40, 90
    image = torch.full((3, height, width), 200, dtype=torch.uint8)
    maps = [torch.full((height, width), c) for c in (0, 10, 13)]
    # A ground truth at full resolution beside predictions at the network's.
    larger = [torch.full((2 * height, 2 * width), 8), *maps[1:]]
    plots.panel([(image, *maps), (image, *larger)], tmp_path / "panel.png")
    with Image.open(tmp_path / "panel.png") as picture:
        pixels = np.asarray(picture.convert("RGB"))
    colors = LABEL_SPACES[19].colors
    for color, count in (
        ((200, 200, 200), 2 * height * width),
        (colors[0], height * width),
        (colors[8], height * width),
        (colors[10], 2 * height * width),
        (colors[13], 2 * height * width),
        # A class that is only in the legend.
        (colors[17], 1),
    ):
        assert (pixels == color).all(axis=-1).sum() >= count
    columns = [np.flatnonzero((pixels == colors[c]).all(axis=-1).sum(axis=0) >= height)
               for c in (0, 10, 13)]  # fmt: skip
    assert columns[0].max() < columns[1].min()
    assert columns[1].max() < columns[2].min()


ROW = (torch.zeros(3, 8, 16, dtype=torch.uint8), *[torch.zeros(8, 16)] * 3)


def test_panel_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    path = tmp_path / "missing" / "panel.png"
    with pytest.raises(UserError, match=r"panel\.png could not be written"):
        plots.panel([ROW], path)


def test_a_kill_while_the_panel_is_written_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(descriptor: int) -> None:
        raise KeyboardInterrupt

    path = tmp_path / "panel.png"
    plots.panel([ROW], path)
    before = path.read_bytes()
    monkeypatch.setattr("os.fsync", killed)
    with pytest.raises(KeyboardInterrupt):
        plots.panel([ROW, ROW], path)
    assert path.read_bytes() == before
