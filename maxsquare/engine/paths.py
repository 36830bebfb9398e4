"""Which path computes: the plain formula, or one that never holds full-resolution tensors."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import math
import warnings
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from maxsquare.engine import blocks, pixelwise
from maxsquare.engine.pixelwise import Problem


def choose_path(*tensors: Tensor | None) -> ModuleType | None:
    """The module whose `sweep` is made for these tensors; None for the plain formula.

    The plain formula is what compilers, function transforms and tensor subclasses can see
    through, and what runs where there is no faster path.
    """
    given = [tensor for tensor in tensors if tensor is not None]
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return None
    if any(type(tensor) not in (Tensor, torch.nn.Parameter) for tensor in given):
        return None
    device = given[0].device.type
    if device == "cpu":
        return blocks
    return _kernels() if device == "cuda" else None


@functools.cache
def _kernels() -> ModuleType | None:
    """The CUDA path, imported when it is first wanted; None where Triton is not, or fails."""
    if importlib.util.find_spec("triton") is None:
        return None
    try:
        kernels = importlib.import_module("maxsquare.engine.kernels")
        kernels.check_device()
    except Exception as error:
        # No compiler for its launcher, a GPU too old or not NVIDIA's, a version that differs.
        warnings.warn(
            f"maxsquare takes the slow path on this GPU, as Triton does not work: {error}",
            stacklevel=2,
        )
        return None
    return kernels


def accumulate(
    z: Tensor,
    problem: Problem,
    *,
    guide: Tensor | None = None,
    labels: Tensor | None = None,
    valid: Tensor | None = None,
    weigh: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """`pixelwise.accumulate` by the fastest path."""
    path = choose_path(z, guide, labels, valid)
    if path is None:
        return pixelwise.accumulate(
            z, problem, guide=guide, labels=labels, valid=valid, weigh=weigh
        )
    # A guide decides labels, which have no gradient.
    guide = None if guide is None else guide.detach()
    sloped = torch.is_grad_enabled() and z.requires_grad
    at_once = sloped and path.at_once(z, problem) and not (problem.by_class and weigh is None)
    sums, counts, _, _ = _Sweep.apply(z, guide, labels, valid, problem, path, False, weigh, at_once)
    return sums, counts


def accumulate_both(
    z: Tensor,
    problem: Problem,
    low: Tensor,
    guided: Problem,
    *,
    weigh: Callable[[Tensor], Tensor],
    valid: Tensor | None = None,
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """`accumulate` of a head z and of a low-level head that z guides, each by its problem.

    Sums and slopes of both come from one pass over the pixels, where a path has one.
    """
    path = choose_path(z, low, valid)
    sloped = torch.is_grad_enabled() and z.requires_grad and low.requires_grad
    able = path is not None and hasattr(path, "sweep_both") and path.at_once(z, problem)
    if able and sloped and z.dtype == low.dtype:
        sums, counts, low_sums, low_counts = _SweepBoth.apply(
            z, low, valid, problem, guided, path, weigh
        )
        return (sums, counts), (low_sums, low_counts)
    return (
        accumulate(z, problem, valid=valid, weigh=weigh),
        accumulate(low, guided, guide=z, valid=valid),
    )


def terms(
    z: Tensor,
    problem: Problem,
    *,
    guide: Tensor | None = None,
    labels: Tensor | None = None,
    valid: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`pixelwise.terms` by the fastest path."""
    path = choose_path(z, guide, labels, valid)
    if path is None:
        return pixelwise.terms(z, problem, guide=guide, labels=labels, valid=valid)
    guide = None if guide is None else guide.detach()
    _, _, y, phi = _Sweep.apply(z, guide, labels, valid, problem, path, True, None, False)
    if labels is not None:
        y = labels.long()
        y = torch.where(y == problem.ignore_index, -1, y)
    y = torch.zeros_like(phi, dtype=torch.long) if y is None else _widen(y)
    counted = y != -1 if valid is None else valid & (y != -1)
    return phi, y, counted


def predict(
    z: Tensor, problem: Problem, *, guide: Tensor | None = None, valid: Tensor | None = None
) -> Tensor:
    """`pixelwise.predict` by the fastest path."""
    path = choose_path(z, guide, valid)
    if path is None:
        return pixelwise.predict(z, problem, guide=guide, valid=valid)
    problem = problem._replace(potential=None)
    y = _widen(_sweep(path, z, problem, guide=guide, valid=valid).y)
    return y if valid is None else torch.where(valid, y, -1)


def _sweep(path: Any, z: Tensor, problem: Problem, **arguments: Any) -> Any:
    with _bare(z):
        return path.sweep(z.detach(), problem, **arguments)


@contextlib.contextmanager
def _bare(z: Tensor) -> Iterator[None]:
    # Autocast would interpolate in half precision.
    with torch.no_grad(), torch.autocast(z.device.type, enabled=False):
        yield


def _widen(y: Tensor) -> Tensor:
    """Narrow indices as int64."""
    wide = y.long()
    return torch.where(wide == 255, -1, wide) if y.dtype == torch.uint8 else wide


class _Sweep(torch.autograd.Function):
    """Sums and counts of bins, or the potential of every pixel; linear memory, deterministic.

    The slope is taken in the same pass as the sums if that is wanted (at_once), and the first
    backward pass gives it away as the gradient. Everywhere else, and in a second backward pass,
    it is computed in a pass of its own.
    """

    @staticmethod
    def forward(
        ctx: Any,
        z: Tensor,
        guide: Tensor | None,
        labels: Tensor | None,
        valid: Tensor | None,
        problem: Problem,
        path: Any,
        per_pixel: bool,
        weigh: Callable[[Tensor], Tensor] | None,
        at_once: bool,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        given = {"guide": guide, "labels": labels, "valid": valid}
        ctx.problem, ctx.path, ctx.per_pixel, ctx.weigh = problem, path, per_pixel, weigh
        known = _know(path, z, problem, given, weigh) if at_once else None
        if known is None:
            swept = _sweep(path, z, problem, **given, per_pixel=per_pixel)
        else:
            swept = _slope(path, z, problem, given, known.y, known.weights)
            swept = swept._replace(y=known.y)
            if known.counts is not None:
                swept, weigh = swept._replace(counts=known.counts), None
        weights = None
        if weigh is not None:
            weights = weigh(swept.counts)
            swept = swept._replace(sums=(weights * swept.sums).sum(1, keepdim=True))
        ctx.slope, swept_with = swept.slope, None if known is None else known.weights
        ctx.save_for_backward(z, guide, labels, valid, swept.y, swept_with, weights)
        ctx.mark_non_differentiable(*(t for t in (swept.counts, swept.y) if t is not None))
        return swept.sums, swept.counts, swept.y, swept.phi

    @staticmethod
    def backward(
        ctx: Any, sums_grad: Tensor, _counts: None, _y: None, phi_grad: Tensor
    ) -> tuple[Tensor | None, ...]:
        z, guide, labels, valid, y, swept_with, weights = ctx.saved_tensors
        problem, path = ctx.problem, ctx.path
        given = {"guide": guide, "labels": labels, "valid": valid}
        upstream = phi_grad if ctx.per_pixel else sums_grad
        slope, ctx.slope = ctx.slope, None
        if _wants_formula(upstream):
            differentiable = torch.is_grad_enabled()
            with torch.enable_grad():
                if ctx.per_pixel:
                    value = pixelwise.terms(z, problem, **given)[0]
                else:
                    value = pixelwise.accumulate(z, problem, **given, weigh=ctx.weigh)[0]
            (slope,) = torch.autograd.grad(value, z, upstream, create_graph=differentiable)
            return slope.to(z.dtype), *[None] * 8
        upstream = upstream if weights is None else upstream * weights
        if swept_with is None:
            slope = _slope(path, z, problem, given, y, upstream, ctx.per_pixel).slope
        else:
            if slope is None:
                slope = _slope(path, z, problem, given, y, swept_with).slope
            slope = _scale(slope, upstream, large=problem.size is None)
        return slope.to(z.dtype), *[None] * 8


def _wants_formula(upstream: Tensor) -> bool:
    """Whether a backward pass is to have a graph, or is given a batch of upstream gradients."""
    return torch.is_grad_enabled() or torch._C._functorch.is_legacy_batchedtensor(upstream)


class _Known(NamedTuple):
    """What is known of the bins before the pass that takes the slope.

    y: the predicted index of every pixel, where a pass has looked for it.
    counts: of the bins, with their weights; None, and ones, where that pass is to tell.
    """

    y: Tensor | None
    counts: Tensor | None
    weights: Tensor


def _know(
    path: Any,
    z: Tensor,
    problem: Problem,
    given: dict[str, Tensor | None],
    weigh: Callable[[Tensor], Tensor] | None,
) -> _Known:
    """What can be told of the bins without the potentials."""
    if problem.by_class:
        assert weigh is not None
        # Weights of classes come from counts: a look for the largest logits is enough.
        indices = _sweep(path, z, problem._replace(potential=None), **given)
        return _Known(indices.y, indices.counts, weigh(indices.counts))
    if weigh is None or problem.threshold is not None:
        return _Known(None, None, z.new_ones(len(z), 1))
    counted, labels = given["valid"], given["labels"]
    if labels is not None:
        # As int64: 255 in uint8 equals -1.
        labels = labels.long()
        labelled = (labels != -1) & (labels != problem.ignore_index)
        counted = labelled if counted is None else counted & labelled
    if counted is None:
        pixels = math.prod(z.shape[2:] if problem.size is None else problem.size)
        counts = torch.full((len(z), 1), pixels, device=z.device)
    elif z.device.type != "cpu":
        counts = counted.flatten(1).sum(1, keepdim=True)
    else:
        # A sum of all images at once would hold int64 copies of their maps.
        counts = torch.zeros(len(z), 1, dtype=torch.long, device=z.device)
        for count, image in zip(counts, counted, strict=True):
            count += image.count_nonzero()
    return _Known(None, counts, weigh(counts))


def _slope(
    path: Any,
    z: Tensor,
    problem: Problem,
    given: dict[str, Tensor | None],
    y: Tensor | None,
    weights: Tensor,
    per_pixel: bool = False,
) -> Any:
    """The pass that takes the slope; y: every index, ties included, if a pass has decided them."""
    problem, given = _decided(problem, y, given)
    return _sweep(path, z, problem, **given, weights=weights, per_pixel=per_pixel)


def _scale(slope: Tensor, upstream: Tensor, large: bool) -> Tensor:
    """The slope times the upstream gradient (N, 1); a large one in its own place."""
    if not large:
        return slope * upstream.view(-1, *[1] * (slope.dim() - 1))
    # By a number: a tensor of another dtype would have the whole slope cast to and fro.
    for image, factor in zip(slope, upstream.flatten().tolist(), strict=True):
        # Often one: the weights include every factor of the loss itself.
        if factor != 1:
            image.mul_(factor)
    return slope


class _SweepBoth(torch.autograd.Function):
    """`_Sweep` of two heads, one guided by the other, at once."""

    @staticmethod
    def forward(
        ctx: Any,
        z: Tensor,
        low: Tensor,
        valid: Tensor | None,
        problem: Problem,
        guided: Problem,
        path: Any,
        weigh: Callable[[Tensor], Tensor],
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        ctx.problem, ctx.guided, ctx.path, ctx.weigh = problem, guided, path, weigh
        known = _know(path, z, problem, {"valid": valid, "labels": None}, weigh)
        swept, low_swept = _slopes(path, z, problem, low, guided, valid, known)
        ctx.slopes = swept.slope, low_swept.slope
        ctx.save_for_backward(z, low, valid, *known)
        ctx.mark_non_differentiable(swept.counts, low_swept.counts)
        return swept.sums, swept.counts, low_swept.sums, low_swept.counts

    @staticmethod
    def backward(
        ctx: Any, grad: Tensor, _counts: None, low_grad: Tensor, _low_counts: None
    ) -> tuple[Tensor | None, ...]:
        z, low, valid, *known = ctx.saved_tensors
        slopes, ctx.slopes = ctx.slopes, None
        if _wants_formula(grad):
            differentiable = torch.is_grad_enabled()
            with torch.enable_grad():
                sums, _ = pixelwise.accumulate(z, ctx.problem, valid=valid, weigh=ctx.weigh)
                low_sums, _ = pixelwise.accumulate(low, ctx.guided, guide=z, valid=valid)
            slope, low_slope = torch.autograd.grad(
                (sums, low_sums), (z, low), (grad, low_grad), create_graph=differentiable
            )
        else:
            if slopes is None:
                both = _slopes(ctx.path, z, ctx.problem, low, ctx.guided, valid, _Known(*known))
                slopes = both[0].slope, both[1].slope
            large = ctx.problem.size is None
            slope, low_slope = _scale(slopes[0], grad, large), _scale(slopes[1], low_grad, large)
        return slope.to(z.dtype), low_slope.to(low.dtype), None, None, None, None, None


def _slopes(
    path: Any,
    z: Tensor,
    problem: Problem,
    low: Tensor,
    guided: Problem,
    valid: Tensor | None,
    known: _Known,
) -> Any:
    """The pass that takes the slopes of two heads."""
    problem, _ = _decided(problem, known.y, {"valid": valid})
    own = path.Own(problem, known.y, known.counts, known.weights)
    with _bare(z):
        return path.sweep_both(
            z.detach(), own, low.detach(), guided, valid=valid, weights=z.new_ones(len(z), 1)
        )


def _decided(
    problem: Problem, y: Tensor | None, given: dict[str, Tensor | None]
) -> tuple[Problem, dict[str, Tensor | None]]:
    """The problem and its tensors when a sweep has decided every index, ties included."""
    if y is None:
        return problem, given
    problem = problem._replace(ignore_index=255 if y.dtype == torch.uint8 else -1)
    return problem, {"labels": y, "valid": given["valid"]}
