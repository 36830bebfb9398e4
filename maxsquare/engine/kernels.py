"""The CUDA path: Triton kernels that never hold full-resolution tensors.

One program takes a tile of pixels with all their classes into registers: it reads every logit
once, and writes partial sums, indices, potentials or slopes, whichever are asked for. Without
upsampling a tile is a range of pixels. With it, a tile is a low-resolution cell, whose pixels
depend on the four logits at its corners only: they are upsampled in registers, and the slope
leaves as four contributions, one to each corner. Every program writes to places of its own,
which are then added in a fixed order: the results are deterministic, without atomics.

More classes than fit are taken in chunks: the reductions over the classes read them one after
the other, and each chunk's slope has a program of its own. A single chunk needs no loop: the
compiler then merges the repeated reads into one.
"""

# Triton publishes no type hints, and its kernels have none.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from maxsquare.engine.blocks import Swept, index_dtype, is_flat
from maxsquare.engine.pixelwise import LOWEST_LOGIT, Problem
from maxsquare.potentials import Tsallis

# Elements of a tile that one warp holds: 64 of a thread's 255 registers, for the logits and
# for what is being made of them, in float32; float64 gets twice the warps.
ELEMENTS_PER_WARP = 2048
# Of logits whose classes are neighbours a thread holds several pixels, and with each of them
# what a pixel has once.
ELEMENTS_PER_WARP_BY_PIXEL = 512
# With upsampling, 4 a thread: each comes with 4 logits and 4 slopes of the corners.
UPSAMPLED_PER_WARP = 128
# With fewer neighbouring pixels a read of half-precision logits wastes bandwidth; with more
# the values that every pixel has once, not for every class, would fill the registers.
MIN_PIXELS, MAX_PIXELS = 32, 256
# A row of a cell at stride 8; fewer classes leave room for more of its pixels.
MIN_CELL_PIXELS = 8
# More classes than these are taken in chunks: a tile of MIN_PIXELS still fits four warps.
MAX_CLASSES = 256
# Horner steps of expm1: for |u| < 1/2 the next term is below a rounding of float64.
EXPM1_TERMS = tl.constexpr(14)


@dataclass(frozen=True)
class Form:
    """What a kernel is compiled for.

    q, shift, constant, normalised: those of `Tsallis`; q is None for cross entropy.
    index_only: no potential.
    bins: of an image that are summed: those of its classes, or one.
    weighted_pixels: the weights are those of pixels, not of bins.
    flat: the spatial dimensions are one (if not upsampled).
    same_cells: the guide has the cells of z (if upsampled).
    block_c, block_m: classes and pixels of a tile.
    position: integers that hold a numerator of `_low`.
    """

    q: float | None
    index_only: bool
    shift: float
    constant: float
    normalised: bool
    threshold: float | None
    ignore_index: int
    binary: bool
    from_logits: bool
    by_class: bool
    bins: int
    predicts: bool
    weighted_pixels: bool
    upsampled: bool
    flat: bool
    same_cells: bool
    classes: int
    block_c: int
    block_m: int
    dtype: tl.dtype
    tiny: float
    position: tl.dtype


# Load ---------------------------------------------------------------------------------------------

# An axis is (scale, offset, unit, source, size). Pixel row k lies at the source row (scale k +
# offset) / unit: k (source - 1) / (size - 1) with aligned corners, (k + 1/2) source / size - 1/2
# without. Integers give its floor and the rest exactly; a float32 position would lose digits.


@triton.jit
def _first(i, axis):
    """The first pixel row of the cells of source row i: the least k at i or beyond."""
    scale, offset, unit, source, size = axis
    first = tl.minimum((i * unit - offset + scale - 1) // scale, size)
    return tl.where(i <= 0, 0, tl.where(i >= source, size, first))


@triton.jit
def _low(k, axis):
    """The source row of the cell in which pixel row k lies."""
    scale, offset, unit, source, size = axis
    return tl.minimum(tl.maximum(k * scale + offset, 0) // unit, source - 1)


@triton.jit
def _share(k, i, axis, form: tl.constexpr):
    """The share of source row i + 1 in pixel row k; the last row has none beside it."""
    scale, offset, unit, source, size = axis
    share = tl.maximum(k * scale + offset - i * unit, 0).to(form.dtype) / unit
    return tl.where(i < source - 1, share, 0.0)


@triton.jit
def _corners(n, i, j, row, column, rows, columns, strides, form: tl.constexpr):
    """Place of pixels in cells (i, j): offsets of the corners, shares of the lower and right."""
    top, left = n * strides[0] + i.to(tl.int64) * strides[3], j.to(tl.int64) * strides[4]
    bottom = top + tl.where(i < rows[3] - 1, strides[3], 0)
    right = left + tl.where(j < columns[3] - 1, strides[4], 0)
    # As many offsets as pixels, even if equal: the tile gets the layout of its loads.
    left += tl.zeros([1, form.block_m], tl.int64)
    right += tl.zeros([1, form.block_m], tl.int64)
    down, across = _share(row, i, rows, form), _share(column, j, columns, form)
    return top + left, top + right, bottom + left, bottom + right, down, across


@triton.jit
def _offset(n, k, height, width, strides, form: tl.constexpr):
    """Offset of pixels k of image n."""
    if form.flat:
        offset = n * strides[0] + k * strides[4]
    else:
        plane = k // width // height * strides[2]
        offset = n * strides[0] + plane + k // width % height * strides[3] + k % width * strides[4]
    return offset


@triton.jit
def _read(head, c, seen, form: tl.constexpr):
    """Logits (or probabilities) of the classes c (BLOCK_C, 1) of a head; 0 if not seen."""
    ptr, strides, place = head
    real = c < form.classes
    ptr += c.to(tl.int64) * strides[1]
    if form.upsampled:
        top_left, top_right, bottom_left, bottom_right, down, across = place
        top = tl.load(ptr + top_left, mask=real, other=0).to(form.dtype) * (1 - across)
        top += tl.load(ptr + top_right, mask=real, other=0).to(form.dtype) * across
        bottom = tl.load(ptr + bottom_left, mask=real, other=0).to(form.dtype) * (1 - across)
        bottom += tl.load(ptr + bottom_right, mask=real, other=0).to(form.dtype) * across
        x = top * (1 - down) + bottom * down
    else:
        offset, inside = place
        x = tl.load(ptr + offset, mask=real & inside, other=0).to(form.dtype)
    if form.binary:
        # The stride of the classes is 0: both have read the one channel.
        x = tl.where(c == 0, x, 0.0 if form.from_logits else 1 - x)
    x = tl.where(seen, x, 0.0)
    if form.from_logits:
        x = tl.where(real, x, -float("inf"))
    return x


# Mathematics --------------------------------------------------------------------------------------


@triton.jit
def _normaliser(head, seen, form: tl.constexpr):
    """m and Z of p = exp(z - m) / Z; of no use where p is given."""
    m = tl.full([1, form.block_m], -float("inf"), form.dtype)
    Z = tl.zeros([1, form.block_m], form.dtype)
    if form.from_logits:
        for start in range(0, form.classes, form.block_c):
            x = _read(head, start + tl.arange(0, form.block_c)[:, None], seen, form)
            m = tl.maximum(m, tl.max(x, 0, keep_dims=True))
        for start in range(0, form.classes, form.block_c):
            x = _read(head, start + tl.arange(0, form.block_c)[:, None], seen, form)
            Z += tl.sum(tl.exp(x - m), 0, keep_dims=True)
    return m, Z


@triton.jit
def _probabilities(x, m, Z, form: tl.constexpr):
    """p and log p; at p = 0 the latter is -inf, or the logarithm of the least normal number."""
    if form.from_logits:
        p, log_p = tl.exp(x - m) / Z, x - m - tl.log(Z)
    else:
        p, log_p = x, tl.log(tl.where(x < form.tiny, form.tiny, x))
    return p, log_p


@triton.jit
def _expm1(u):
    """exp(u) - 1, by the series where the difference would lose digits."""
    series = tl.full(u.shape, 1, u.dtype)
    for k in tl.static_range(EXPM1_TERMS - 1):
        series = 1 + series * u * (1 / (EXPM1_TERMS - k))
    return tl.where(tl.abs(u) < 0.5, u * series, tl.exp(u) - 1)


@triton.jit
def _shifted_log(p, log_p, form: tl.constexpr):
    """`Tsallis.shifted_log`."""
    if form.q == 2:
        L = p
    elif form.shift != 0:
        L = tl.exp((form.q - 1) * log_p) * form.shift
    else:
        log_tiny = tl.log(tl.full([1, 1], form.tiny, form.dtype))
        L = tl.where(log_p < log_tiny, log_tiny, log_p)
        if form.q != 1:
            L = _expm1((form.q - 1) * L) * (1 / (form.q - 1))
    return L


@triton.jit
def _term(p, log_p, form: tl.constexpr):
    """`Tsallis.terms`."""
    t = p * _shifted_log(p, log_p, form)
    if form.q < 1 and form.normalised:
        t = tl.where(p < form.tiny, tl.exp(form.q * log_p) * (1 / (form.q - 1)), t)
    return t


@triton.jit
def _predict(z, m, Z, guide, seen, form: tl.constexpr):
    """`pixelwise.predict` of the pixels that are seen."""
    by_logits: tl.constexpr = guide is None and form.threshold is None
    if guide is not None:
        guide_m, guide_Z = _normaliser(guide, seen, form)
    y = tl.zeros([1, form.block_m], tl.int32)
    first_nan = tl.full([1, form.block_m], form.classes, tl.int32)
    best = tl.full([1, form.block_m], -float("inf"), form.dtype)
    surest = best
    for start in range(0, form.classes, form.block_c):
        c = start + tl.arange(0, form.block_c)[:, None]
        score = _read(z, c, seen, form)
        if not by_logits:
            score, _ = _probabilities(score, m, Z, form)
            sure = score
            if guide is not None:
                p, _ = _probabilities(_read(guide, c, seen, form), guide_m, guide_Z, form)
                score, sure = score + p, tl.maximum(score, p)
            surest = tl.maximum(surest, tl.max(sure, 0, keep_dims=True))
        real = c < form.classes
        nan = tl.where(real & (score != score), c, form.classes)
        first_nan = tl.minimum(first_nan, tl.min(nan, 0, keep_dims=True))
        score = tl.where(real & (score == score), score, -float("inf"))
        top = tl.max(score, 0, keep_dims=True)
        first = tl.min(tl.where(score == top, c, form.classes), 0, keep_dims=True)
        # Of equals the first: an earlier chunk wins.
        y = tl.where(top > best, first, y)
        best = tl.maximum(best, top)
    if form.threshold is not None:
        y = tl.where(surest <= form.threshold, -1, y)
    return tl.where(first_nan < form.classes, first_nan if by_logits else form.classes, y)


@triton.jit
def _potential(z, m, Z, y, seen, form: tl.constexpr):
    """phi, and the sum over the classes that it came from: p_c L(p_c), or z_y (p_y)."""
    total = tl.zeros([1, form.block_m], form.dtype)
    mass = tl.zeros([1, form.block_m], form.dtype)
    for start in range(0, form.classes, form.block_c):
        c = start + tl.arange(0, form.block_c)[:, None]
        x = _read(z, c, seen, form)
        if form.q is None:
            total += tl.sum(tl.where(c == y, x, 0.0), 0, keep_dims=True)
        else:
            p, log_p = _probabilities(x, m, Z, form)
            total += tl.sum(_term(p, log_p, form), 0, keep_dims=True)
            mass += tl.sum(p, 0, keep_dims=True)
    if form.q is None:
        _, log_p = _probabilities(total, m, Z, form)
        phi = tl.where((y >= -1) & (y < form.classes), -log_p, float("nan"))
    else:
        phi = form.constant - total
        if not (form.normalised or form.shift != 0 or form.q == 1):
            phi += (1 - mass) * (1 / (form.q - 1))
    return phi, total


# With t_c = p_c L(p_c), the slope of S_q is -q (t_c - p_c sum_k t_k) by the logits. By the
# probabilities it is -(L(p_c) + p_c L'(p_c)), where p L' = p^(q-1) = (q - 1) (L - shift) + 1, or
# 0 where L is held constant. That of -log p_y is p_c - [c = y] and -[c = y] / p_y.


@triton.jit
def _slope(x, m, Z, total, y, c, form: tl.constexpr):
    """The slope of phi by the logits (or probabilities) x of classes c."""
    p, log_p = _probabilities(x, m, Z, form)
    if form.q is None:
        if form.from_logits:
            slope = p - tl.where(c == y, 1.0, 0.0)
        else:
            slope = -1 / tl.where(p >= form.tiny, p, float("inf"))
            slope = tl.where(c == y, slope, 0.0)
    else:
        L = _shifted_log(p, log_p, form)
        if form.from_logits:
            slope = -form.q * (_term(p, log_p, form) - p * total)
        elif form.shift != 0:
            slope = -form.q * L
        else:
            slope = -L - tl.where(p >= form.tiny, (form.q - 1) * L + 1, 0.0)
            if not (form.normalised or form.q == 1):
                slope -= 1 / (form.q - 1)
    if form.binary and not form.from_logits:
        # The second probability is 1 - p.
        slope -= tl.sum(tl.where(c == 1, slope, 0.0), 0, keep_dims=True)
    return slope


# Store --------------------------------------------------------------------------------------------


@triton.jit
def _store_corner(ptr, strides, slope, n, c, channels, i, j, rows, columns):
    """A cell's contribution to the slope of logit (i, j), to a place where it is alone."""
    ptr += n * strides[2] + c.to(tl.int64) * strides[3]
    ptr += i.to(tl.int64) * strides[4] + j.to(tl.int64) * strides[5]
    stored = tl.where((i < rows[3]) & (j < columns[3]), channels, 0)
    tl.store(ptr, tl.sum(slope, 1, keep_dims=True), mask=c < stored)


@triton.jit
def _sweep(
    z_ptr, z_strides, z_rows, z_columns,
    guide_ptr, guide_strides, guide_rows, guide_columns,
    labels_ptr, valid_ptr, weights_ptr,
    sums_ptr, counts_ptr, y_ptr, phi_ptr, slope_ptr, slope_strides,
    length, height, width, tiles,
    form: tl.constexpr,
):  # fmt: skip
    """All of `sweep` for a tile of pixels; the slope, and the bins, of one chunk of classes."""
    chunks: tl.constexpr = (form.classes + form.block_c - 1) // form.block_c
    channels: tl.constexpr = 1 if form.binary else form.classes
    program = tl.program_id(0).to(tl.int64)
    chunk = (program % chunks).to(tl.int32) + tl.zeros([1, 1], tl.int32)
    tile = program // chunks % tiles
    n = program // chunks // tiles
    c = chunk * form.block_c + tl.arange(0, form.block_c)[:, None]
    b = c if form.bins > 1 else chunk

    if form.upsampled:
        i = (tile // z_columns[3]).to(form.position)
        j = (tile % z_columns[3]).to(form.position)
        first_row, first_column = _first(i, z_rows), _first(j, z_columns)
        cell_height = _first(i + 1, z_rows) - first_row
        cell_width = _first(j + 1, z_columns) - first_column
        pixels = cell_height * cell_width
    else:
        pixels = form.block_m
    # Every element of a tile sums for itself: its threads meet only once, after the loop.
    sums = tl.zeros([b.shape[0], form.block_m], form.dtype)
    counts = tl.zeros([b.shape[0], form.block_m], tl.int32)
    top_left = tl.zeros([form.block_c, form.block_m], form.dtype)
    top_right, bottom_left, bottom_right = top_left, top_left, top_left

    for start in range(0, pixels, form.block_m):
        k = start + tl.arange(0, form.block_m)[None, :]
        guide = None
        if form.upsampled:
            inside = k < pixels
            k = tl.minimum(k, pixels - 1)
            row, column = first_row + k // cell_width, first_column + k % cell_width
            place = _corners(n, i, j, row, column, z_rows, z_columns, z_strides, form)
            if guide_ptr is not None:
                guide_i = i if form.same_cells else _low(row, guide_rows)
                guide_j = j if form.same_cells else _low(column, guide_columns)
                guide_place = _corners(
                    n, guide_i, guide_j, row, column,
                    guide_rows, guide_columns, guide_strides, form,
                )  # fmt: skip
                guide = guide_ptr, guide_strides, guide_place
            k = row.to(tl.int64) * width + column
        else:
            k = tile * form.block_m + k
            inside = k < length
            place = _offset(n, k, height, width, z_strides, form), inside
            if guide_ptr is not None:
                guide_place = _offset(n, k, height, width, guide_strides, form), inside
                guide = guide_ptr, guide_strides, guide_place
        z = z_ptr, z_strides, place
        pixel = n * length + k
        seen = inside
        if valid_ptr is not None:
            seen &= tl.load(valid_ptr + pixel, mask=inside, other=0) != 0
        y = tl.zeros([1, form.block_m], tl.int32)
        if labels_ptr is not None:
            label = tl.load(labels_ptr + pixel, mask=inside, other=0).to(tl.int64)
            label = tl.where(label == form.ignore_index, -1, label)
            known = (label >= -1) & (label < form.classes)
            y = tl.where(known, label, form.classes).to(tl.int32)
            seen &= y != -1

        m, Z = None, None
        if not form.index_only or form.threshold is not None:
            m, Z = _normaliser(z, seen, form)
        if form.predicts:
            y = _predict(z, m, Z, guide, seen, form)
        counted = seen & (y != -1)
        hit = counted & (y == c) if form.bins > 1 else counted
        counts += hit.to(tl.int32)
        if not form.index_only:
            phi, total = _potential(z, m, Z, y, seen, form)
            phi = tl.where(counted, phi, 0.0)
            if weights_ptr is None:
                sums += tl.where(hit, phi, 0.0)
        if weights_ptr is not None:
            if form.weighted_pixels:
                w = tl.load(weights_ptr + pixel, mask=inside, other=0)
            elif form.by_class:
                known = counted & (y < form.classes)
                w = tl.load(weights_ptr + n * form.classes + y, mask=known, other=0)
            else:
                w = tl.load(weights_ptr + n)
            w = tl.where(counted, w, 0.0)
            sums += w * phi
            if form.q is None:
                # An index that is no class shows in the gradient as it does in the sum.
                w = tl.where(phi == phi, w, phi)
            slope = w * _slope(_read(z, c, seen, form), m, Z, total, y, c, form)

            if form.upsampled:
                down, across = place[4], place[5]
                left, right = slope * (1 - across), slope * across
                top_left += left * (1 - down)
                top_right += right * (1 - down)
                bottom_left += left * down
                bottom_right += right * down
            else:
                offset = _offset(n, k, height, width, slope_strides, form)
                offset += c.to(tl.int64) * slope_strides[1]
                tl.store(slope_ptr + offset, slope, mask=(c < channels) & inside)
        if y_ptr is not None:
            tl.store(y_ptr + pixel, y, mask=inside & (chunk == 0))
        if phi_ptr is not None:
            tl.store(phi_ptr + pixel, phi, mask=inside & (chunk == 0))

    partial = (n * tiles + tile) * form.bins + b
    tl.store(sums_ptr + partial, tl.sum(sums, 1, keep_dims=True), mask=b < form.bins)
    tl.store(counts_ptr + partial, tl.sum(counts, 1, keep_dims=True), mask=b < form.bins)
    if weights_ptr is not None and form.upsampled:
        at, s = slope_ptr, slope_strides
        _store_corner(at, s, top_left, n, c, channels, i, j, z_rows, z_columns)
        at += s[1]
        _store_corner(at, s, top_right, n, c, channels, i, j + 1, z_rows, z_columns)
        at += s[0]
        _store_corner(at, s, bottom_right, n, c, channels, i + 1, j + 1, z_rows, z_columns)
        at -= s[1]
        _store_corner(at, s, bottom_left, n, c, channels, i + 1, j, z_rows, z_columns)


# Launch -------------------------------------------------------------------------------------------


def check_device() -> None:
    """Raise if Triton has no kernels for the current device."""
    target = triton.runtime.driver.active.get_current_target()
    if target.backend != "cuda" or target.arch < 70:
        raise RuntimeError(f"it has no kernels for {target}")


def at_once(z: Tensor, problem: Problem) -> bool:
    """Whether one pass shall take sums and slope, before the upstream gradient is known.

    Not if that is as large as the logits: scaling it costs more than reading them again.
    """
    return problem.size is not None


def sweep(
    z: Tensor,
    problem: Problem,
    *,
    guide: Tensor | None = None,
    labels: Tensor | None = None,
    valid: Tensor | None = None,
    weights: Tensor | None = None,
    per_pixel: bool = False,
) -> Swept:
    """`blocks.sweep` on the device of the tensors, for which the host never waits."""
    tsallis = isinstance(problem.potential, Tsallis)
    classes = 2 if problem.binary else z.shape[1]
    predicts = labels is None and (problem.by_class or not tsallis)
    sloped = weights is not None
    dtype = torch.float64 if z.dtype == torch.float64 else torch.float32
    shape = (len(z), *(problem.size or z.shape[2:]))
    length = math.prod(shape[1:])
    heads = [z, guide] if predicts and guide is not None else [z]
    slope = None
    if problem.size is not None and problem.from_logits:
        heads = [head.to(dtype).clamp_min(LOWEST_LOGIT) for head in heads]
    if sloped and problem.size is not None:
        # A map for each corner: the first row (column) is no cell's lower (right) one.
        slope = z.new_zeros(2, 2, *z.shape, dtype=dtype)
    elif sloped:
        slope = torch.empty_like(z)
    plan = _plan(
        problem,
        dtype,
        tuple((head.shape, head.stride()) for head in heads),
        None if slope is None else slope.stride(),
        predicts,
        per_pixel,
    )

    sums = z.new_empty(len(z), plan.tiles, plan.form.bins, dtype=dtype)
    counts = z.new_empty(len(z), plan.tiles, plan.form.bins, dtype=torch.int32)
    y = z.new_empty(shape, dtype=index_dtype(classes)) if predicts and not sloped else None
    phi = z.new_empty(shape, dtype=dtype) if per_pixel and not sloped else None
    if len(z) and length:
        with torch.cuda.device_of(z):
            _sweep[(len(z) * plan.tiles * plan.chunks,)](
                heads[0], *plan.head,
                heads[1] if len(heads) == 2 else None, *plan.guide,
                *(None if t is None else t.contiguous() for t in (labels, valid)),
                None if weights is None else weights.to(dtype).contiguous(),
                sums, counts, y, phi, slope, plan.slope_strides,
                length, *shape[-2:], plan.tiles, plan.form,
                num_warps=plan.warps,
                num_stages=1,
                enable_fp_fusion=True,
            )  # fmt: skip
    # Before more memory is taken, copies of the logits are given back.
    del heads
    if slope is not None and problem.size is not None:
        # Where the logits are held constant it is 0.
        slope = slope.sum((0, 1)).masked_fill_(z < LOWEST_LOGIT, 0)
    return Swept(sums.sum(1), counts.sum(1), y, phi, slope)


# Shape and strides of a tensor.
_Layout = tuple[tuple[int, ...], tuple[int, ...]]
# Strides of images, channels, and three spatial dimensions; rows and columns of an upsampling.
_Head = tuple[tuple[int, ...], Any, Any]


class _Plan(NamedTuple):
    """A launch, but for its tensors.

    tiles, chunks: of pixels in an image, and of classes.
    head, guide: how the logits of each lie.
    """

    form: Form
    tiles: int
    chunks: int
    warps: int
    head: _Head
    guide: _Head
    slope_strides: tuple[int, ...] | None


# In eager mode a launch takes the host longer than small problems take the device.
@functools.lru_cache(maxsize=256)
def _plan(
    problem: Problem,
    dtype: torch.dtype,
    heads: tuple[_Layout, ...],
    slope_strides: tuple[int, ...] | None,
    predicts: bool,
    per_pixel: bool,
) -> _Plan:
    """dtype: in which to compute; heads: of z, and of the guide if there is one."""
    tsallis = problem.potential if isinstance(problem.potential, Tsallis) else None
    (shape, strides), *_ = heads
    classes = 2 if problem.binary else shape[1]
    length = math.prod(problem.size or shape[2:])
    block_c = min(triton.next_power_of_2(classes), MAX_CLASSES)
    axes: list[Any] = [(None, None) for _ in heads]
    flat = vast = False
    if problem.size is not None:
        axes = [_axes(source, problem.size, problem.align_corners) for source, _ in heads]
        numerators = (2 * source * size for *_, source, size in sum(axes, ()))
        vast = 2 * max(length, *numerators) >= 2**31
        tiles, per_warp = shape[2] * shape[3], UPSAMPLED_PER_WARP
        block_m = max(2 * per_warp // block_c, MIN_CELL_PIXELS)
        block_m = min(block_m, triton.next_power_of_2(triton.cdiv(length, tiles)))
    else:
        flat = all(is_flat(*head) for head in heads)
        flat = flat and (slope_strides is None or is_flat(shape, slope_strides))
        by_pixel = shape[1] > 1 and strides[1] == 1
        per_warp = ELEMENTS_PER_WARP_BY_PIXEL if by_pixel else ELEMENTS_PER_WARP
        block_m = min(max(per_warp // block_c, MIN_PIXELS), MAX_PIXELS)
        tiles = triton.cdiv(length, block_m)
        if slope_strides is not None:
            slope_strides = _strides((shape, slope_strides), flat, problem.binary)
    form = Form(
        q=None if tsallis is None else tsallis.q,
        index_only=problem.potential is None,
        shift=0.0 if tsallis is None else tsallis.shift,
        constant=0.0 if tsallis is None else tsallis.constant,
        normalised=tsallis is None or tsallis.normalised,
        threshold=problem.threshold,
        ignore_index=problem.ignore_index,
        binary=problem.binary,
        from_logits=problem.from_logits,
        by_class=problem.by_class,
        bins=classes if problem.by_class and slope_strides is None else 1,
        predicts=predicts,
        weighted_pixels=per_pixel,
        upsampled=problem.size is not None,
        flat=flat,
        same_cells=axes[0] == axes[-1],
        classes=classes,
        block_c=block_c,
        block_m=block_m,
        dtype=tl.float64 if dtype == torch.float64 else tl.float32,
        tiny=torch.finfo(dtype).tiny,
        position=tl.int64 if vast else tl.int32,
    )
    head, *others = (
        (_strides(layout, flat, problem.binary), *pair)
        for layout, pair in zip(heads, axes, strict=True)
    )
    return _Plan(
        form,
        tiles,
        chunks=triton.cdiv(classes, block_c),
        warps=max(1, block_c * block_m * dtype.itemsize // (4 * per_warp)),
        head=head,
        guide=others[0] if others else head,
        slope_strides=slope_strides,
    )


def _axes(
    source: tuple[int, ...], size: tuple[int, int], align_corners: bool
) -> tuple[tuple[int, ...], ...]:
    """Rows and columns of an upsampling, as the kernels take them."""
    pairs = zip(source[2:], size, strict=True)
    if align_corners:
        return tuple((max(m - 1, 1), 0, max(k - 1, 1), m, k) for m, k in pairs)
    return tuple((2 * m, m - k, 2 * k, m, k) for m, k in pairs)


def _strides(layout: _Layout, flat: bool, binary: bool) -> tuple[int, ...]:
    """Strides of images, channels, and three spatial dimensions, of which `flat` uses the last."""
    shape, (images, channels, *spatial) = layout
    if flat:
        # That of the last dimension that has one.
        last = [stride for stride, length in zip(spatial, shape[2:], strict=True) if length != 1]
        spatial = last[-1:]
    # Both classes of a binary problem read its one channel.
    return images, 0 if binary else channels, *[0] * (3 - len(spatial)), *spatial
