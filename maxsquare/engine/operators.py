"""The two operators that every loss is made of, and which kernels compute them.

    y, counts = classify(z, ...)          the class of every pixel, how many of each per image
    sums = weighted_sum(z, weights, ...)  sum of w[n, y] phi(p) over the pixels of every image

They are registered with PyTorch: compilers and exporters keep them as they are, and function
transforms find a rule for each. Images are independent, so a dimension that is mapped over joins
them.

The slope of an upsampled loss is small, and its exponentials are expensive: value and slope come
from one pass, and the upstream gradient scales the slope. At full resolution the slope is large,
and scaling it is expensive: it is computed in the backward pass, the upstream gradient within
the weights.

That multiplication is registered too. By PyTorch's own, its OpenMP threads would wake, and spin
for milliseconds on the cores that the next kernel needs (measured on two: 8 ms instead of 5).
"""

from __future__ import annotations

import functools
import importlib
import inspect
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from maxsquare.engine import cpu, plain
from maxsquare.engine.libraries import library
from maxsquare.engine.plain import accumulation_dtype, index_dtype, number_of_classes
from maxsquare.potentials import Label, Potential, Tsallis

torch.library.define(
    "maxsquare::classify",
    "(Tensor z, Tensor? guide, Tensor? labels, Tensor? valid, SymInt? height, SymInt? width, "
    "bool align_corners, bool binary, float? threshold, int ignore_index) "
    "-> (Tensor y, Tensor counts)",
)
torch.library.define(
    "maxsquare::weighted_sum",
    "(Tensor z, Tensor weights, Tensor? y, Tensor? valid, float? q, float offset, "
    "SymInt? height, SymInt? width, bool align_corners, bool binary, bool with_slope) "
    "-> (Tensor sums, Tensor slope)",
)
torch.library.define("maxsquare::scale", "(Tensor slope, Tensor factors, Tensor z) -> Tensor")

# Function transforms take options apart that are not numbers, so operators have numbers only.


def potential_of(q: float | None, offset: float) -> Potential:
    """The potential of an operator's options."""
    return Label() if q is None else Tsallis(q, offset)


def size_of(height: int | None, width: int | None) -> tuple[int, int] | None:
    """The size to which logits are upsampled, if they are."""
    return None if height is None or width is None else (height, width)


# Which device runs what ---------------------------------------------------------------------------


def kernels_for(z: Tensor) -> ModuleType | None:
    """The kernels for logits on their device; None: the plain formula."""
    if z.device.type == "cpu":
        return cpu if library(accumulation_dtype(z.dtype)) else None
    return cuda_kernels(z.device) if z.device.type == "cuda" else None


def cuda_kernels(device: torch.device) -> ModuleType | None:
    """The CUDA kernels, if they give what the plain formula gives on this device."""
    if device not in _CHECKED_KERNELS:
        # The check waits for the device, which a graph that is being captured must not.
        if torch.cuda.is_current_stream_capturing():
            return None
        _CHECKED_KERNELS[device] = check_cuda_kernels(device)
    return _CHECKED_KERNELS[device]


# Of each device, once it was checked.
_CHECKED_KERNELS: dict[torch.device, ModuleType | None] = {}


def check_cuda_kernels(device: torch.device) -> ModuleType | None:
    """The CUDA kernels, or None and a warning."""
    try:
        kernels = importlib.import_module("maxsquare.engine.cuda")
        with torch.cuda.device(device):
            kernels.check(device)
    except Exception as error:
        # No Triton, no compiler for its launcher, a GPU too old or not NVIDIA's, another version.
        warnings.warn(
            f"maxsquare computes slowly on {device}, as its Triton kernels do not work: {error}",
            stacklevel=2,
        )
        return None
    return kernels


@torch.library.impl("maxsquare::classify", "default")
def _classify(
    z: Tensor,
    guide: Tensor | None,
    labels: Tensor | None,
    valid: Tensor | None,
    height: int | None,
    width: int | None,
    *options: Any,
) -> tuple[Tensor, Tensor]:
    kernels = kernels_for(z) or plain
    y, counts = kernels.classify(z, guide, labels, valid, size_of(height, width), *options)
    return y, counts


@torch.library.impl("maxsquare::weighted_sum", "default")
def _weighted_sum(
    z: Tensor,
    weights: Tensor,
    y: Tensor | None,
    valid: Tensor | None,
    q: float | None,
    offset: float,
    height: int | None,
    width: int | None,
    align_corners: bool,
    binary: bool,
    with_slope: bool,
) -> tuple[Tensor, Tensor]:
    kernels = kernels_for(z) or plain
    sums, slope = kernels.weighted_sum_and_slope(
        *(z, weights, y, valid, potential_of(q, offset)),
        *(size_of(height, width), align_corners, binary, with_slope),
    )
    return sums, z.new_empty((len(z), 0)) if slope is None else slope


@torch.library.impl("maxsquare::scale", "default")
def _scale(slope: Tensor, factors: Tensor, z: Tensor) -> Tensor:
    """The gradient by z, of which a compiler is to know that it depends on z."""
    if kernels_for(slope) is cpu:
        return cpu.scale(slope, factors, z.dtype)
    return (slope * factors.view(-1, *[1] * (slope.dim() - 1))).to(z.dtype)


# Shapes -------------------------------------------------------------------------------------------


@torch.library.register_fake("maxsquare::classify")  # type: ignore[untyped-decorator]
def _classify_shapes(
    z: Tensor,
    guide: Tensor | None,
    labels: Tensor | None,
    valid: Tensor | None,
    height: int | None,
    width: int | None,
    align_corners: bool,
    binary: bool,
    *_: Any,
) -> tuple[Tensor, Tensor]:
    classes = number_of_classes(z, binary)
    spatial = size_of(height, width) or z.shape[2:]
    y = z.new_empty((z.shape[0], *spatial), dtype=index_dtype(classes))
    return y, z.new_empty((z.shape[0], classes + 1), dtype=torch.long)


@torch.library.register_fake("maxsquare::weighted_sum")  # type: ignore[untyped-decorator]
def _weighted_sum_shapes(z: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    *_, height, _width, _align_corners, _binary, with_slope = arguments
    dtype = accumulation_dtype(z.dtype)
    slope = z.new_empty((z.shape[0], 0))
    if with_slope:
        slope = torch.empty_like(z) if height is None else z.new_empty(z.shape, dtype=dtype)
    return z.new_empty(z.shape[0], dtype=dtype), slope


@torch.library.register_fake("maxsquare::scale")  # type: ignore[untyped-decorator]
def _scale_shapes(slope: Tensor, factors: Tensor, z: Tensor) -> Tensor:
    return torch.empty_like(slope, dtype=z.dtype, memory_format=torch.contiguous_format)


# Function transforms ------------------------------------------------------------------------------


def _over_joined_images(operator: Any) -> Any:
    """The rule by which an operator is mapped over a dimension."""

    def rule(info: Any, dims: tuple[int | None, ...], *arguments: Any) -> Any:
        def join(tensor: Tensor, dim: int | None) -> Tensor:
            if dim is None:
                return tensor.expand(info.batch_size, *tensor.shape).flatten(0, 1)
            return tensor.movedim(dim, 0).flatten(0, 1)

        joined = [
            join(argument, dim) if isinstance(argument, Tensor) else argument
            for argument, dim in zip(arguments, dims, strict=True)
        ]
        results = operator(*joined)
        if isinstance(results, Tensor):
            return results.view(info.batch_size, -1, *results.shape[1:]), 0
        return tuple(r.unflatten(0, (info.batch_size, -1)) for r in results), (0, 0)

    return rule


for _name in ("classify", "weighted_sum", "scale"):
    _operator = getattr(torch.ops.maxsquare, _name)
    torch.library.register_vmap(f"maxsquare::{_name}", _over_joined_images(_operator))


# Derivatives --------------------------------------------------------------------------------------


def _with_signature(function: type[torch.autograd.Function]) -> type[torch.autograd.Function]:
    """Spare every call of a function to inspect the signature of its forward."""
    function.forward.__signature__ = inspect.signature(function.forward)  # type: ignore[attr-defined]
    return function


@_with_signature
class _WeightedSum(torch.autograd.Function):
    """The operator `weighted_sum`, with the derivatives of the sums by z."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor]:
        sums, slope = torch.ops.maxsquare.weighted_sum(*inputs)
        return sums, slope

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        tensors, ctx.options = inputs[:4], inputs[4:]
        _, slope = output
        ctx.mark_non_differentiable(slope)
        # Else the slope, which has no gradient, would get one of zeros.
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, slope)
        ctx.save_for_forward(*tensors, slope)

    @staticmethod
    def backward(ctx: Any, sums_grad: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
        gradient = None
        if sums_grad is not None:
            gradient = _Gradient.apply(sums_grad, *ctx.saved_tensors, *ctx.options)
        return gradient, *[None] * (3 + len(ctx.options))

    @staticmethod
    def jvp(ctx: Any, z_tangent: Tensor, *_: Any) -> tuple[Tensor, None]:
        z, *rest = ctx.saved_tensors
        ones = z.new_ones(z.shape[0], dtype=accumulation_dtype(z.dtype))
        gradient = _Gradient.apply(ones, z, *rest, *ctx.options)
        return (gradient * z_tangent).flatten(1).sum(1, dtype=ones.dtype), None


# Of the operator itself, as compiled and exported programs call it: first derivatives alone.
torch.library.register_autograd(
    "maxsquare::weighted_sum", _WeightedSum.backward, setup_context=_WeightedSum.setup_context
)


def _gradient(
    sums_grad: Tensor,
    z: Tensor,
    weights: Tensor,
    y: Tensor | None,
    valid: Tensor | None,
    slope: Tensor,
    *options: Any,
) -> Tensor:
    """The gradient by z; slope: of the sums, if the pass that made them took it (with_slope)."""
    *rest, with_slope = options
    if with_slope:
        gradient: Tensor = torch.ops.maxsquare.scale(slope, sums_grad, z)
        return gradient
    weights = weights * sums_grad.unsqueeze(1)
    _, gradient = torch.ops.maxsquare.weighted_sum(z, weights, y, valid, *rest, True)
    return gradient.to(z.dtype)


@_with_signature
class _Gradient(torch.autograd.Function):
    """`_gradient`; its own derivatives are those of the plain formula."""

    generate_vmap_rule = True
    forward = staticmethod(_gradient)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        tensors, ctx.options = inputs[:5], inputs[6:-1]
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        sums_grad, z, *rest = ctx.saved_tensors
        formula = _formula_gradient(*rest, *ctx.options)
        backward = torch.func.vjp(formula, sums_grad, z)[1]
        return *backward(upstream), *[None] * (5 + len(ctx.options))

    @staticmethod
    def jvp(
        ctx: Any, sums_grad_tangent: Tensor | None, z_tangent: Tensor | None, *_: Any
    ) -> Tensor:
        sums_grad, z, *rest = ctx.saved_tensors
        formula = _formula_gradient(*rest, *ctx.options)
        tangent = torch.zeros_like(z)
        if sums_grad_tangent is not None:  # the gradient is linear in sums_grad
            tangent = tangent + formula(sums_grad_tangent, z)
        if z_tangent is not None:  # second derivatives are symmetric
            backward = torch.func.vjp(functools.partial(formula, sums_grad), z)[1]
            tangent = tangent + backward(z_tangent)[0]
        return tangent


def _formula_gradient(
    weights: Tensor,
    y: Tensor | None,
    valid: Tensor | None,
    q: float | None,
    offset: float,
    height: int | None,
    width: int | None,
    *options: Any,
) -> Callable[[Tensor, Tensor], Tensor]:
    """`_gradient` by the plain formula: (sums_grad, z) -> gradient."""
    potential, size = potential_of(q, offset), size_of(height, width)
    arguments = (weights, y, valid, potential, size, *options)

    def gradient(sums_grad: Tensor, z: Tensor) -> Tensor:
        backward = torch.func.vjp(lambda z: plain.weighted_sum(z, *arguments), z)[1]
        result: Tensor = backward(sums_grad)[0]
        return result

    return gradient


# Calls --------------------------------------------------------------------------------------------


def can_call(z: Tensor, from_logits: bool) -> bool:
    """Whether an operator takes this: not probabilities, nor a tensor that dispatches by itself."""
    ordinary = type(z).__torch_dispatch__ is Tensor.__torch_dispatch__
    return from_logits and (ordinary or torch.compiler.is_compiling())


def classify(
    z: Tensor,
    guide: Tensor | None = None,
    labels: Tensor | None = None,
    valid: Tensor | None = None,
    *,
    size: tuple[int, int] | None,
    align_corners: bool,
    binary: bool,
    from_logits: bool,
    threshold: float | None = None,
    ignore_index: int = -1,
) -> tuple[Tensor, Tensor]:
    """`plain.classify` by the fastest path."""
    height, width = size or (None, None)
    tensors = (z.detach(), None if guide is None else guide.detach(), labels, valid)
    if not can_call(z, from_logits):
        return plain.classify(
            *tensors, size, align_corners, binary, threshold, ignore_index, from_logits
        )
    y, counts = torch.ops.maxsquare.classify(
        *tensors, height, width, align_corners, binary, threshold, ignore_index
    )
    return y, counts


def weighted_sum(
    z: Tensor,
    weights: Tensor,
    y: Tensor | None,
    valid: Tensor | None,
    potential: Potential,
    *,
    size: tuple[int, int] | None,
    align_corners: bool,
    binary: bool,
    from_logits: bool,
) -> Tensor:
    """`plain.weighted_sum` by the fastest path."""
    compiling = torch.compiler.is_compiling()
    # Of a transform within what it compiles, the compiler would drop the operator's derivatives.
    within_transform = compiling and torch._C._are_functorch_transforms_active()
    if within_transform or not can_call(z, from_logits):
        how = (size, align_corners, binary, from_logits)
        return plain.weighted_sum(z, weights, y, valid, potential, *how)
    q, offset = (None, 0.0) if isinstance(potential, Label) else (potential.q, potential.offset)
    height, width = size or (None, None)
    with_slope = size is not None and torch.is_grad_enabled() and z.requires_grad
    call = torch.ops.maxsquare.weighted_sum if compiling else _WeightedSum.apply
    options = (q, offset, height, width, align_corners, binary, with_slope)
    sums: Tensor = call(z, weights, y, valid, *options)[0]
    return sums
