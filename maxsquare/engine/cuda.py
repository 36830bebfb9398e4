"""The operators on NVIDIA GPUs: Triton kernels that never hold full-resolution tensors.

Every kernel works on tiles [BLOCK_C, BLOCK_M] of classes and pixels. At full resolution the pixels
of a tile are neighbours, read and written 16 bytes at a time. Upsampled pixels lie between the
corners of low-resolution cells: a program takes a strip of neighbouring cells, with a lane for each
of their columns, and walks down it row by row. It reads each row of corners once, for the cells
above and below, and sums the gradient of these corners in registers. Corners that two strips share
are added afterwards in a fixed order, so results are deterministic without atomics.

With more classes than BLOCK_C, reductions read them chunk by chunk, and each chunk's gradient has
its own program. The letters are those of potentials.py.
"""

# Triton publishes no type hints, and its kernels have none.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
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
    LINEAR,
    POWER,
    SHANNON,
    SQUARE,
    CrossEntropy,
    Linear,
    Potential,
    Tsallis,
)

# The first version whose kernels take constants with fields.
TRITON = (3, 4)
MAX_CLASSES = 256
# Elements of a warp's tile. With 19 classes, padded to 32, a thread holds 40 in registers.
WARP_TILE = 2048
# With fewer neighbouring pixels, a lane loads less than 16 bytes of half-precision logits.
MIN_PIXELS, MAX_PIXELS = 64, 1024
# Of channels-last logits, whose lanes lie along classes, every lane holds all pixels of a tile.
ACROSS = 4
# Registers of a thread at full resolution: 16 warps keep a multiprocessor's memory busy.
REGISTERS = 128
# Columns of a strip, and classes of a lane, which holds two rows of corners and their gradients.
LANES, LANE_CLASSES = 32, 32
# More programs would need more memory for shared corners, fewer would leave a GPU idle.
PROGRAMS = 4096
# Pixels that a program counts, and elements that a program adds.
COUNTED, ADDED = 2048, 1024
LOG2E = tl.constexpr(math.log2(math.e))
MAX_BINS = 512
# Plans of launches that are kept: images may vary in size.
MAX_LAUNCHES = 1024


def kernel(function: Any) -> Any:
    """A kernel that is not recompiled for other values of its arguments.

    Triton would specialise integers that are 1 or divisible by 16. KernelConfig holds what a kernel
    must know of strides instead.
    """
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    varying = [name for name in names if not name.endswith("_ptr") and not name.isupper()]
    return triton.jit(do_not_specialize=varying)(function)


# Potentials ---------------------------------------------------------------------------------------


@triton.jit
def _softmax(z, HOISTED: tl.constexpr, CONFIG: tl.constexpr):
    """m and Z of p = exp(z - m) / Z."""
    BLOCK_M: tl.constexpr = CONFIG.block_m
    m = tl.full([1, BLOCK_M], -float("inf"), CONFIG.dtype)
    Z = tl.zeros([1, BLOCK_M], CONFIG.dtype)
    for start in range(0, CONFIG.classes, CONFIG.block_c):
        x = _logits(z, start, HOISTED, CONFIG)
        m = tl.maximum(m, tl.max(x, 0, keep_dims=True))
    for start in range(0, CONFIG.classes, CONFIG.block_c):
        e = _exp2((_logits(z, start, HOISTED, CONFIG) - m) * LOG2E, CONFIG)
        Z += tl.sum(tl.where(_classes(start, CONFIG) < CONFIG.classes, e, 0.0), 0, keep_dims=True)
    return m, Z


@triton.jit
def _total(z, m, Z, y, G, G_ptr, CONFIG: tl.constexpr):
    """The sum of t over the classes of every pixel."""
    BLOCK_M: tl.constexpr = CONFIG.block_m
    total = tl.zeros([1, BLOCK_M], CONFIG.dtype)
    for start in range(0, CONFIG.classes, CONFIG.block_c):
        _, t = _p_and_t(z, start, m, Z, y, G, G_ptr, CONFIG)
        total += tl.sum(t, 0, keep_dims=True)
    return total


@triton.jit
def _p_and_t(z, start, m, Z, y, G, G_ptr, CONFIG: tl.constexpr):
    """p and t of the classes from `start`; the potential is a constant minus scale times sum t.

    Cross entropy: t = [c = y] log p. Linear: t = -G p. Else t of `Tsallis.terms` over the scale.
    """
    c = _classes(start, CONFIG)
    x = _logits(z, start, True, CONFIG) - m
    p = _exp2(x * LOG2E, CONFIG) * (1 / Z)
    log_Z = tl.log(Z)
    if CONFIG.kind == CONFIG.CROSS_ENTROPY:
        t = tl.where(c == y, x - log_Z, 0.0)
    elif CONFIG.kind == CONFIG.LINEAR:
        if CONFIG.classes > CONFIG.block_c:
            G = _coefficients(G_ptr, start, CONFIG)
        t = -G * p
    elif CONFIG.kind == CONFIG.SQUARE:
        t = p * p
    elif CONFIG.kind == CONFIG.SHANNON:
        t = p * tl.maximum(x - log_Z, CONFIG.log_tiny)
    else:
        t = _exp2(x * (CONFIG.q * LOG2E) - log_Z * (CONFIG.q * LOG2E), CONFIG)
        if CONFIG.kind != CONFIG.POWER:
            # p^q - p, as a series where the difference would lose digits.
            u = x * (CONFIG.q - 1) - log_Z * (CONFIG.q - 1)
            t = tl.where(tl.abs(u) < CONFIG.series_below, p * _expm1(u, CONFIG), t - p)
    # With constants for the padding, the compiler computes nothing for it.
    return tl.where(c < CONFIG.classes, p, 0.0), tl.where(c < CONFIG.classes, t, 0.0)


@triton.jit
def _exp2(x, CONFIG: tl.constexpr):
    if CONFIG.flushes:
        # `tl.exp2` spends most of its instructions on denormal results.
        e = tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        e = tl.exp2(x)
    return e


@triton.jit
def _expm1(u, CONFIG: tl.constexpr):
    """exp(u) - 1 of a small u, as a series."""
    series = u * CONFIG.series[0] + CONFIG.series[1]
    for k in tl.static_range(2, len(CONFIG.series)):
        series = series * u + CONFIG.series[k]
    return series * u


@triton.jit
def _coefficients(G_ptr, start, CONFIG: tl.constexpr):
    """G of the classes from `start`, expanded over pixels to avoid a layout conversion."""
    BLOCK_M: tl.constexpr = CONFIG.block_m
    c = _classes(start, CONFIG) + tl.zeros([1, BLOCK_M], tl.int32)
    return tl.load(G_ptr + c, mask=c < CONFIG.classes, other=0)


@triton.jit
def _value(total, CONFIG: tl.constexpr):
    return CONFIG.constant - CONFIG.scale * total


@triton.jit
def _gradient(z, start, m, Z, total, w, y, counted, G, G_ptr, CONFIG: tl.constexpr):
    """The weighted gradient with respect to the logits of the classes from `start`."""
    p, t = _p_and_t(z, start, m, Z, y, G, G_ptr, CONFIG)
    if CONFIG.kind == CONFIG.CROSS_ENTROPY:
        gradient = (p - tl.where(_classes(start, CONFIG) == y, 1.0, 0.0)) * w
    else:
        gradient = (p * total - t) * (w * (CONFIG.q * CONFIG.scale))
    if CONFIG.masked:
        gradient = tl.where(counted, gradient, 0.0)
    return gradient


@triton.jit
def _mapped(pixel, inside, n, weights_ptr, y_ptr, valid_ptr, length, CONFIG: tl.constexpr):
    """The class and the weight of pixels, and which of them count."""
    BLOCK_M: tl.constexpr = CONFIG.block_m
    counted = inside
    if valid_ptr is not None:
        counted &= tl.load(valid_ptr + n * length + pixel, mask=inside, other=0) != 0
    y = tl.zeros([1, BLOCK_M], tl.int32)
    if y_ptr is not None:
        y = tl.load(y_ptr + n * length + pixel, mask=inside, other=-1).to(tl.int32)
        counted &= y >= 0
    if CONFIG.by_class:
        known = counted & (y < CONFIG.classes)
        w = tl.load(weights_ptr + n * CONFIG.classes + y, mask=known, other=0)
    elif CONFIG.kind == CONFIG.LINEAR:
        w = tl.full([1, 1], 1, CONFIG.dtype)
    else:
        w = tl.load(weights_ptr + n)
    # NaN makes an undefined class visible.
    w = tl.where(y == CONFIG.classes, float("nan"), w)
    return y, tl.where(counted, w, 0.0), counted


# Read ---------------------------------------------------------------------------------------------


@triton.jit
def _first_class(CONFIG: tl.constexpr):
    """The first class of this program's chunk, known to the compiler if there is only one."""
    if CONFIG.classes <= CONFIG.block_c:
        start = 0
    else:
        start = tl.program_id(1) * CONFIG.block_c
    return start


@triton.jit
def _classes(start, CONFIG: tl.constexpr):
    return start + tl.arange(0, CONFIG.block_c)[:, None]


@triton.jit
def _logits(z, start, HOISTED: tl.constexpr, CONFIG: tl.constexpr):
    """Logits [BLOCK_C, BLOCK_M] of the classes from `start`, -inf beyond the last.

    HOISTED: upsampled logits have their interpolated corners above and below already loaded.
    """
    c = _classes(start, CONFIG)
    if not CONFIG.upsampled:
        head, n, pixel, inside, shape = z
        at = _pointers(head, n, c, pixel, shape, CONFIG)
        # A binary problem has one channel, and its second logit is 0.
        x = tl.load(at, mask=inside & (c < CONFIG.channels), other=0).to(CONFIG.dtype)
    elif HOISTED and CONFIG.classes <= CONFIG.block_c:
        head, row, column, inside, upper, lower, down = z
        x = upper * (1 - down) + lower * down
    else:
        head, row, column, inside, upper, lower, down = z
        x = _upsampled(head, c, row, column, inside, CONFIG)
    return tl.where(c < CONFIG.classes, x, -float("inf"))


@triton.jit
def _pixels(tile, CONFIG: tl.constexpr):
    first = (tl.zeros([1, 1], CONFIG.index) + tile) * CONFIG.block_m
    return first + tl.arange(0, CONFIG.block_m)[None, :]


@triton.jit
def _pointers(head, n, c, pixel, shape, CONFIG: tl.constexpr):
    """Pointers to classes c of pixels of image n.

    Strides of images and classes are in units of CONFIG.unit elements, which show the compiler that
    it may read vectors.
    """
    ptr, images, classes, depths, rows, columns = head
    ptr += n * images * CONFIG.unit
    if CONFIG.pixels_adjoin:
        ptr += pixel
    elif CONFIG.flat:
        ptr += pixel * columns
    else:
        line = pixel // shape[1]
        ptr += line // shape[0] * depths + line % shape[0] * rows + pixel % shape[1] * columns
    return ptr + (c if CONFIG.classes_adjoin else c * classes.to(CONFIG.index) * CONFIG.unit)


# An axis is (scale, offset, denominator, source, size), as `layout.axis` gives it: pixel k lies at
# source position (k * scale + offset) / denominator. Integers give its floor and remainder exactly.
# Cell i lies between corners i and i + 1. Cells -1 and source - 1 have one corner, of weight 1.


@triton.jit
def _first(i, axis, CONFIG: tl.constexpr):
    """The first pixel of cell i, or of one behind it."""
    scale, offset, denominator, source, size = axis
    return tl.maximum(
        tl.minimum((i * denominator.to(CONFIG.index) - offset + scale - 1) // scale, size), 0
    )


@triton.jit
def _lerp_weight(k, i, axis, CONFIG: tl.constexpr):
    """The weight of corner i + 1 in pixel k of cell i."""
    scale, offset, denominator, source, size = axis
    rest = k * scale.to(CONFIG.index) + offset - i * denominator.to(CONFIG.index)
    weight = rest.to(CONFIG.dtype) / denominator.to(CONFIG.dtype)
    return tl.where(i < 0, 1.0, tl.where(i < source - 1, weight, 0.0))


@triton.jit
def _corner(head, c, i, j, mask, CONFIG: tl.constexpr):
    """Logits of low resolution, 0 where there is no corner."""
    ptr, classes, rows, row_axis, column_axis = head
    mask &= (i >= 0) & (i < row_axis[3]) & (j >= 0) & (j < column_axis[3])
    offset = j + i * rows.to(CONFIG.index) + c * classes.to(CONFIG.index)
    x = tl.load(ptr + offset, mask=mask & (c < CONFIG.channels), other=0).to(CONFIG.dtype)
    # This is `clamp_min`, which keeps NaN.
    return tl.where(x < CONFIG.lowest, CONFIG.lowest, x)


@triton.jit
def _edge(head, start, i, j, across, inside, CONFIG: tl.constexpr):
    """The corners of row i, interpolated at the columns of a strip."""
    c = _classes(start, CONFIG)
    left = _corner(head, c, i, j, inside, CONFIG)
    right = _corner(head, c, i, j + 1, inside, CONFIG)
    return left * (1 - across) + right * across


@triton.jit
def _upsampled(head, c, row, column, inside, CONFIG: tl.constexpr):
    """Logits at any row and columns, loading all their corners."""
    ptr, classes, rows, row_axis, column_axis = head
    i, j = _cell(row, row_axis, CONFIG), _cell(column, column_axis, CONFIG)
    down = _lerp_weight(row, i, row_axis, CONFIG)
    across = _lerp_weight(column, j, column_axis, CONFIG)
    upper = _corner(head, c, i, j, inside, CONFIG) * (1 - across)
    upper += _corner(head, c, i, j + 1, inside, CONFIG) * across
    lower = _corner(head, c, i + 1, j, inside, CONFIG) * (1 - across)
    lower += _corner(head, c, i + 1, j + 1, inside, CONFIG) * across
    return upper * (1 - down) + lower * down


@triton.jit
def _cell(k, axis, CONFIG: tl.constexpr):
    """The cell of pixel k."""
    scale, offset, denominator, source, size = axis
    position = k * scale.to(CONFIG.index) + offset
    return tl.where(position < 0, -1, tl.minimum(position // denominator, source - 1))


# Full resolution ----------------------------------------------------------------------------------


@kernel
def _weighted_sum(
    z_ptr, z_n, z_c, z_depth, z_row, z_column,
    grad_ptr, grad_n, grad_c, grad_depth, grad_row, grad_column,
    weights_ptr, y_ptr, valid_ptr, sums_ptr,
    length, height, width, tiles,
    CONFIG: tl.constexpr,
):  # fmt: skip
    """The weighted potentials of a tile, and the gradient of the logits of one chunk of classes."""
    program = tl.program_id(0)
    n, tile = (program // tiles).to(tl.int64), program % tiles
    length *= CONFIG.unit
    pixel = _pixels(tile, CONFIG)
    inside = pixel < length
    shape = height, width
    z = (z_ptr, z_n, z_c, z_depth, z_row, z_column), n, pixel, inside, shape
    y, w, counted = _mapped(pixel, inside, n, weights_ptr, y_ptr, valid_ptr, length, CONFIG)
    G_ptr = weights_ptr + n * CONFIG.classes
    G = _coefficients(G_ptr, 0, CONFIG) if CONFIG.kind == CONFIG.LINEAR else w
    m, Z = _softmax(z, True, CONFIG)
    total = _total(z, m, Z, y, G, G_ptr, CONFIG)
    start = _first_class(CONFIG)
    if grad_ptr is not None:
        gradient = _gradient(z, start, m, Z, total, w, y, counted, G, G_ptr, CONFIG)
        head = grad_ptr, grad_n, grad_c, grad_depth, grad_row, grad_column
        c = _classes(start, CONFIG)
        at = _pointers(head, n, c, pixel, shape, CONFIG)
        tl.store(at, gradient, mask=inside & (c < CONFIG.channels))
    if start == 0:
        value = tl.where(counted, w * _value(total, CONFIG), 0.0)
        tl.store(sums_ptr + program, tl.sum(value))


@kernel
def _class_sums(
    z_ptr, z_n, z_c, z_depth, z_row, z_column,
    valid_ptr, sums_ptr,
    length, height, width, tiles, parts,
    CONFIG: tl.constexpr,
):  # fmt: skip
    """The sums of p over every `parts`-th tile of an image, for one chunk of classes."""
    C: tl.constexpr = CONFIG.block_c
    M: tl.constexpr = CONFIG.block_m
    program = tl.program_id(0)
    n, part = (program // parts).to(tl.int64), program % parts
    start = _first_class(CONFIG)
    length *= CONFIG.unit
    sums = tl.zeros([C, M], CONFIG.dtype)
    for tile in range(part, tiles, parts):
        pixel = _pixels(tile, CONFIG)
        inside = pixel < length
        z = (z_ptr, z_n, z_c, z_depth, z_row, z_column), n, pixel, inside, (height, width)
        counted = inside
        if valid_ptr is not None:
            counted &= tl.load(valid_ptr + n * length + pixel, mask=inside, other=0) != 0
        m, Z = _softmax(z, True, CONFIG)
        p, _ = _p_and_t(z, start, m, Z, 0, 0, None, CONFIG)
        sums += tl.where(counted, p, 0.0)
    c = _classes(start, CONFIG)
    at = sums_ptr + program.to(tl.int64) * CONFIG.classes + c
    tl.store(at, tl.sum(sums, 1, keep_dims=True), mask=c < CONFIG.classes)


@kernel
def _classify(
    z_ptr, z_n, z_c, z_depth, z_row, z_column,
    guide_ptr, guide_n, guide_c, guide_depth, guide_row, guide_column,
    valid_ptr, y_ptr, threshold: tl.float64,
    length, height, width, tiles,
    CONFIG: tl.constexpr,
):  # fmt: skip
    """`plain.classify` of a tile without labels."""
    program = tl.program_id(0)
    n, tile = (program // tiles).to(tl.int64), program % tiles
    length *= CONFIG.unit
    pixel = _pixels(tile, CONFIG)
    inside = pixel < length
    shape = height, width
    z = (z_ptr, z_n, z_c, z_depth, z_row, z_column), n, pixel, inside, shape
    guide = z
    if guide_ptr is not None:
        head = guide_ptr, guide_n, guide_c, guide_depth, guide_row, guide_column
        guide = head, n, pixel, inside, shape
    y = _class(z, guide, guide_ptr is not None, threshold, CONFIG)
    _store_class(y, pixel, inside, n, valid_ptr, y_ptr, length)


@triton.jit
def _class(z, guide, GUIDED: tl.constexpr, threshold, CONFIG: tl.constexpr):
    """The class of every pixel of a tile."""
    BLOCK_M: tl.constexpr = CONFIG.block_m
    if CONFIG.thresholded:
        m, Z = _softmax(z, True, CONFIG)
        limit = tl.full([1, BLOCK_M], threshold, CONFIG.dtype)
        # The largest probability is exp(0) / Z.
        sure = 1 / Z > limit
        if GUIDED:
            guide_m, guide_Z = _softmax(guide, CONFIG.alike, CONFIG)
            sure |= 1 / guide_Z > limit
    y = tl.zeros([1, BLOCK_M], tl.int32)
    best = tl.full([1, BLOCK_M], -float("inf"), CONFIG.dtype)
    nan = tl.zeros([1, BLOCK_M], tl.int32)
    for start in range(0, CONFIG.classes, CONFIG.block_c):
        c = _classes(start, CONFIG)
        score = _logits(z, start, True, CONFIG)
        if CONFIG.thresholded:
            score = _exp2((score - m) * LOG2E, CONFIG) * (1 / Z)
            if GUIDED:
                x = _logits(guide, start, CONFIG.alike, CONFIG) - guide_m
                score += _exp2(x * LOG2E, CONFIG) * (1 / guide_Z)
        real = c < CONFIG.classes
        nan = tl.maximum(nan, tl.max(((score != score) & real).to(tl.int32), 0, keep_dims=True))
        score = tl.where((score == score) & real, score, -float("inf"))
        largest = tl.max(score, 0, keep_dims=True)
        at = tl.min(tl.where((score == largest) & real, c, CONFIG.classes), 0, keep_dims=True)
        # The first of equal classes wins, so an earlier chunk does.
        y = tl.where(largest > best, at, y)
        best = tl.maximum(best, largest)
    if CONFIG.thresholded:
        y = tl.where(sure, y, -1)
    # Infinite logits have no defined probabilities either.
    return tl.where((nan > 0) | (best - best != 0), CONFIG.classes, y)


@triton.jit
def _store_class(y, pixel, inside, n, valid_ptr, y_ptr, length):
    if valid_ptr is not None:
        valid = tl.load(valid_ptr + n * length + pixel, mask=inside, other=0) != 0
        y = tl.where(valid, y, -1)
    tl.store(y_ptr + n * length + pixel, y, mask=inside)


@kernel
def _count(
    y_ptr, counts_ptr, length, parts, bins,
    BLOCK: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    """How many pixels in every `parts`-th block of an image have each of some classes."""
    program = tl.program_id(0)
    n, part = (program // parts).to(tl.int64), program % parts
    first = tl.program_id(1) * (BINS - 1)
    counts = tl.zeros([BINS], tl.int32)
    for block in range(part, (length + BLOCK - 1) // BLOCK, parts):
        pixel = (tl.zeros([1], tl.int64) + block) * BLOCK + tl.arange(0, BLOCK)
        y = tl.load(y_ptr + n * length + pixel, mask=pixel < length, other=-1).to(tl.int32) - first
        # The last bin counts all other pixels.
        counts += tl.histogram(tl.where((y < 0) | (y >= BINS - 1), BINS - 1, y), BINS)
    bin = tl.arange(0, BINS)
    at = counts_ptr + program.to(tl.int64) * bins + first + bin
    tl.store(at, counts, mask=(bin < BINS - 1) & (first + bin < bins))


# Upsampled ----------------------------------------------------------------------------------------


@triton.jit
def _strip(program, first_i, first_j, band, bands, strips, column_axis, CONFIG: tl.constexpr):
    """A program's image, band of cell rows, and cells, columns and weights of its lanes.

    Wide cells have several strips, each of one cell: CONFIG.parts.
    """
    SLOTS: tl.constexpr = CONFIG.slots
    CELLS: tl.constexpr = CONFIG.block_m // SLOTS
    n = (program // (strips * bands)).to(tl.int64)
    strip = program % strips
    lane = tl.arange(0, CONFIG.block_m)[None, :]
    first = first_j + strip // CONFIG.parts * CELLS
    # Neighbouring lanes read neighbouring corners: the compiler must see that classes are not the
    # contiguous dimension, or it spreads lanes over them.
    j = first + lane % CELLS
    column = _first(j, column_axis, CONFIG) + strip % CONFIG.parts * SLOTS + lane // CELLS
    inside = (column < _first(j + 1, column_axis, CONFIG)) & (j < column_axis[3])
    across = _lerp_weight(column, j, column_axis, CONFIG)
    return n, strip, program // strips % bands, first, j, column, inside, across


@kernel
def _weighted_sum_upsampled(
    z_ptr, z_n, z_c, z_row,
    weights_ptr, y_ptr, valid_ptr, sums_ptr,
    grad_ptr, right_ptr, below_ptr, grad_size, below_size,
    row_scale, row_offset, row_denominator, row_source, row_size,
    column_scale, column_offset, column_denominator, column_source, column_size,
    first_i, first_j, band, bands, strips,
    length, CONFIG: tl.constexpr,
):  # fmt: skip
    """The weighted potentials of a strip, and the gradient of its corners for a chunk of classes.

    A corner belongs to the strip and the band of cells on its right and below. A strip's part of
    the next strip's corners goes to `right`, and that of the next band's corners to `below`.
    """
    C: tl.constexpr = CONFIG.block_c
    M: tl.constexpr = CONFIG.block_m
    rows = row_scale, row_offset, row_denominator, row_source, row_size
    columns = column_scale, column_offset, column_denominator, column_source, column_size
    n, strip, b, first_cell, j, column, inside, across = _strip(
        tl.program_id(0), first_i, first_j, band, bands, strips, columns, CONFIG
    )
    start = _first_class(CONFIG)
    head = z_ptr + n * z_n, z_c, z_row, rows, columns
    G_ptr = weights_ptr + n * CONFIG.classes
    G = _coefficients(G_ptr, 0, CONFIG) if CONFIG.kind == CONFIG.LINEAR else across
    c = _classes(start, CONFIG)
    part = (strip % CONFIG.parts).to(tl.int64)
    first = first_i + b * band
    end = tl.minimum(first + band, row_source)
    sums = tl.zeros([1, M], CONFIG.dtype)
    g_upper = tl.zeros([C, M], CONFIG.dtype)
    upper = _edge(head, start, first, j, across, inside, CONFIG)
    for i in range(first, end):
        lower = _edge(head, start, i + 1, j, across, inside, CONFIG)
        g_lower = tl.zeros([C, M], CONFIG.dtype)
        for row in range(_first(i, rows, CONFIG), _first(i + 1, rows, CONFIG)):
            down = _lerp_weight(row, i, rows, CONFIG)
            pixel = row * column_size.to(CONFIG.index) + column
            z = head, row, column, inside, upper, lower, down
            y, w, counted = _mapped(pixel, inside, n, weights_ptr, y_ptr, valid_ptr, length, CONFIG)
            m, Z = _softmax(z, True, CONFIG)
            total = _total(z, m, Z, y, G, G_ptr, CONFIG)
            sums += tl.where(counted, w * _value(total, CONFIG), 0.0)
            if grad_ptr is not None:
                g = _gradient(z, start, m, Z, total, w, y, counted, G, G_ptr, CONFIG)
                g_upper += g * (1 - down)
                g_lower += g * down
        if grad_ptr is not None:
            line = (n * CONFIG.channels + c) * row_source + i
            at = grad_ptr + part * grad_size + line * column_source
            beside = right_ptr + line * strips + strip
            real = (c < CONFIG.channels) & (i >= 0)
            _store_corners(g_upper, across, at, beside, real, first_cell, column_source, CONFIG)
            g_upper = g_lower
        upper = lower
    if start == 0:
        tl.store(sums_ptr + tl.program_id(0), tl.sum(sums))
    if grad_ptr is not None:
        line = (n * CONFIG.channels + c) * bands + b
        at = below_ptr + part * below_size + line * (column_source + strips)
        beside = below_ptr + line * (column_source + strips) + column_source + strip
        real = c < CONFIG.channels
        _store_corners(g_upper, across, at, beside, real, first_cell, column_source, CONFIG)


@triton.jit
def _store_corners(g, across, at, beside, real, first_cell, columns, CONFIG: tl.constexpr):
    """Sum the gradient over the columns of every cell, for the corners left and right of it."""
    C: tl.constexpr = CONFIG.block_c
    SLOTS: tl.constexpr = CONFIG.slots
    CELLS: tl.constexpr = CONFIG.block_m // SLOTS
    left = tl.sum(tl.reshape(g * (1 - across), [C, SLOTS, CELLS]), 1)
    right = tl.sum(tl.reshape(g * across, [C, SLOTS, CELLS]), 1)
    cell = tl.arange(0, CELLS)[None, :]
    # The left corner of a cell is the right corner of the previous one; the last right one wraps.
    before = tl.zeros([C, CELLS], tl.int32) + (cell + CELLS - 1) % CELLS
    right = tl.gather(right, before, 1)
    j = first_cell + cell
    tl.store(at + j, left + tl.where(cell > 0, right, 0.0), mask=real & (j >= 0) & (j < columns))
    tl.store(beside + 0 * cell, right, mask=real & (cell == 0))


@kernel
def _combine(
    z_ptr, z_n, z_c, z_row,
    partial_ptr, sums_ptr, own_ptr, right_ptr, below_ptr, grad_ptr, grad_size, below_size,
    images, rows, columns, first_i, first_j, band, bands, strips,
    BLOCK: tl.constexpr, CONFIG: tl.constexpr,
):  # fmt: skip
    """Add the partial sums of an image, or the partial gradients of some corners of one class."""
    program = tl.program_id(0)
    if program < images:
        programs = bands * strips
        partial_at = partial_ptr + program.to(tl.int64) * programs
        sums = tl.zeros([BLOCK], CONFIG.dtype)
        for start in range(0, programs, BLOCK):
            partial = start + tl.arange(0, BLOCK)
            sums += tl.load(partial_at + partial, mask=partial < programs, other=0)
        tl.store(sums_ptr + program, tl.sum(sums, 0))
    else:
        blocks = (rows.to(CONFIG.index) * columns + BLOCK - 1) // BLOCK
        map = ((program - images) // blocks).to(tl.int64)
        k = (program - images) % blocks * BLOCK + tl.arange(0, BLOCK)
        inside = k < rows.to(CONFIG.index) * columns
        i, j = k // columns, k % columns
        # The strip and the band of cells that own the corner, and whether it is their first one.
        CELLS: tl.constexpr = CONFIG.block_m // CONFIG.slots
        strip, b = (j - first_j) // CELLS, (i - first_i) // band
        owed = inside & ((j - first_j) % CELLS == 0) & (strip > 0)
        below = inside & ((i - first_i) % band == 0) & (b > 0)
        own_at = own_ptr + map * rows * columns + k
        right_at = right_ptr + (map * rows + i) * strips
        below_at = below_ptr + (map * bands + b - 1) * (columns + strips)
        grad = tl.zeros([BLOCK], CONFIG.dtype)
        for part in range(CONFIG.parts):
            before = (strip - 1) * CONFIG.parts + part
            own = part * grad_size.to(tl.int64)
            grad += tl.load(own_at + own, mask=inside, other=0)
            grad += tl.load(right_at + before, mask=owed, other=0)
            grad += tl.load(below_at + part * below_size.to(tl.int64) + j, mask=below, other=0)
            grad += tl.load(below_at + columns + before, mask=owed & below, other=0)
        z_at = z_ptr + map // CONFIG.channels * z_n + map % CONFIG.channels * z_c
        z_at += i * z_row.to(CONFIG.index) + j
        x = tl.load(z_at, mask=inside, other=0).to(CONFIG.dtype)
        # The gradient of clamped logits is 0.
        grad_at = grad_ptr + map * rows * columns + k
        tl.store(grad_at, tl.where(x < CONFIG.lowest, 0.0, grad), mask=inside)


@kernel
def _class_sums_upsampled(
    z_ptr, z_n, z_c, z_row, valid_ptr, sums_ptr,
    row_scale, row_offset, row_denominator, row_source, row_size,
    column_scale, column_offset, column_denominator, column_source, column_size,
    first_i, first_j, band, bands, strips,
    length, CONFIG: tl.constexpr,
):  # fmt: skip
    """The sums of p over a strip, for one chunk of classes."""
    C: tl.constexpr = CONFIG.block_c
    M: tl.constexpr = CONFIG.block_m
    rows = row_scale, row_offset, row_denominator, row_source, row_size
    columns = column_scale, column_offset, column_denominator, column_source, column_size
    n, strip, b, first_cell, j, column, inside, across = _strip(
        tl.program_id(0), first_i, first_j, band, bands, strips, columns, CONFIG
    )
    start = _first_class(CONFIG)
    head = z_ptr + n * z_n, z_c, z_row, rows, columns
    first = first_i + b * band
    sums = tl.zeros([C, M], CONFIG.dtype)
    upper = _edge(head, start, first, j, across, inside, CONFIG)
    for i in range(first, tl.minimum(first + band, row_source)):
        lower = _edge(head, start, i + 1, j, across, inside, CONFIG)
        for row in range(_first(i, rows, CONFIG), _first(i + 1, rows, CONFIG)):
            down = _lerp_weight(row, i, rows, CONFIG)
            z = head, row, column, inside, upper, lower, down
            counted = inside
            if valid_ptr is not None:
                pixel = row * column_size.to(CONFIG.index) + column
                valid = tl.load(valid_ptr + n * length + pixel, mask=inside, other=0)
                counted &= valid != 0
            m, Z = _softmax(z, True, CONFIG)
            p, _ = _p_and_t(z, start, m, Z, 0, 0, None, CONFIG)
            sums += tl.where(counted, p, 0.0)
        upper = lower
    c = _classes(start, CONFIG)
    at = sums_ptr + tl.program_id(0).to(tl.int64) * CONFIG.classes + c
    tl.store(at, tl.sum(sums, 1, keep_dims=True), mask=c < CONFIG.classes)


@kernel
def _classify_upsampled(
    z_ptr, z_n, z_c, z_row,
    guide_ptr, guide_n, guide_c, guide_row,
    valid_ptr, y_ptr, threshold: tl.float64,
    row_scale, row_offset, row_denominator, row_source, row_size,
    column_scale, column_offset, column_denominator, column_source, column_size,
    first_i, first_j, band, bands, strips,
    guide_row_scale, guide_row_offset, guide_row_denominator, guide_row_source, guide_row_size,
    guide_column_scale, guide_column_offset, guide_column_denominator, guide_column_source,
    guide_column_size, length, CONFIG: tl.constexpr,
):  # fmt: skip
    """`plain.classify` of a strip without labels; a guide may have another resolution."""
    rows = row_scale, row_offset, row_denominator, row_source, row_size
    columns = column_scale, column_offset, column_denominator, column_source, column_size
    n, _, b, _, j, column, inside, across = _strip(
        tl.program_id(0), first_i, first_j, band, bands, strips, columns, CONFIG
    )
    head = z_ptr + n * z_n, z_c, z_row, rows, columns
    first = first_i + b * band
    upper = _edge(head, 0, first, j, across, inside, CONFIG)
    guide_head, guide_upper, guide_lower = head, upper, upper
    if guide_ptr is not None:
        guide_head = (
            guide_ptr + n * guide_n, guide_c, guide_row,
            (guide_row_scale, guide_row_offset, guide_row_denominator, guide_row_source,
             guide_row_size),
            (guide_column_scale, guide_column_offset, guide_column_denominator,
             guide_column_source, guide_column_size),
        )  # fmt: skip
        if CONFIG.alike:
            guide_upper = _edge(guide_head, 0, first, j, across, inside, CONFIG)
    for i in range(first, tl.minimum(first + band, row_source)):
        lower = _edge(head, 0, i + 1, j, across, inside, CONFIG)
        if guide_ptr is not None and CONFIG.alike:
            guide_lower = _edge(guide_head, 0, i + 1, j, across, inside, CONFIG)
        for row in range(_first(i, rows, CONFIG), _first(i + 1, rows, CONFIG)):
            down = _lerp_weight(row, i, rows, CONFIG)
            pixel = row * column_size.to(CONFIG.index) + column
            z = head, row, column, inside, upper, lower, down
            guide = guide_head, row, column, inside, guide_upper, guide_lower, down
            y = _class(z, guide, guide_ptr is not None, threshold, CONFIG)
            _store_class(y, pixel, inside, n, valid_ptr, y_ptr, length)
        upper, guide_upper = lower, guide_lower


# Launch -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class KernelConfig:
    """The constants for which a kernel is compiled."""

    classes: int
    channels: int
    block_c: int
    block_m: int
    dtype: tl.dtype
    index: tl.dtype
    upsampled: bool
    # At full resolution: one stride covers all pixels, it is 1, the stride of classes is 1.
    flat: bool = False
    pixels_adjoin: bool = False
    classes_adjoin: bool = False
    unit: int = 1
    # Upsampled: columns of a cell in a strip, strips of a cell.
    slots: int = 1
    parts: int = 1
    # Classify.
    thresholded: bool = False
    alike: bool = True
    # Weighted sum.
    kind: int = CROSS_ENTROPY
    q: float = 1
    scale: float = 1
    constant: float = 0
    by_class: bool = False
    masked: bool = False
    log_tiny: float = 0
    series: tuple[float, ...] = ()
    series_below: float = 0
    flushes: bool = False
    lowest: float = LOWEST_LOGIT
    SQUARE: int = SQUARE
    SHANNON: int = SHANNON
    POWER: int = POWER
    CROSS_ENTROPY: int = CROSS_ENTROPY
    LINEAR: int = LINEAR


class Launch:
    """The division of a call's pixels into programs, and the arguments of its kernels."""

    def __init__(
        self, z: Tensor, spec: LogitsSpec, others: Sequence[Tensor], **options: Any
    ) -> None:
        """others: logits at the same pixels."""
        dtype = accumulation_dtype(z.dtype)
        classes, spatial = spec.classes(z), spec.spatial(z)
        self.images, self.length = len(z), math.prod(spatial)
        block_c = min(_power_of_2(classes), MAX_CLASSES)
        self.chunks = _ceil_div(classes, block_c)
        wide = dtype.itemsize // 4
        if spec.size is None:
            flat = all(flat_stride(head) is not None for head in (z, *others))
            steps = [strides(head, flat) for head in (z, *others)]
            options["flat"] = flat
            options["pixels_adjoin"] = flat and all(step[4] == 1 for step in steps)
            options["classes_adjoin"] = all(step[1] == 1 for step in steps)
            block_m = min(max(WARP_TILE // wide // block_c, MIN_PIXELS), MAX_PIXELS)
            if options["classes_adjoin"] and not options["pixels_adjoin"]:
                block_m //= ACROSS
            self.programs = _ceil_div(self.length, block_m)
            warps = max(1, block_c * block_m * wide // WARP_TILE)
            # A vector has at most 16 bytes: 8 elements of half precision.
            vector = 8 if options["pixels_adjoin"] else 1
            unit = math.gcd(vector, self.length, *(s for step in steps for s in step[:2]))
            options["unit"] = unit
            self.strides = [(step[0] // unit, step[1] // unit, *step[2:]) for step in steps]
            shape = (1, 1, *spatial)[-2:]
            self.geometry: tuple[int, ...] = (self.length // unit, *shape, self.programs)
            reach = [self.length]
        else:
            # With aligned corners, a single row would lie at every pixel.
            axes = [
                [
                    axis(source, pixels, spec.align_corners and source > 1)
                    for source, pixels in zip(head.shape[2:], spec.size, strict=True)
                ]
                for head in (z, *others)
            ]
            rows, columns = axes[0]
            widest = _ceil_div(columns[2], columns[0])
            # With one cell, a strip's lanes would have no neighbouring corners (`_strip`).
            slots = min(_power_of_2(widest), LANES // 2)
            parts = _ceil_div(widest, slots)
            # Pixels before the first corner have their own cell.
            first_i, first_j = (-1 if offset < 0 else 0 for _, offset, *_ in (rows, columns))
            cell_rows = rows[3] - first_i
            self.strips = _ceil_div(columns[3] - first_j, LANES // slots) * parts
            self.band = max(1, self.images * cell_rows * self.strips // PROGRAMS)
            self.bands = _ceil_div(cell_rows, self.band)
            self.programs = self.bands * self.strips
            block_m = LANES
            warps = max(1, block_c * wide // LANE_CLASSES)
            self.strides = [head.stride()[:3] for head in (z, *others)]
            self.cut = (first_i, first_j, self.band, self.bands, self.strips)
            self.geometry = (*rows, *columns, *self.cut)
            self.guide_axes = [n for ax in axes[-1] for n in ax]
            options |= {
                "slots": slots,
                "parts": parts,
                "alike": all(head.shape == z.shape for head in others),
            }
            reach = [
                self.length,
                *(2 * scale * size for scale, _, _, _, size in (*axes[0], *axes[-1])),
            ]
        for head in (z, *others):
            sizes = zip(head.shape[1:], head.stride()[1:], strict=True)
            reach.append(sum((size - 1) * stride for size, stride in sizes))
        self.options: dict[str, Any] = {"num_warps": warps, "num_stages": 1}
        entropy = options.get("kind") not in (None, CROSS_ENTROPY, LINEAR)
        if entropy and wide == 1 and options.get("pixels_adjoin"):
            self.options["maxnreg"] = REGISTERS
        self.config = KernelConfig(
            classes=classes,
            channels=z.shape[1],
            block_c=block_c,
            block_m=block_m,
            dtype=tl.float64 if dtype == torch.float64 else tl.float32,
            # Offsets within an image fit into 32 bits unless it is very large.
            index=tl.int32 if max(reach) < 2**30 else tl.int64,
            upsampled=spec.size is not None,
            # Below this limit the first omitted term is a rounding error; above it, so is what the
            # difference loses.
            series_below=1 / 2 if wide == 2 else 1 / 32,
            series=tuple(1 / math.factorial(k) for k in range(16 if wide == 2 else 3, 0, -1)),
            log_tiny=math.log(torch.finfo(dtype).tiny),
            flushes=wide == 1 and isinstance(_count, triton.runtime.JITFunction),
            **options,
        )

    def __call__(
        self,
        z: Tensor,
        kernel: Any,
        *arguments: Any,
        programs: int | None = None,
        chunks: int = 1,
    ) -> None:
        if self.images and self.length:
            grid = (self.images * (programs or self.programs), chunks)
            run(z, kernel, grid, *arguments, CONFIG=self.config, **self.options)


def planned(z: Tensor, spec: LogitsSpec, others: Sequence[Tensor] = (), **options: Any) -> Launch:
    """The launch of such logits: made once, because to plan it takes longer than to launch it."""
    key = (z.dtype, spec, *((t.shape, t.stride()) for t in (z, *others)), *options.items())
    launch = _LAUNCHES.get(key)
    if launch is None:
        if len(_LAUNCHES) >= MAX_LAUNCHES:
            _LAUNCHES.clear()
        launch = _LAUNCHES[key] = Launch(z, spec, others, **options)
    return launch


_LAUNCHES: dict[tuple[Any, ...], Launch] = {}


# Triton's own two functions take twenty microseconds a call.


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def _power_of_2(n: int) -> int:
    """The next power of 2."""
    return 1 << (n - 1).bit_length()


def run(z: Tensor, kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Launch a kernel on the device of z."""
    with torch.cuda.device_of(z):
        try:
            kernel[grid](*arguments, **options)
        except Exception as error:
            if z.is_cuda and torch.cuda.is_current_stream_capturing():
                raise RuntimeError(
                    "a CUDA graph cannot capture a loss whose kernels are not compiled yet: call "
                    "the loss once with such arguments before the capture"
                ) from error
            raise


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
        y = plain.labelled(labels, valid, classes, ignore_index).to(index_dtype(classes))
    else:
        heads = [_readable(head, spec) for head in (z, guide) if head is not None]
        launch = planned(heads[0], spec, heads[1:], thresholded=threshold is not None)
        y = z.new_empty((len(z), *spec.spatial(z)), dtype=index_dtype(classes))
        kernel, geometry = _classify, launch.geometry
        if spec.size is not None:
            kernel = _classify_upsampled
            geometry = (*geometry, *launch.guide_axes, launch.length)
        guide_head = (None if guide is None else heads[1], *launch.strides[-1])
        maps = (None if valid is None else valid.contiguous(), y, threshold or 0.0)
        launch(z, kernel, heads[0], *launch.strides[0], *guide_head, *maps, *geometry)
    length, bins = math.prod(y.shape[1:]), classes + 1
    parts = max(min(_ceil_div(length, COUNTED), PROGRAMS // max(len(y), 1)), 1)
    counts = y.new_empty((len(z), parts, bins), dtype=torch.int32)
    if len(y):
        block = min(_power_of_2(bins + 1), MAX_BINS)
        grid = (len(y) * parts, _ceil_div(bins, block - 1))
        run(z, _count, grid, y, counts, length, parts, bins, BLOCK=COUNTED, BINS=block)
    return y, counts.sum(1)


def _readable(z: Tensor, spec: LogitsSpec) -> Tensor:
    """Logits as the kernels read them: those of low resolution are small enough to be copied."""
    return z if spec.size is None else z.contiguous()


def weighted_sum(*arguments: Any) -> tuple[Tensor, Tensor | None]:
    """`plain.weighted_sum`."""
    parts, grad = weighted_parts(*arguments)
    return parts.sum(1), grad


def weighted_parts(
    z: Tensor,
    weights: Tensor,
    y: Tensor | None,
    valid: Tensor | None,
    potential: Potential,
    spec: LogitsSpec,
    needs_grad: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The sums of each image in parts (N, P): a caller who wants their total saves a launch."""
    options: dict[str, Any] = {"kind": potential.kind()}
    if isinstance(potential, Tsallis):
        options |= {"q": float(potential.q), "constant": potential.shift() + potential.offset}
        if potential.kind() not in (SQUARE, SHANNON):
            options["scale"] = 1 / (potential.q - 1)
    linear = isinstance(potential, Linear)
    options["by_class"] = weights.shape[1] > 1 and not linear
    options["masked"] = y is not None or valid is not None
    weights = weights.to(accumulation_dtype(z.dtype))
    maps = [None if t is None else t.contiguous() for t in (weights, y, valid)]
    if spec.size is not None:
        return _sum_upsampled(z.contiguous(), maps, spec, needs_grad, options)
    grad = torch.empty_like(z) if needs_grad else None
    launch = planned(z, spec, [] if grad is None else [grad], **options)
    sums = weights.new_empty((len(z), launch.programs))
    launch(
        z,
        _weighted_sum,
        *(z, *launch.strides[0], grad, *launch.strides[-1], *maps, sums, *launch.geometry),
        chunks=launch.chunks if needs_grad else 1,
    )
    return sums, grad


def _sum_upsampled(
    z: Tensor,
    maps: list[Tensor | None],
    spec: LogitsSpec,
    needs_grad: bool,
    options: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    launch = planned(z, spec, **options)
    dtype = accumulation_dtype(z.dtype)
    rows, columns, bands, strips = *z.shape[2:], launch.bands, launch.strips
    partial = z.new_empty((len(z), launch.programs), dtype=dtype)
    grad = None
    buffers: list[Tensor | None] = [None, None, None]
    sizes = (0, 0)
    if needs_grad:
        grad = z.new_empty(z.shape, dtype=dtype)
        parts = launch.config.parts
        own = grad if parts == 1 else z.new_empty((parts, *z.shape), dtype=dtype)
        right = z.new_empty((*z.shape[:2], rows, strips), dtype=dtype)
        below = z.new_empty((parts, *z.shape[:2], bands, columns + strips), dtype=dtype)
        buffers, sizes = [own, right, below], (z.numel(), below.numel() // parts)
    head = (z, *launch.strides[0])
    launch(
        z,
        _weighted_sum_upsampled,
        *(*head, *maps, partial, *buffers, *sizes, *launch.geometry, launch.length),
        chunks=launch.chunks if needs_grad else 1,
    )
    if grad is None or not len(z):
        return partial, grad
    sums = partial.new_empty((len(z), 1))
    blocks = _ceil_div(rows * columns, ADDED)
    arguments = (*head, partial, sums, *buffers, grad, *sizes, len(z), rows, columns)
    grid = (len(z) * (1 + z.shape[1] * blocks),)
    run(z, _combine, grid, *arguments, *launch.cut, BLOCK=ADDED, CONFIG=launch.config)
    return sums, grad


def class_sums(z: Tensor, valid: Tensor | None, spec: LogitsSpec) -> Tensor:
    """`plain.class_sums`."""
    z = _readable(z, spec)
    launch = planned(z, spec, masked=valid is not None)
    programs = launch.programs
    valid = None if valid is None else valid.contiguous()
    if spec.size is None:
        # Fewer, longer programs, because each stores the sums of all classes.
        programs = max(1, min(programs, PROGRAMS // max(len(z), 1)))
        kernel, arguments = _class_sums, (*launch.geometry, programs)
    else:
        kernel, arguments = _class_sums_upsampled, (*launch.geometry, launch.length)
    sums = z.new_empty((len(z), programs, spec.classes(z)), dtype=accumulation_dtype(z.dtype))
    head = (z, *launch.strides[0])
    launch(z, kernel, *head, valid, sums, *arguments, programs=programs, chunks=launch.chunks)
    return sums.sum(1)


def check(device: torch.device) -> None:
    """Raise unless the operators agree with the plain formula; the host waits for the GPU."""
    if tuple(map(int, triton.__version__.split(".")[:2])) < TRITON:
        raise RuntimeError(
            f"they need Triton 3.4 or later, not {triton.__version__} (update PyTorch to 2.8)"
        )
    target = triton.runtime.driver.active.get_current_target()
    if target.backend != "cuda":
        raise RuntimeError(f"no kernels for {target.backend}")
    options: Any = {"dtype": torch.float32, "device": device}
    z = torch.linspace(-2, 3, 2 * 5 * 3 * 4, **options).sin().mul(5).view(2, 5, 3, 4)
    # If it were flipped, classes c and 4 - c of a sure pixel would tie, and rounding would decide.
    guide = z.roll(1, 1)
    weights = torch.linspace(0.5, 1, 2 * 5, **options).view(2, 5)
    for size in (None, (7, 6)):
        spec = LogitsSpec(size, align_corners=True)
        found, expected = (
            _results(kernels, z, guide, weights, spec) for kernels in (sys.modules[__name__], plain)
        )
        for name, result in found.items():
            reference = expected[name].double()
            if not torch.allclose(result.double(), reference, rtol=1e-4, atol=1e-5):
                raise RuntimeError(
                    f"they disagree with the plain formula in the {name}"
                    f"{' of upsampled logits' if size else ''}"
                )


def _results(
    kernels: Any, z: Tensor, guide: Tensor, weights: Tensor, spec: LogitsSpec
) -> dict[str, Tensor]:
    """What every kernel computes, by name."""
    y, counts = kernels.classify(z, guide, None, None, spec, 0.5)
    found = {"classes": y, "counts": counts, "class sums": kernels.class_sums(z, None, spec)}
    for potential in (Tsallis(2, -1), CrossEntropy(), Linear()):
        y_of = None if isinstance(potential, Linear) else y
        sums, grad = kernels.weighted_sum(z, weights, y_of, None, potential, spec, True)
        found |= {f"sums of {potential}": sums, f"gradient of {potential}": grad}
    return found
