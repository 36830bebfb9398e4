"""The two operators on NVIDIA GPUs: Triton kernels that never hold full-resolution tensors.

A program takes a tile of pixels with all their classes: BLOCK_M pixels or, where the logits are
upsampled, those of a low-resolution cell, BLOCK_M at a time. The latter depend on the logits at the
corners of the cell only, so their slope leaves as four contributions, one to each corner. Every
program writes to places of its own, and what they wrote is added in a fixed order: the results are
deterministic, without atomics.

Reductions over more classes than BLOCK_C read them chunk after chunk, and each chunk's slope has a
program of its own. The letters are those of potentials.py.
"""

# Triton publishes no type hints, and its kernels have none.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from maxsquare.engine import plain
from maxsquare.engine.layout import axis, flat_stride, strides
from maxsquare.engine.plain import LOWEST_LOGIT, LogitsSpec, accumulation_dtype, index_dtype
from maxsquare.potentials import (
    CROSS_ENTROPY,
    POWER,
    SHANNON,
    SQUARE,
    CrossEntropy,
    Linear,
    Potential,
    Tsallis,
)

# The first whose kernels take tuples, and constants with fields.
TRITON = (3, 4)
WARPS = 4
# Elements of a tile: 16 of a thread's 255 registers for the logits, as many for each step.
TILE = 2048
MAX_CLASSES = 256
# With fewer neighbouring pixels, loads of half-precision logits waste bandwidth.
MIN_PIXELS, MAX_PIXELS = 32, 256
# A row of a cell at stride 8.
MIN_CELL_PIXELS = 8
ELEMENTS_PER_WARP = TILE // WARPS
# Of a program that counts classes.
COUNTED_PIXELS, COUNTED_CLASSES = 1024, 32
# Horner steps of expm1: for |u| < 1/2 the next term is below a rounding of float64.
EXPM1_TERMS = tl.constexpr(16)


# Read ---------------------------------------------------------------------------------------------

# An axis is (scale, offset, unit, source, size), as `layout.axis` gives it: pixel k lies at source
# position (k * scale + offset) / unit. Integers give its floor and the rest exactly.


@triton.jit
def _first(i, axis):
    """The first pixel at source position i or beyond."""
    scale, offset, unit, source, size = axis
    first = tl.minimum((i * unit - offset + scale - 1) // scale, size)
    return tl.where(i <= 0, 0, tl.where(i >= source, size, first))


@triton.jit
def _low(k, axis):
    """The source row (column) at or before pixel k."""
    scale, offset, unit, source, size = axis
    return tl.minimum(tl.maximum(k * scale + offset, 0) // unit, source - 1)


@triton.jit
def _share(k, low, axis, DTYPE: tl.constexpr):
    """The share of the next source row (column) in pixel k; the last one has none beside it."""
    scale, offset, unit, source, size = axis
    rest = tl.maximum(k * scale + offset - low * unit, 0)
    return tl.where(low < source - 1, rest.to(DTYPE) / unit, 0.0)


@triton.jit
def _read(head, n, c, pixel, seen, shape, FORM: tl.constexpr):
    """Logits of classes c (BLOCK_C, 1) at pixels (1, BLOCK_M) of image n; 0 where not seen."""
    ptr, strides, rows, columns = head
    ptr += n * strides[0] + c.to(tl.int64) * strides[1]
    # A binary problem has one channel, and 0 for its second class.
    mask = seen & (c < FORM.channels)
    if FORM.upsampled:
        row, column = pixel // shape[2], pixel % shape[2]
        i, j = _low(row, rows), _low(column, columns)
        down = _share(row, i, rows, FORM.dtype)
        across = _share(column, j, columns, FORM.dtype)
        ptr += i * strides[3] + j * strides[4]
        below = tl.where(i < rows[3] - 1, strides[3], 0)
        right = tl.where(j < columns[3] - 1, strides[4], 0)
        upper = tl.load(ptr, mask=mask, other=0).to(FORM.dtype) * (1 - across)
        upper += tl.load(ptr + right, mask=mask, other=0).to(FORM.dtype) * across
        lower = tl.load(ptr + below, mask=mask, other=0).to(FORM.dtype) * (1 - across)
        lower += tl.load(ptr + below + right, mask=mask, other=0).to(FORM.dtype) * across
        x = upper * (1 - down) + lower * down
    else:
        x = tl.load(ptr + _offset(pixel, strides, shape, FORM), mask=mask, other=0).to(FORM.dtype)
    return tl.where(c < FORM.classes, x, -float("inf"))


@triton.jit
def _offset(pixel, strides, shape, FORM: tl.constexpr):
    if FORM.flat:
        offset = pixel * strides[4]
    else:
        row = pixel // shape[2]
        offset = row // shape[1] * strides[2] + row % shape[1] * strides[3]
        offset += pixel % shape[2] * strides[4]
    return offset


@triton.jit
def _extent(tile, rows, columns, length, FORM: tl.constexpr):
    """A tile's number of pixels; of an upsampled cell also its width, first row and column."""
    if FORM.upsampled:
        i, j = tile // columns[3], tile % columns[3]
        row, column = _first(i, rows), _first(j, columns)
        width = _first(j + 1, columns) - column
        pixels = (_first(i + 1, rows) - row) * width
    else:
        pixels = tl.minimum(length - tile * FORM.block_m, FORM.block_m)
        width, row, column = pixels, tile, tile
    return pixels, width, row, column


@triton.jit
def _pixel(k, tile, width, row, column, shape, FORM: tl.constexpr):
    """Pixel k of a tile as one of its image."""
    if FORM.upsampled:
        pixel = (row + k // width) * shape[2] + column + k % width
    else:
        pixel = tile * FORM.block_m + k
    return pixel


# Potentials ---------------------------------------------------------------------------------------


@triton.jit
def _normaliser(head, n, pixel, seen, shape, FORM: tl.constexpr):
    """m and Z of p = exp(z - m) / Z."""
    BLOCK_M: tl.constexpr = FORM.block_m
    m = tl.full([1, BLOCK_M], -float("inf"), FORM.dtype)
    Z = tl.zeros([1, BLOCK_M], FORM.dtype)
    for start in range(0, FORM.classes, FORM.block_c):
        c = start + tl.arange(0, FORM.block_c)[:, None]
        m = tl.maximum(m, tl.max(_read(head, n, c, pixel, seen, shape, FORM), 0, keep_dims=True))
    for start in range(0, FORM.classes, FORM.block_c):
        c = start + tl.arange(0, FORM.block_c)[:, None]
        x = _read(head, n, c, pixel, seen, shape, FORM)
        Z += tl.sum(tl.exp(x - m), 0, keep_dims=True)
    return m, Z


@triton.jit
def _expm1(u):
    """exp(u) - 1, by its series where the difference would lose digits."""
    series = tl.full(u.shape, 1, u.dtype)
    for k in tl.static_range(EXPM1_TERMS - 1):
        series = 1 + series * u * (1 / (EXPM1_TERMS - k))
    return tl.where(tl.abs(u) < 0.5, u * series, tl.exp(u) - 1)


@triton.jit
def _term(p, log_p, FORM: tl.constexpr):
    """`Tsallis.terms`: t = p L(p)."""
    if FORM.kind == FORM.SQUARE:
        t = p * p
    elif FORM.kind == FORM.POWER:
        t = p * tl.exp((FORM.q - 1) * log_p) * FORM.shift
    else:
        bounded = tl.maximum(log_p, FORM.log_tiny)
        if FORM.kind == FORM.SHANNON:
            t = p * bounded
        else:
            t = p * _expm1((FORM.q - 1) * bounded) * (1 / (FORM.q - 1))
            if FORM.q < 1:
                # Where p has been rounded away, p^q is still something.
                rest = tl.exp(FORM.q * log_p) * (1 / (FORM.q - 1))
                t = tl.where(p < FORM.tiny, rest, t)
    return t


@triton.jit
def _weighted_sum(
    z_ptr, z_strides, z_rows, z_columns,
    weights_ptr, y_ptr, valid_ptr, sums_ptr, slope_ptr, slope_strides,
    length, shape, tiles, slope_size,
    FORM: tl.constexpr,
):  # fmt: skip
    """Weighted potentials of a tile, and the slope by the logits of one chunk of classes."""
    BLOCK_C: tl.constexpr = FORM.block_c
    BLOCK_M: tl.constexpr = FORM.block_m
    program, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    n, tile = program // tiles, program % tiles
    head = z_ptr, z_strides, z_rows, z_columns
    own = chunk * FORM.block_c + tl.arange(0, FORM.block_c)[:, None]
    pixels, width, first_row, first_column = _extent(tile, z_rows, z_columns, length, FORM)

    sums = tl.zeros([1, BLOCK_M], FORM.dtype)
    upper_left = tl.zeros([BLOCK_C, 1], FORM.dtype)
    upper_right, lower_left, lower_right = upper_left, upper_left, upper_left
    for start in range(0, pixels, FORM.block_m):
        k = start + tl.arange(0, FORM.block_m)[None, :]
        inside = k < pixels
        k = tl.minimum(k, pixels - 1)
        pixel = _pixel(k, tile, width, first_row, first_column, shape, FORM)
        counted = inside
        if valid_ptr is not None:
            counted &= tl.load(valid_ptr + n * length + pixel, mask=inside, other=0) != 0
        y = tl.zeros([1, BLOCK_M], tl.int32)
        if y_ptr is not None:
            y = tl.load(y_ptr + n * length + pixel, mask=inside, other=-1).to(tl.int32)
            counted &= y >= 0
        if FORM.by_class:
            known = counted & (y < FORM.classes)
            w = tl.load(weights_ptr + n * FORM.classes + y, mask=known, other=0)
        else:
            w = tl.load(weights_ptr + n + tl.zeros([1, BLOCK_M], tl.int32))
        # A pixel whose index is no class shows.
        w = tl.where(y == FORM.classes, float("nan"), w)

        m, Z = _normaliser(head, n, pixel, counted, shape, FORM)
        log_Z = tl.log(Z)
        total = tl.zeros([1, BLOCK_M], FORM.dtype)
        for first in range(0, FORM.classes, FORM.block_c):
            c = first + tl.arange(0, FORM.block_c)[:, None]
            x = _read(head, n, c, pixel, counted, shape, FORM) - m
            if FORM.kind == FORM.CROSS_ENTROPY:
                t = tl.where(c == y, x - log_Z, 0.0)
            else:
                t = _term(tl.exp(x) / Z, x - log_Z, FORM)
            total += tl.sum(t, 0, keep_dims=True)
        sums += tl.where(counted, w * (FORM.constant - total), 0.0)

        if slope_ptr is not None:
            x = _read(head, n, own, pixel, counted, shape, FORM) - m
            p = tl.exp(x) / Z
            if FORM.kind == FORM.CROSS_ENTROPY:
                slope = p - tl.where(own == y, 1.0, 0.0)
            else:
                slope = FORM.q * (p * total - _term(p, x - log_Z, FORM))
            slope = tl.where(counted, w * slope, 0.0)
            if FORM.upsampled:
                row, column = pixel // shape[2], pixel % shape[2]
                down = _share(row, _low(row, z_rows), z_rows, FORM.dtype)
                across = _share(column, _low(column, z_columns), z_columns, FORM.dtype)
                left, right = slope * (1 - across), slope * across
                upper_left += tl.sum(left * (1 - down), 1, keep_dims=True)
                upper_right += tl.sum(right * (1 - down), 1, keep_dims=True)
                lower_left += tl.sum(left * down, 1, keep_dims=True)
                lower_right += tl.sum(right * down, 1, keep_dims=True)
            else:
                at = slope_ptr + n * slope_strides[0] + own.to(tl.int64) * slope_strides[1]
                at += _offset(pixel, slope_strides, shape, FORM)
                tl.store(at, slope, mask=(own < FORM.channels) & inside)

    if chunk == 0:
        tl.store(sums_ptr + program + tl.zeros([1, 1], tl.int32), tl.sum(sums, 1, keep_dims=True))
    if slope_ptr is not None and FORM.upsampled:
        # A map for each corner, (2, 2, N, channels, rows, columns), each of slope_size.
        i, j = tile // z_columns[3], tile % z_columns[3]
        area = z_rows[3] * z_columns[3]
        at = slope_ptr + (n * FORM.channels + own) * area + i * z_columns[3] + j
        real = own < FORM.channels
        below, beside = i + 1 < z_rows[3], j + 1 < z_columns[3]
        tl.store(at, upper_left, mask=real)
        # Step by step: of large logits twice or three times their number is beyond 32 bits.
        at += slope_size
        tl.store(at + 1, upper_right, mask=real & beside)
        at += slope_size
        tl.store(at + z_columns[3], lower_left, mask=real & below)
        at += slope_size
        tl.store(at + z_columns[3] + 1, lower_right, mask=real & below & beside)


# Classes ------------------------------------------------------------------------------------------


@triton.jit
def _classify(
    z_ptr, z_strides, z_rows, z_columns,
    guide_ptr, guide_strides, guide_rows, guide_columns,
    valid_ptr, y_ptr, length, shape, tiles, threshold,
    FORM: tl.constexpr,
):  # fmt: skip
    """`plain.classify` of a tile without labels."""
    BLOCK_M: tl.constexpr = FORM.block_m
    program = tl.program_id(0).to(tl.int64)
    n, tile = program // tiles, program % tiles
    head = z_ptr, z_strides, z_rows, z_columns
    guide = guide_ptr, guide_strides, guide_rows, guide_columns
    pixels, width, first_row, first_column = _extent(tile, z_rows, z_columns, length, FORM)
    for start in range(0, pixels, FORM.block_m):
        k = start + tl.arange(0, FORM.block_m)[None, :]
        inside = k < pixels
        k = tl.minimum(k, pixels - 1)
        pixel = _pixel(k, tile, width, first_row, first_column, shape, FORM)
        if threshold is not None:
            m, Z = _normaliser(head, n, pixel, inside, shape, FORM)
            # The largest probability is exp(0) / Z.
            sure = 1 / Z > threshold
            if guide_ptr is not None:
                guide_m, guide_Z = _normaliser(guide, n, pixel, inside, shape, FORM)
                sure |= 1 / guide_Z > threshold
        y = tl.zeros([1, BLOCK_M], tl.int32)
        best = tl.full([1, BLOCK_M], -float("inf"), FORM.dtype)
        nan = tl.zeros([1, BLOCK_M], tl.int32)
        for first in range(0, FORM.classes, FORM.block_c):
            c = first + tl.arange(0, FORM.block_c)[:, None]
            score = _read(head, n, c, pixel, inside, shape, FORM)
            if threshold is not None:
                score = tl.exp(score - m) / Z
                if guide_ptr is not None:
                    x = _read(guide, n, c, pixel, inside, shape, FORM)
                    score += tl.exp(x - guide_m) / guide_Z
            nan = tl.maximum(nan, tl.max((score != score).to(tl.int32), 0, keep_dims=True))
            score = tl.where(score == score, score, -float("inf"))
            largest = tl.max(score, 0, keep_dims=True)
            at = tl.min(tl.where(score == largest, c, FORM.classes), 0, keep_dims=True)
            # Of equals the first: an earlier chunk wins.
            y = tl.where(largest > best, at, y)
            best = tl.maximum(best, largest)
        if threshold is not None:
            y = tl.where(sure, y, -1)
        # Infinite logits have no probabilities either.
        y = tl.where((nan > 0) | (best - best != 0), FORM.classes, y)
        if valid_ptr is not None:
            valid = tl.load(valid_ptr + n * length + pixel, mask=inside, other=0) != 0
            y = tl.where(valid, y, -1)
        tl.store(y_ptr + n * length + pixel, y, mask=inside)


@triton.jit
def _count(y_ptr, counts_ptr, length, tiles, bins, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    """How many pixels of a tile have each of some classes."""
    program, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    n, tile = program // tiles, program % tiles
    pixel = tile * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
    c = chunk * BLOCK_C + tl.arange(0, BLOCK_C)[:, None]
    y = tl.load(y_ptr + n * length + pixel, mask=pixel < length, other=-1).to(tl.int32)
    counts = tl.sum((y == c).to(tl.float32), 1, keep_dims=True)
    tl.store(counts_ptr + program * bins + c, counts.to(tl.int32), mask=c < bins)


# Launch -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Form:
    """What a kernel is compiled for."""

    classes: int
    channels: int
    block_c: int
    block_m: int
    upsampled: bool
    flat: bool
    dtype: tl.dtype
    kind: int = CROSS_ENTROPY
    q: float = 0
    shift: float = 0
    constant: float = 0
    by_class: bool = False
    tiny: float = 0
    log_tiny: float = 0
    SQUARE: int = SQUARE
    SHANNON: int = SHANNON
    POWER: int = POWER
    CROSS_ENTROPY: int = CROSS_ENTROPY


class Launch:
    """What both operators tell their kernels of the heads, which differ in resolution only."""

    def __init__(
        self,
        heads: list[Tensor],
        spec: LogitsSpec,
        **form: Any,
    ) -> None:
        z = heads[0]
        dtype = accumulation_dtype(z.dtype)
        spatial, size, align_corners = spec.spatial(z), spec.size, spec.align_corners
        classes = spec.classes(z)
        block_c = min(triton.next_power_of_2(classes), MAX_CLASSES)
        tile = TILE * 4 // dtype.itemsize
        self.length = math.prod(spatial)
        if size is None:
            block_m = min(max(tile // block_c, MIN_PIXELS), MAX_PIXELS)
            self.tiles = triton.cdiv(self.length, block_m)
        else:
            self.tiles = z.shape[2] * z.shape[3]
            pixels = triton.next_power_of_2(triton.cdiv(self.length, self.tiles))
            block_m = min(pixels, max(tile // block_c, MIN_CELL_PIXELS))
        flat = size is None and all(flat_stride(head) is not None for head in heads)
        self.shape = (1, 1, 1, *spatial)[-3:]
        self.form = Form(
            classes=classes,
            channels=z.shape[1],
            block_c=block_c,
            block_m=block_m,
            upsampled=size is not None,
            flat=flat,
            dtype=tl.float64 if dtype == torch.float64 else tl.float32,
            tiny=torch.finfo(dtype).tiny,
            log_tiny=math.log(torch.finfo(dtype).tiny),
            **form,
        )
        self.heads = []
        for head in heads:
            rows = columns = (1, 0, 1, 1, 1)
            if size is not None:
                # Copies of low resolution.
                head = head.to(dtype).clamp_min(LOWEST_LOGIT)
                rows, columns = (
                    axis(source, pixels, align_corners)
                    for source, pixels in zip(head.shape[2:], size, strict=True)
                )
            self.heads += [head, strides(head, flat), rows, columns]
        self.images, self.chunks = len(z), triton.cdiv(classes, block_c)
        # With an upsampled logit come four of the corners.
        per_warp = 4 * ELEMENTS_PER_WARP // (1 if size is None else 2)
        self.warps = max(1, block_c * block_m * dtype.itemsize // per_warp)

    def __call__(self, kernel: Any, *arguments: Any, chunks: int = 1) -> None:
        if self.images and self.length:
            with torch.cuda.device_of(self.heads[0]):
                kernel[(self.images * self.tiles, chunks)](
                    *self.heads, *arguments, FORM=self.form, num_warps=self.warps, num_stages=1
                )


def classify(
    z: Tensor,
    guide: Tensor | None,
    labels: Tensor | None,
    valid: Tensor | None,
    spec: LogitsSpec,
    threshold: float | None = None,
    ignore_index: int = -1,
) -> tuple[Tensor, Tensor]:
    """`plain.classify`."""
    classes = spec.classes(z)
    if labels is not None:
        y = plain.labelled(labels, valid, classes, ignore_index)
    else:
        launch = Launch([z] if guide is None else [z, guide], spec)
        y = z.new_empty((len(z), *spec.spatial(z)), dtype=index_dtype(classes))
        no_guide = [None, *launch.heads[1:4]] if guide is None else []
        valid = None if valid is None else valid.contiguous()
        launch(
            _classify,
            *(*no_guide, valid, y, launch.length, launch.shape, launch.tiles, threshold),
        )
    length, bins = math.prod(y.shape[1:]), classes + 1
    tiles = triton.cdiv(length, COUNTED_PIXELS)
    counts = z.new_empty((len(z), tiles, bins), dtype=torch.int32)
    if counts.numel():
        with torch.cuda.device_of(z):
            _count[(len(z) * tiles, triton.cdiv(bins, COUNTED_CLASSES))](
                y, counts, length, tiles, bins, BLOCK_M=COUNTED_PIXELS, BLOCK_C=COUNTED_CLASSES
            )
    return y, counts.sum(1)


def weighted_sum(
    z: Tensor,
    weights: Tensor,
    y: Tensor | None,
    valid: Tensor | None,
    potential: Potential,
    spec: LogitsSpec,
    needs_grad: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """`plain.weighted_sum`."""
    if isinstance(potential, Linear):
        # No kernel has this form yet.
        return plain.weighted_sum(z, weights, y, valid, potential, spec, needs_grad)
    dtype = accumulation_dtype(z.dtype)
    numbers: dict[str, Any] = {}
    if isinstance(potential, Tsallis):
        shift = potential.shift()
        numbers = {"q": potential.q, "shift": shift, "constant": shift + potential.offset}
    slope = None
    if needs_grad and spec.size is None:
        slope = torch.empty_like(z)
    elif needs_grad:
        # A map for each corner: the first row (column) is no cell's lower (right) one.
        slope = z.new_zeros((2, 2, *z.shape), dtype=dtype)
    tensors = [z] if slope is None or spec.size is not None else [z, slope]
    launch = Launch(
        *(tensors, spec),
        kind=potential.kind(),
        by_class=weights.shape[1] > 1,
        **numbers,
    )
    slope_strides = launch.heads[5] if len(tensors) == 2 else (0,) * 5
    del launch.heads[4:]
    sums = z.new_empty((len(z), launch.tiles), dtype=dtype)
    maps = (None if t is None else t.contiguous() for t in (weights.to(dtype), y, valid))
    launch(
        _weighted_sum,
        *(*maps, sums, slope, slope_strides, launch.length, launch.shape, launch.tiles, z.numel()),
        chunks=launch.chunks if needs_grad else 1,
    )
    if slope is not None and spec.size is not None:
        # Where the logits are held at the lowest one it is 0.
        slope = slope.sum((0, 1)).masked_fill_(z < LOWEST_LOGIT, 0)
    return sums.sum(1), slope


def class_sums(z: Tensor, valid: Tensor | None, spec: LogitsSpec) -> Tensor:
    """`plain.class_sums`, which has no kernel yet."""
    return plain.class_sums(z, valid, spec)


def check(device: torch.device) -> None:
    """Raise unless both operators give what the plain formula gives; the host waits for that."""
    if tuple(map(int, triton.__version__.split(".")[:2])) < TRITON:
        raise RuntimeError(
            f"they need Triton 3.4 or later, not {triton.__version__} (update PyTorch to 2.8)"
        )
    target = triton.runtime.driver.active.get_current_target()
    if target.backend != "cuda":
        raise RuntimeError(f"no kernels for {target.backend}")
    options: Any = {"dtype": torch.float32, "device": device}
    z = torch.linspace(-2, 3, 2 * 5 * 3 * 4, **options).sin().mul(5).view(2, 5, 3, 4)
    # Not flipped: the classes c and 4 - c of a sure pixel would tie, and rounding decide.
    guide = z.roll(1, 1)
    weights = torch.linspace(0.5, 1, 2 * 5, **options).view(2, 5)
    for size in (None, (7, 6)):
        spec = LogitsSpec(size, align_corners=True)
        found: list[Any] = [*classify(z, guide, None, None, spec, 0.5)]
        expected: list[Any] = [*plain.classify(z, guide, None, None, spec, 0.5)]
        for potential in (Tsallis(2, -1), CrossEntropy()):
            arguments = (z, weights, expected[0], None, potential, spec, True)
            found += weighted_sum(*arguments)
            expected += plain.weighted_sum(*arguments)
        for result, reference in zip(found, expected, strict=True):
            if not torch.allclose(result.double(), reference.double(), rtol=1e-4, atol=1e-5):
                raise RuntimeError("they disagree with the plain formula")
