"""The CPU path: a few pixels at a time, few enough to stay in the cache.

No tensor as large as the full-resolution logits is made, but for the gradient of logits
that have that size. All work is done on blocks of logits (R, C, B), R rows of B pixels, on
which every step of the formula is a pass through the cache rather than through memory.
"""

from __future__ import annotations

import functools
import math
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from maxsquare.engine import memory
from maxsquare.engine.bilinear import axis_bands
from maxsquare.engine.pixelwise import LOWEST_LOGIT, Problem
from maxsquare.potentials import Label, Tsallis

# What a thread works on at a time, in all buffers together: about a level-2 cache, which
# interpolated logits share with the strip that they come from.
CACHE_BYTES_PER_THREAD = 2048 * 1024
UPSAMPLED_BYTES_PER_THREAD = 1408 * 1024
# Columns interpolated at a time: the fewer, the fewer zeros are multiplied, but the more calls.
COLUMNS_PER_BAND = 256
# Low-resolution rows kept at the width of the result: one more is read twice for every so many.
ROWS_PER_STRIP = 8


class Swept(NamedTuple):
    """What one pass over the pixels gives.

    sums: of the potentials, (images, bins); weighted and of all bins, (images, 1), if there
        are weights of bins.
    counts: of the pixels, (images, bins); 0 if there are weights of classes, made of counts.
    y: the predicted index of every pixel (images, *spatial), narrow, with -1 as 255 in uint8;
        None where none is predicted, or if there are weights.
    phi: the potential of every pixel, if asked for and without weights.
    slope: of the weighted sum of potentials with respect to z, if there are weights.
    """

    sums: Tensor
    counts: Tensor
    y: Tensor | None
    phi: Tensor | None
    slope: Tensor | None


class _Pixels(NamedTuple):
    """A block's pixels: their indices, which of them count (None: all), and an alarm.

    strange: an index that counts may be no class.
    """

    y: Tensor | None
    counted: Tensor | None
    strange: bool

    def narrow(self) -> Tensor:
        """The indices, -1 (in uint8: 255) where they do not count."""
        assert self.y is not None
        none = 255 if self.y.dtype == torch.uint8 else -1
        return self.y if self.counted is None else self.y.where(self.counted, none)


class Own(NamedTuple):
    """A guide's own problem: the indices of its pixels, and counts and weights of its bins."""

    problem: Problem
    labels: Tensor | None
    counts: Tensor
    weights: Tensor


def at_once(z: Tensor, problem: Problem) -> bool:
    """Whether one pass shall take sums and slope, before the upstream gradient is known.

    Not if the slope would underflow in float16: loss scales are there to avoid that.
    """
    return problem.size is not None or z.dtype != torch.float16


def index_dtype(classes: int) -> torch.dtype:
    """The narrowest integers for -1 (255 in uint8), the classes, and C, which means NaN."""
    return torch.uint8 if classes < 255 else torch.int32


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
    """Pass once over all pixels; tensors as in `pixelwise.accumulate`.

    weights: of the bins (images, bins), or of the pixels (images, *spatial) if `per_pixel`,
    which also asks for phi.
    """
    return _Pass(z, problem, guide, labels, valid, weights, per_pixel).run()


def sweep_both(
    z: Tensor,
    own: Own,
    low: Tensor,
    problem: Problem,
    *,
    valid: Tensor | None,
    weights: Tensor,
) -> tuple[Swept, Swept]:
    """Of a head with a problem of its own, and of a low-level head that it guides.

    One pass, in which the probabilities of the former are computed once for both.
    """
    work = _Pass(low, problem, z, valid=valid, weights=weights, own=own)
    low_swept = work.run()
    return work.own_swept(), low_swept


class _Pass:
    """One pass over all pixels: what it is given, and what it has found."""

    def __init__(
        self,
        z: Tensor,
        problem: Problem,
        guide: Tensor | None = None,
        labels: Tensor | None = None,
        valid: Tensor | None = None,
        weights: Tensor | None = None,
        per_pixel: bool = False,
        own: Own | None = None,
    ) -> None:
        potential, classes = problem.potential, 2 if problem.binary else z.shape[1]
        self.problem, self.classes = problem, classes
        self.dtype = torch.float64 if z.dtype == torch.float64 else torch.float32
        self.predicts = labels is None and (problem.by_class or not isinstance(potential, Tsallis))
        sloped = weights is not None
        # Nothing but the largest logits is wanted.
        self.looks = potential is None and problem.threshold is None and labels is None

        tensors = [z] if guide is None else [z, guide]
        # A prediction from probabilities that are still wanted takes a buffer of its own.
        spares = 2 if isinstance(potential, Label) and self.predicts and guide is None else 1
        # Full-resolution logits that are only looked at need no buffer.
        buffers = spares if self.looks and problem.size is None else spares + len(tensors)
        self.heads = _heads(tensors, problem, self.dtype, buffers, (sloped, own is not None))
        self.source = self.heads[0]
        like = self.source.room.memory
        self.spares = [_Room(torch.empty_like(like)) for _ in range(spares)]

        shape = (len(z), *(z.shape[2:] if problem.size is None else problem.size))
        self.images = len(z) if math.prod(shape) else 0
        bins = classes if problem.by_class else 1
        self.sums = z.new_zeros(len(z), 1 if sloped else bins, dtype=torch.float64)
        self.counts = z.new_zeros(len(z), bins, dtype=torch.long)
        everything = bins == 1 and not self.predicts and labels is None and valid is None
        if everything:
            self.counts += math.prod(shape[1:])
        # Weights of classes are made of counts: nobody asks again.
        self.counting = not everything and not (sloped and problem.by_class)
        self.y = self.phi = None
        if self.predicts and not sloped:
            self.y = z.new_empty(shape, dtype=index_dtype(classes))
        if per_pixel and not sloped:
            self.phi = z.new_empty(shape, dtype=self.dtype)
        maps = {
            "y": self.y,
            "phi": self.phi,
            "labels": labels,
            "own labels": own and own.labels,
            "valid": valid,
            "weights": weights if per_pixel else None,
        }
        self.maps = {
            name: _rows(pixels, self.source.length)
            for name, pixels in maps.items()
            if pixels is not None
        }
        self.task = _Task(self.source, problem, self.sums, None if per_pixel else weights)
        self.own = own
        if own is not None:
            own_sums = torch.zeros_like(self.sums)
            self.own_task = _Task(self.heads[1], own.problem, own_sums, own.weights)

    def run(self) -> Swept:
        """What is found of the first head."""
        tasks = [self.task] if self.own is None else [self.task, self.own_task]
        for first in range(0, self.images, self.source.group):
            images = slice(first, min(first + self.source.group, self.images))
            for part in (*self.heads, *tasks):
                part.start(images)
            counts = self.counts[images]
            maps = {name: self.source.pixels(rows) for name, rows in self.maps.items()}
            for k in self.source.order:
                self._do_block(k, counts, {name: blocks[k] for name, blocks in maps.items()})
            for part in (*self.heads, *tasks):
                part.finish()
        sums = self.sums.to(self.dtype)
        return Swept(sums, self.counts, self.y, self.phi, self.source.slope)

    def own_swept(self) -> Swept:
        """What was found of a guide with a problem of its own."""
        assert self.own is not None
        sums = self.own_task.sums.to(self.dtype)
        return Swept(sums, self.own.counts, None, None, self.heads[1].slope)

    def _do_block(self, k: int, counts: Tensor, maps: dict[str, Tensor]) -> None:
        """counts: of the images at hand; maps: the block's part of each."""
        problem = self.problem
        x, *guides = [head.look(k) if self.looks else head.load(k) for head in self.heads]
        spare, other = self.spares[0].of(x.shape), self.spares[-1].of(x.shape)
        pixels = _Pixels(None, maps.get("valid"), False)
        if "labels" in maps:
            pixels = _given(maps["labels"], pixels, problem, self.classes)

        if self.own is not None:
            p, spare = self._do_own(k, guides[0], spare, pixels, maps.get("own labels"))
            guides = [p]
        elif guides and problem.from_logits:
            guides = [torch.softmax(guides[0], 1, out=guides[0])]

        p = log_p = x
        if self.predicts and problem.threshold is None:
            y_dtype = index_dtype(self.classes) if self.looks else torch.long
            pixels = pixels._replace(y=_argmax(p, spare, y_dtype))
        if problem.potential is not None or problem.threshold is not None:
            p, log_p = _probabilities(p, problem, spare)
        if self.predicts and problem.threshold is not None:
            pixels = _confident(p, guides, pixels, problem.threshold, other)

        if "y" in maps:
            maps["y"].copy_(pixels.narrow())
        if self.counting:
            _count(counts, pixels)
        if problem.potential is not None:
            phi = self.task.settle(k, p, log_p, pixels, spare, maps.get("weights"))
            if "phi" in maps:
                maps["phi"].copy_(phi)

    def _do_own(
        self, k: int, x: Tensor, spare: Tensor, pixels: _Pixels, labels: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Settle the guide's own problem; its probabilities, and a buffer that is spare then."""
        problem = self.own_task.problem
        if labels is not None:
            pixels = _given(labels, pixels, problem, self.classes)
        p, log_p = _probabilities(x, problem, spare)
        spare = spare if p is x else x
        self.own_task.settle(k, p, log_p, pixels, spare)
        return p, spare


class _Task:
    """The sum of a head's potentials, and its slope if there are weights.

    sums: (images, bins), which it fills.
    weights: of the bins (images, bins).
    """

    def __init__(
        self,
        head: _Whole | _Upsampled,
        problem: Problem,
        sums: Tensor,
        weights: Tensor | None,
    ) -> None:
        self.head, self.problem, self.sums = head, problem, sums
        self.factor = _factor(problem)
        # With the factor that slopes lack.
        self.weights = None if weights is None else weights.to(head.room.memory.dtype) * self.factor

    def start(self, images: slice) -> None:
        """Turn to images."""
        self.images = images
        self.found: list[Tensor] = []
        self.bin_weights = None if self.weights is None else self.weights[images]

    def settle(
        self,
        k: int,
        p: Tensor,
        log_p: Tensor,
        pixels: _Pixels,
        spare: Tensor,
        w: Tensor | None = None,
    ) -> Tensor:
        """phi of block k (R, B), added to the sums; with weights the slope is deposited.

        w: weights of the pixels (R, B), whose sum nobody wants.
        """
        y, counted, strange = pixels
        bin_weights, sums = self.bin_weights, self.sums[self.images]
        sloped = bin_weights is not None or w is not None
        phi, slope = _potential(p, log_p, pixels, self.problem, sloped, spare)
        if counted is not None:
            if not math.isfinite(phi.sum().item()):
                # Times 0, what is no number would still be none.
                slope.masked_fill_(~counted.unsqueeze(1), 0)
            phi = phi.where(counted, 0)
        if w is not None:
            w = w * self.factor
        elif bin_weights is None:
            self.found.append(_in_bins(phi, y, sums))
            return phi
        elif y is None or bin_weights.shape[1] == 1:
            w = bin_weights
            self.found.append(w * _of_images(phi, sums).sum(1, keepdim=True))
        else:
            w = _look_up(bin_weights, y)
            self.found.append(_of_images(w * phi, sums).sum(1, keepdim=True))
        if counted is not None:
            w = w.where(counted, 0)
        if strange:
            # An index that is no class shows in the gradient as it does in the sum.
            w = torch.where(phi.isnan(), phi, w)
        self.head.deposit(slope, w, k)
        return phi

    def finish(self) -> None:
        """Add up what the blocks of the images have given."""
        if self.found:
            found = torch.stack(self.found).sum(0, dtype=self.sums.dtype)
            self.sums[self.images] = found if self.weights is None else found / self.factor


def _rows(pixels: Tensor, length: int) -> Tensor:
    """A map (images, *spatial) as (images, length of the first axis of the blocks, rest)."""
    rest = pixels[:1].numel() // max(len(pixels[:1]) * length, 1)
    return pixels.reshape(len(pixels), length, rest)


def _given(labels: Tensor, pixels: _Pixels, problem: Problem, classes: int) -> _Pixels:
    """Pixels whose indices are given; one that does not count is 0."""
    y, ignore, counted = labels.long(), problem.ignore_index, pixels.counted
    least, most = _range(labels)
    if least < 0 or most >= classes or 0 <= ignore < classes:
        counts = y != ignore
        if least < 0:
            counts &= y != -1
        counted = counts if counted is None else counted & counts
        y = y.where(counted, 0)
        least, most = _range(y)
    strange = least < 0 or most >= classes
    if strange and problem.by_class:
        classless = (y < 0) | (y >= classes)
        assert counted is not None
        counted, strange = counted & ~classless, False
        y = y.masked_fill(classless, 0)
    return _Pixels(y, counted, strange)


def _probabilities(x: Tensor, problem: Problem, spare: Tensor) -> tuple[Tensor, Tensor]:
    """p and log p, in the place of x or spare.

    Cross entropy gets the logits instead of log p; where no logarithm is wanted p stands for it.
    """
    potential = problem.potential
    if isinstance(potential, Label) and problem.from_logits:
        return torch.softmax(x, 1, out=spare), x
    if potential is None or (isinstance(potential, Tsallis) and potential.q == 2):
        p = torch.softmax(x, 1, out=x) if problem.from_logits else x
        return p, p
    if not problem.from_logits:
        return x, torch.clamp_min(x, torch.finfo(x.dtype).tiny, out=spare).log_()
    log_p = torch.log_softmax(x, 1, out=x)
    return torch.exp(log_p, out=spare), log_p


def _confident(
    p: Tensor, guides: list[Tensor], pixels: _Pixels, threshold: float, spare: Tensor
) -> _Pixels:
    """`pixelwise.predict` of a block; the guides' probabilities are overwritten."""
    best, mean, counted = p.amax(1), p, pixels.counted
    for guide in guides:
        best, mean, spare = torch.maximum(best, guide.amax(1)), guide.add_(p), guide
    y = _argmax(mean, spare)
    strange = math.isnan(best.max().item())
    if strange:
        y.masked_fill_(best.isnan(), p.shape[1])
    accepted = (best <= threshold).logical_not_()
    return _Pixels(y, accepted if counted is None else accepted & counted, strange)


def _argmax(x: Tensor, spare: Tensor, dtype: torch.dtype = torch.long) -> Tensor:
    """The first of the largest; comparing with the maximum is cheaper than looking for it.

    spare: may be x, if nobody asks what it says of NaN.
    """
    classes = x.shape[1]
    hit = torch.eq(x, x.amax(1, keepdim=True), out=spare)
    # One hit at class c sums up to C + c; none (NaN) gives 0, and several at least 2 C.
    index = hit.mul_(_codes(classes, x.dtype)).sum(1).sub_(classes)
    least, most = _range(index)
    if least < 0 or most >= classes:
        row, column = torch.where((index < 0) | (index >= classes))
        odd = x[row, :, column]
        # Of x overwritten by the codes of its largest, the first is the first but zero.
        index[row, column] = (odd.bool().byte() if spare is x else odd).argmax(1).to(index.dtype)
    return index.to(dtype)


@functools.lru_cache(maxsize=8)
def _codes(classes: int, dtype: torch.dtype) -> Tensor:
    return torch.arange(classes, 2 * classes, dtype=dtype, device="cpu").unsqueeze(1)


def _range(x: Tensor) -> tuple[float, float]:
    """The least and the most: a comparison of numbers costs less than one of tensors."""
    least, most = torch.aminmax(x)
    return least.item(), most.item()


def _potential(
    p: Tensor, log_p: Tensor, pixels: _Pixels, problem: Problem, sloped: bool, spare: Tensor
) -> tuple[Tensor, Tensor]:
    """phi (R, B); if asked for, its slope (R, C, B), but for `_factor`.

    Overwrites p for cross entropy, all but p for the others.
    """
    y, _, strange = pixels
    potential, tiny = problem.potential, torch.finfo(p.dtype).tiny
    if isinstance(potential, Tsallis):
        q, a = potential.q, potential.shift
        if problem.from_logits:
            t = potential.terms(p, log_p, spare)
            total = t.sum(1)
            if sloped:
                t.addcmul_(p, total.unsqueeze(1), value=-1)
            # In its own place: fresh memory for every block costs more than this arithmetic.
            return torch.sub(potential.constant, total, out=total), t
        # (p L)' = L + p^(q-1), and p^(q-1) = (q - 1) (L - a) + 1.
        t = potential.shifted_log(p, log_p)
        power = (q - 1) * t + (0 if a else 1)
        if not a:
            # There L is held constant.
            power.mul_(p >= tiny)
        slope = power.add_(t)
        if not (a or q == 1):
            slope.add_(1 / (q - 1))
        return potential.value(p, log_p), slope
    assert y is not None
    c = (y.clamp(0, p.shape[1] - 1) if strange else y).unsqueeze(1)
    p_y = p.gather(1, c)
    if problem.from_logits:
        phi = p_y.log().neg_()
        if not p_y.amin().item() >= tiny:
            # Where it is rounded away: from the logits (here log_p) instead.
            top = log_p.amax(1, keepdim=True), p.amax(1, keepdim=True)
            exact = (top[0] - log_p.gather(1, c)).sub_(top[1].log_())
            phi = phi.where(p_y >= tiny, exact)
        slope = p.scatter_(1, c, p_y.sub_(1)) if sloped else p
    else:
        phi = log_p.gather(1, c).neg_()
        p_y = torch.where(p_y >= tiny, -1 / p_y, 0)
        slope = torch.zeros_like(p).scatter_(1, c, p_y)
    phi = phi.squeeze(1)
    if strange:
        phi.masked_fill_((y < 0) | (y >= p.shape[1]), math.nan)
    return phi, slope


def _factor(problem: Problem) -> float:
    """What the slope that `_potential` gives is to be multiplied by."""
    if not isinstance(problem.potential, Tsallis):
        return 1
    return -problem.potential.q if problem.from_logits else -1


def _count(counts: Tensor, pixels: _Pixels) -> None:
    """Add the pixels of a block to the counts of its images (images, bins)."""
    (images, bins), (y, counted, _) = counts.shape, pixels
    if counted is None and bins == 1:
        assert y is not None
        counts += y.numel() // images
        return
    if bins == 1 or y is None:
        assert counted is not None
        counts += _of_images(counted, counts).sum(1, keepdim=True)
        return
    # What does not count goes into one more bin, which is dropped.
    y = y if counted is None else y.where(counted, bins)
    found = torch.bincount(_numbered(y, images, bins + 1), minlength=images * (bins + 1))
    counts += found.view(images, -1)[:, :bins]


def _in_bins(phi: Tensor, y: Tensor | None, sums: Tensor) -> Tensor:
    """phi of a block, added up in the bins of its images, like their sums (images, bins)."""
    images, bins = sums.shape
    if bins == 1 or y is None:
        return _of_images(phi, sums).sum(1, keepdim=True)
    bin_of = _numbered(y, images, bins)
    found = torch.bincount(bin_of, phi.flatten().to(sums.dtype), minlength=sums.numel())
    return found.view(images, -1)


def _look_up(weights: Tensor, y: Tensor) -> Tensor:
    """Each pixel's weight, from those of the bins of its image (images, bins)."""
    return weights.flatten().index_select(0, _numbered(y, *weights.shape)).view_as(y)


def _of_images(pixels: Tensor, images: Tensor) -> Tensor:
    """A map of a block (R, B) as (images, pixels of each)."""
    return pixels.reshape(len(images), -1)


def _numbered(y: Tensor, images: int, bins: int) -> Tensor:
    """The bins of a block's pixels, flat, numbered throughout all of its images."""
    if images == 1:
        return y.flatten()
    first = torch.arange(0, images * bins, bins, device=y.device).unsqueeze(1)
    return (y.reshape(images, -1) + first).flatten()


class _Room:
    """Memory for one block at a time.

    Made once: fresh memory for every block would cost more than the arithmetic on it.
    """

    def __init__(self, memory: Tensor) -> None:
        self.memory = self.view = memory

    def of(self, shape: tuple[int, ...]) -> Tensor:
        """The memory, or the beginning of it, in this shape."""
        if self.view.shape != shape:
            self.view = self.memory[: math.prod(shape)].view(shape)
        return self.view


class _Whole:
    """Logits that have the resolution of the result.

    A block is a range of the first axis of one image, or several whole images.
    """

    def __init__(
        self,
        z: Tensor,
        problem: Problem,
        dtype: torch.dtype,
        flat: bool,
        elements: int,
        sloped: bool,
    ) -> None:
        self.binary, self.from_logits = problem.binary, problem.from_logits
        self.z = z.flatten(2) if flat else z
        self.slope = memory.empty_like(z) if sloped else None
        if self.slope is not None and flat and not is_flat(z.shape, self.slope.stride()):
            self.slope = z.new_empty(z.shape, dtype=z.dtype)
        self.slope_rows = self.slope.flatten(2) if self.slope is not None and flat else self.slope
        self.length = self.z.shape[2]
        self.classes, rest = 2 if problem.binary else z.shape[1], math.prod(self.z.shape[3:])
        self.step = max(1, elements // (self.classes * max(rest, 1)))
        self.group = min(max(1, self.step // max(self.length, 1)), max(len(z), 1))
        most = self.group * min(self.step, self.length)
        self.room = _Room(z.new_empty(self.classes * most * rest, dtype=dtype))
        self.images = slice(0)
        order = range(len(range(0, self.length, self.step)))
        # Backwards: what a pass before this one has read last may still be in a cache.
        self.order = order[::-1] if sloped else order

    def start(self, images: slice) -> None:
        """Turn to images, as many as a block holds."""
        self.images = images
        self.blocks = torch.split(self.z[images], self.step, 2)
        if self.slope_rows is not None:
            self.slope_blocks = torch.split(self.slope_rows[images], self.step, 2)

    def pixels(self, rows: Tensor) -> list[Tensor]:
        """The blocks of a map, (R, B) each."""
        return [block.flatten(1) for block in torch.split(rows[self.images], self.step, 1)]

    def look(self, k: int) -> Tensor:
        """Block k of the logits (R, C, B), to be read only."""
        block = self.blocks[k]
        if self.binary or block.dim() > 3 or block.dtype != self.room.memory.dtype:
            return self.load(k)
        return block

    def load(self, k: int) -> Tensor:
        """Block k of the logits (R, C, B), in a buffer that may be overwritten."""
        block = self.blocks[k]
        images, channels, *spatial = block.shape
        x = self.room.of((images, self.classes, math.prod(spatial)))
        if self.binary:
            x[:, :channels].view(block.shape).copy_(block)
            return _complete(x, self.from_logits)
        x.view(block.shape).copy_(block)
        return x

    def deposit(self, slope: Tensor, w: Tensor, k: int) -> None:
        """Write the slope of block k, times w, into the gradient."""
        out = self.slope_blocks[k]
        slope, w = _channels(slope, self.binary, self.from_logits), w.unsqueeze(1)
        if out.dim() > 3:
            slope = slope.view(out.shape)
            w = w.view(len(out), 1, *(out.shape[2:] if w.shape[2] > 1 else [1] * (out.dim() - 2)))
        if slope.dtype == out.dtype:
            torch.mul(slope, w, out=out)
        else:
            out.copy_(slope.mul_(w))

    def finish(self) -> None:
        """The gradient is complete."""


class _Upsampled:
    """Logits to be upsampled to the resolution of the result; a block is some of its rows.

    A strip of low-resolution rows is interpolated along the columns, then block by block along
    the rows. The gradient goes the same way back.

    banded: several rows, or columns, are interpolated at once.
    clamped: there may be logits below the lowest.
    """

    def __init__(
        self,
        z: Tensor,
        problem: Problem,
        dtype: torch.dtype,
        banded: bool,
        clamped: bool,
        elements: int,
        sloped: bool,
    ) -> None:
        assert problem.size is not None
        self.binary, self.from_logits = problem.binary, problem.from_logits
        self.z, self.dtype, self.clamped, self.group = z, dtype, clamped, 1
        self.classes, channels = 2 if problem.binary else z.shape[1], z.shape[1]
        (self.length, self.width), (height, width) = problem.size, z.shape[2:]
        step = max(1, elements // (self.classes * self.width)) if banded else 1
        columns = COLUMNS_PER_BAND if banded else 1
        align = problem.align_corners
        self.row_bands = axis_bands(self.length, height, align, step, dtype)
        self.column_bands = axis_bands(self.width, width, align, columns, dtype)
        self.step, self.order = step, range(len(self.row_bands))
        self.room = _Room(z.new_empty(step * self.classes * self.width, dtype=dtype))
        self.strips = _strips([band.source for band in self.row_bands])
        rows = max(strip.stop - strip.start for strip in self.strips)
        # The open strip, wide but low: (rows, channels, width of the result).
        self.wide = z.new_empty(rows, channels, self.width, dtype=dtype)
        self.wide_slope = torch.empty_like(self.wide) if sloped else None
        self.slope = torch.zeros_like(z, dtype=dtype) if sloped else None
        self.n, self.strip = 0, slice(0)

    def start(self, images: slice) -> None:
        """Turn to an image."""
        self.n, self.strip = images.start, slice(0)

    def pixels(self, rows: Tensor) -> tuple[Tensor, ...]:
        """The blocks of a map, (R, B) each."""
        return torch.split(rows[self.n], self.step)

    def look(self, k: int) -> Tensor:
        """Block k of the logits (R, C, B), to be read only."""
        return self.load(k)

    def load(self, k: int) -> Tensor:
        """Block k of the logits (R, C, B), in a buffer that may be overwritten."""
        if self.strips[k] != self.strip:
            self.finish()
            self._open(self.strips[k])
        band, channels = self.row_bands[k], self.wide.shape[1]
        x = self.room.of((len(band.weights), self.classes, self.width))
        low = self._of_strip(self.wide, k)
        if not self.binary:
            torch.mm(band.weights, low, out=x.flatten(1))
            return x
        x[:, :channels] = (band.weights @ low).view(-1, channels, self.width)
        return _complete(x, self.from_logits)

    def deposit(self, slope: Tensor, w: Tensor, k: int) -> None:
        """Add the slope of block k, times w, to that of the rows it came from."""
        assert self.wide_slope is not None
        factor = 1.0
        if w.numel() == 1:
            factor = w.item()
        else:
            slope = slope.mul_(w.unsqueeze(1))
        slope = _channels(slope, self.binary, self.from_logits).flatten(1)
        weights = self.row_bands[k].weights.t()
        self._of_strip(self.wide_slope, k).addmm_(weights, slope, alpha=factor)

    def finish(self) -> None:
        """Take the gradient of the open strip back along the columns."""
        if self.wide_slope is None or self.slope is None:
            return
        narrow = self.slope[self.n, :, self.strip].transpose(0, 1)
        for band in self.column_bands:
            wide = self.wide_slope[: len(narrow), :, band.out]
            narrow[..., band.source] += wide @ band.weights
        if self.clamped:
            # Where the logits are held constant.
            narrow.masked_fill_(self.z[self.n, :, self.strip].transpose(0, 1) < LOWEST_LOGIT, 0)

    def _open(self, strip: slice) -> None:
        self.strip = strip
        narrow = self.z[self.n, :, strip].to(self.dtype).transpose(0, 1)
        if self.clamped:
            narrow = narrow.clamp_min(LOWEST_LOGIT)
        for band in self.column_bands:
            self.wide[: len(narrow), :, band.out] = narrow[..., band.source] @ band.weights.t()
        if self.wide_slope is not None:
            self.wide_slope.zero_()

    def _of_strip(self, wide: Tensor, k: int) -> Tensor:
        """The rows of the open strip that block k depends on, (rows, channels x width)."""
        source = self.row_bands[k].source
        start = source.start - self.strip.start
        return wide[start : start + source.stop - source.start].flatten(1)


def _strips(sources: list[slice]) -> list[slice]:
    """For each of the blocks, from top to bottom, the strip of rows that holds its source."""
    strips: list[slice] = []
    first = 0
    for k, source in enumerate(sources):
        if k > first and source.stop - sources[first].start > ROWS_PER_STRIP:
            strips += [slice(sources[first].start, sources[k - 1].stop)] * (k - first)
            first = k
    return strips + [slice(sources[first].start, sources[-1].stop)] * (len(sources) - first)


def _heads(
    heads: list[Tensor],
    problem: Problem,
    dtype: torch.dtype,
    buffers: int,
    sloped: tuple[bool, bool],
) -> list[_Whole] | list[_Upsampled]:
    """Sources of the logits of one head, or of a head and its guide."""
    pairs = zip(heads, sloped, strict=False)
    upsampled = problem.size is not None
    room = UPSAMPLED_BYTES_PER_THREAD if upsampled else CACHE_BYTES_PER_THREAD
    elements = room * torch.get_num_threads() // (buffers * dtype.itemsize)
    if upsampled:
        ranges = [_range(z) if z.numel() else (0.0, 0.0) for z in heads]
        # In a band of several rows 0 times NaN would reach pixels that the NaN does not touch.
        banded = all(most < math.inf for _, most in ranges)
        clamped = problem.from_logits and not all(least >= LOWEST_LOGIT for least, _ in ranges)
        return [
            _Upsampled(z, problem, dtype, banded, clamped, elements, sloped) for z, sloped in pairs
        ]
    flat = all(is_flat(z.shape, z.stride()) for z in heads)
    return [_Whole(z, problem, dtype, flat, elements, sloped) for z, sloped in pairs]


def is_flat(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether the spatial dimensions of a tensor can be seen as one."""
    dims = [d for d in range(2, len(shape)) if shape[d] != 1]
    return all(strides[a] == strides[b] * shape[b] for a, b in pairwise(dims))


def _complete(x: Tensor, from_logits: bool) -> Tensor:
    """Fill in the second class of a problem given by its first: logit 0, or 1 - p."""
    if from_logits:
        x[:, 1] = 0
    else:
        torch.sub(1, x[:, 0], out=x[:, 1])
    return x


def _channels(slope: Tensor, binary: bool, from_logits: bool) -> Tensor:
    """The slope with respect to the channels that there are, given that of all classes."""
    if not binary:
        return slope
    return slope[:, :1] if from_logits else slope[:, :1] - slope[:, 1:]
