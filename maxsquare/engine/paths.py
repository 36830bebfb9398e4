"""Which path computes: the plain formula, or one that never holds full-resolution tensors."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

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
    """The CUDA path, imported when it is first wanted; None without Triton."""
    if importlib.util.find_spec("triton") is None:
        return None
    return importlib.import_module("maxsquare.engine.kernels")


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
    sums, counts, _, _ = _Sweep.apply(z, guide, labels, valid, problem, path, False, weigh)
    return sums, counts


def accumulate_both(
    z: Tensor,
    problem: Problem,
    low: Tensor,
    guided: Problem,
    *,
    valid: Tensor | None = None,
    weigh: Callable[[Tensor], Tensor] | None = None,
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """`accumulate` of a head z and of a low-level head that z guides, each by its problem.

    If upsampled, both take value and slope from one pass over the pixels, where a path has one.
    """
    path = choose_path(z, low, valid)
    sloped = torch.is_grad_enabled() and z.requires_grad and low.requires_grad
    alike = problem.size is not None and z.dtype == low.dtype
    if hasattr(path, "sweep_both") and sloped and alike:
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
    _, _, y, phi = _Sweep.apply(z, guide, labels, valid, problem, path, True, None)
    if labels is not None:
        y = torch.where(labels == problem.ignore_index, -1, labels.long())
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

    Without upsampling the slope is recomputed in the backward pass: a slope stored would be as
    large as the logits. Upsampled logits are small, and so is their slope: it is taken in the
    same pass as the sums as soon as the weights of the bins are known. Those of classes come
    from counts, for which a pass that only looks for the largest logits is enough.
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
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        given = {"guide": guide, "labels": labels, "valid": valid}
        ctx.problem, ctx.path, ctx.per_pixel, ctx.weigh = problem, path, per_pixel, weigh
        weights, pass_over = None, functools.partial(_sweep, path, z)
        at_once = problem.size is not None and not per_pixel and ctx.needs_input_grad[0]
        if at_once and weigh is not None:
            indices = pass_over(problem._replace(potential=None), **given)
            weights = weigh(indices.counts)
            decided, given = _decided(problem, indices.y, given)
            swept = pass_over(decided, **given, weights=weights)._replace(counts=indices.counts)
        elif at_once and not problem.by_class:
            swept = pass_over(problem, **given, weights=z.new_ones(len(z), 1))
        else:
            swept = pass_over(problem, **given, per_pixel=per_pixel)
            if weigh is not None:
                weights = weigh(swept.counts)
                swept = swept._replace(sums=(weights * swept.sums).sum(1, keepdim=True))
        ctx.save_for_backward(z, guide, labels, valid, swept.y, weights, swept.slope)
        ctx.mark_non_differentiable(*(t for t in (swept.counts, swept.y) if t is not None))
        return swept.sums, swept.counts, swept.y, swept.phi

    @staticmethod
    def backward(
        ctx: Any, sums_grad: Tensor, _counts: None, _y: None, phi_grad: Tensor
    ) -> tuple[Tensor | None, ...]:
        z, guide, labels, valid, y, weights, slope = ctx.saved_tensors
        problem = ctx.problem
        upstream = phi_grad if ctx.per_pixel else sums_grad
        if torch.is_grad_enabled():
            # A graph of the gradient is wanted: the plain formula has one.
            given = {"guide": guide, "labels": labels, "valid": valid}
            if ctx.per_pixel:
                value = pixelwise.terms(z, problem, **given)[0]
            else:
                value = pixelwise.accumulate(z, problem, **given, weigh=ctx.weigh)[0]
            (slope,) = torch.autograd.grad(value, z, upstream, create_graph=True)
        elif slope is not None:
            slope = slope * upstream.view(-1, *[1] * (z.dim() - 1))
        else:
            given = {"guide": guide, "labels": labels, "valid": valid}
            problem, given = _decided(problem, y, given)
            slope = _sweep(
                ctx.path,
                z,
                problem,
                **given,
                weights=upstream if weights is None else upstream * weights,
                per_pixel=ctx.per_pixel,
            ).slope
        return slope.to(z.dtype), None, None, None, None, None, None, None


class _SweepBoth(torch.autograd.Function):
    """`_Sweep` of two heads with upsampling, one guided by the other, in one pass."""

    @staticmethod
    def forward(
        ctx: Any,
        z: Tensor,
        low: Tensor,
        valid: Tensor | None,
        problem: Problem,
        guided: Problem,
        path: Any,
        weigh: Callable[[Tensor], Tensor] | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        y, counts, weights = None, None, z.new_ones(len(z), 1)
        if weigh is not None:
            indices = _sweep(path, z, problem._replace(potential=None), valid=valid)
            y, counts, weights = indices.y, indices.counts, weigh(indices.counts)
        own, _ = _decided(problem, y, {"valid": valid})
        with _bare(z):
            swept, low_swept = path.sweep_both(
                z.detach(),
                path.Own(own, y, weights),
                low.detach(),
                guided,
                valid=valid,
                weights=z.new_ones(len(z), 1),
            )
        counts = swept.counts if counts is None else counts
        ctx.save_for_backward(z, low, valid, swept.slope, low_swept.slope)
        ctx.problem, ctx.guided, ctx.weigh = problem, guided, weigh
        ctx.mark_non_differentiable(counts, low_swept.counts)
        return swept.sums, counts, low_swept.sums, low_swept.counts

    @staticmethod
    def backward(
        ctx: Any, grad: Tensor, _counts: None, low_grad: Tensor, _low_counts: None
    ) -> tuple[Tensor | None, ...]:
        z, low, valid, slope, low_slope = ctx.saved_tensors
        if torch.is_grad_enabled():
            # A graph of the gradient is wanted: the plain formula has one.
            sums, _ = pixelwise.accumulate(z, ctx.problem, valid=valid, weigh=ctx.weigh)
            low_sums, _ = pixelwise.accumulate(low, ctx.guided, guide=z, valid=valid)
            slope, low_slope = torch.autograd.grad(
                (sums, low_sums), (z, low), (grad, low_grad), create_graph=True
            )
        else:
            slope, low_slope = (
                s * g.view(-1, *[1] * (z.dim() - 1))
                for s, g in ((slope, grad), (low_slope, low_grad))
            )
        return slope.to(z.dtype), low_slope.to(low.dtype), None, None, None, None, None


def _decided(
    problem: Problem, y: Tensor | None, given: dict[str, Tensor | None]
) -> tuple[Problem, dict[str, Tensor | None]]:
    """The problem and its tensors when a sweep has decided every index, ties included."""
    if y is None:
        return problem, given
    problem = problem._replace(ignore_index=255 if y.dtype == torch.uint8 else -1)
    return problem, {"labels": y, "valid": given["valid"]}
