"""The operators that every loss is made of, and the choice of kernels that compute them.

    y, counts = classify(z, ...)          the class of every pixel, how many of each per image
    sums = weighted_sum(z, weights, ...)  sum of w[n, y] phi(p) over the pixels of every image
    sums = class_sums(z, ...)             sum of p_c over the pixels of every image

They are registered with PyTorch, so that compilers and exporters keep them whole. Eager calls go
through an autograd.Function, which defines all derivatives, directly to the kernels. Images are
independent, so vmap merges its dimension with theirs. If a device has no kernels, the plain formula
takes their place, and autograd and compilers see ordinary PyTorch.

The gradient of an upsampled loss is small, but its exponentials are expensive: one pass computes
value and gradient, and the backward pass scales the gradient. At full resolution the gradient is
large, so scaling it is expensive: the backward pass computes it, with the upstream gradient
multiplied into the weights.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor, is_legacy_batchedtensor
from torch.autograd import forward_ad

from maxsquare.engine import cpu, plain
from maxsquare.engine.libraries import library
from maxsquare.engine.plain import LogitsSpec, accumulation_dtype, index_dtype
from maxsquare.potentials import Linear, Potential, numbers_of, potential_of

# Function transforms flatten other objects, so operators take only tensors and numbers.
SPEC = "SymInt? height, SymInt? width, bool align_corners, bool binary"
torch.library.define(
    "maxsquare::classify",
    f"(Tensor z, Tensor? guide, Tensor? labels, Tensor? valid, {SPEC}, float? threshold, "
    "int ignore_index) -> (Tensor y, Tensor counts)",
)
torch.library.define(
    "maxsquare::weighted_sum",
    f"(Tensor z, Tensor weights, Tensor? y, Tensor? valid, {SPEC}, int kind, float q, "
    "float offset, bool needs_grad) -> (Tensor sums, Tensor grad)",
)
torch.library.define("maxsquare::class_sums", f"(Tensor z, Tensor? valid, {SPEC}) -> Tensor")
torch.library.define("maxsquare::scale_grad", "(Tensor grad, Tensor factors, Tensor z) -> Tensor")
OPERATORS = torch.ops.maxsquare


def spec_numbers(spec: LogitsSpec) -> tuple[Any, ...]:
    """A spec as the options of an operator."""
    return *(spec.size or (None, None)), spec.align_corners, spec.binary


def spec_of(height: int | None, width: int | None, *flags: bool) -> LogitsSpec:
    """The inverse of `spec_numbers`."""
    return LogitsSpec(None if height is None or width is None else (height, width), *flags)


# Which device runs what ---------------------------------------------------------------------------


def kernels_for(z: Tensor) -> ModuleType | None:
    """The kernels for the device and dtype of z; None: the plain formula."""
    key = z.device, z.dtype
    if key not in _KERNELS:
        _KERNELS[key] = _find_kernels(*key)
    return _KERNELS[key]


_KERNELS: dict[tuple[torch.device, torch.dtype], ModuleType | None] = {}


def _find_kernels(device: torch.device, dtype: torch.dtype) -> ModuleType | None:
    if device.type == "cpu":
        return cpu if library(accumulation_dtype(dtype)) else None
    return cuda_kernels(device) if device.type == "cuda" else None


def cuda_kernels(device: torch.device) -> ModuleType | None:
    """The CUDA kernels, or None if they do not work on this device."""
    if device not in _CHECKED_KERNELS:
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "a CUDA graph can capture a loss of maxsquare after its first call, "
                "which checks and compiles the kernels: call the loss once before the capture"
            )
        _CHECKED_KERNELS[device] = check_cuda_kernels(device)
    return _CHECKED_KERNELS[device]


# The result of the check of each device.
_CHECKED_KERNELS: dict[torch.device, ModuleType | None] = {}

# These failures do not come from the kernels: the call raises them, and the next call checks again.
# AcceleratorError, an asynchronous CUDA error, exists since PyTorch 2.8.
_OTHER_FAILURES = (
    MemoryError,
    OSError,
    torch.OutOfMemoryError,
    getattr(torch, "AcceleratorError", MemoryError),
)


def check_cuda_kernels(device: torch.device) -> ModuleType | None:
    """The CUDA kernels if they agree with the plain formula; otherwise None, after a warning."""
    try:
        kernels = importlib.import_module("maxsquare.engine.cuda")
        # On a GPU inference mode spoils the gradient of the plain formula, which is the judge.
        with torch.cuda.device(device), torch.inference_mode(False):
            kernels.check(device)
    except _OTHER_FAILURES:
        raise
    except Exception as error:
        # Triton or a compiler is missing, a version does not fit, or the GPU is not supported.
        warnings.warn(
            f"maxsquare computes slowly on {device}, as its Triton kernels do not work: {error}",
            stacklevel=2,
        )
        return None
    return kernels


def _has_kernels(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a device has kernels for a dtype, as a constant for compilers."""
    return kernels_for(torch.empty(0, dtype=dtype, device=device)) is not None


# As torch.compiler.assume_constant_result does, which would also import the compiler.
_has_kernels._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _is_transformed(tensor: Tensor) -> bool:
    """Whether a dispatch mode, a function transform or forward mode must see the operators."""
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or is_functorch_wrapped_tensor(tensor)
        or is_legacy_batchedtensor(tensor)
    )


# Operators ----------------------------------------------------------------------------------------


@torch.library.impl("maxsquare::classify", "default")
def _classify(
    z: Tensor, guide: Tensor | None, labels: Tensor | None, valid: Tensor | None, *numbers: Any
) -> tuple[Tensor, Tensor]:
    *spec, threshold, ignore_index = numbers
    kernels = kernels_for(z) or plain
    y, counts = kernels.classify(z, guide, labels, valid, spec_of(*spec), threshold, ignore_index)
    return y.to(index_dtype(counts.shape[1] - 1)), counts


@torch.library.impl("maxsquare::weighted_sum", "default")
def _weighted_sum(
    z: Tensor, weights: Tensor, y: Tensor | None, valid: Tensor | None, *numbers: Any
) -> tuple[Tensor, Tensor]:
    *spec, kind, q, offset, needs_grad = numbers
    kernels, potential = kernels_for(z) or plain, potential_of(kind, q, offset)
    sums, grad = kernels.weighted_sum(z, weights, y, valid, potential, spec_of(*spec), needs_grad)
    return sums, z.new_empty((len(z), 0)) if grad is None else grad


@torch.library.impl("maxsquare::class_sums", "default")
def _class_sums(z: Tensor, valid: Tensor | None, *spec: Any) -> Tensor:
    kernels = kernels_for(z) or plain
    sums: Tensor = kernels.class_sums(z, valid, spec_of(*spec))
    return sums


def _scale_grad(grad: Tensor, factors: Tensor, z: Tensor) -> Tensor:
    """Scale the gradient of each image; z is passed so that compilers see the dependency."""
    # PyTorch's multiplication would wake OpenMP threads, which then spin for milliseconds on the
    # cores that the next kernel needs (on two cores: 8 ms instead of 5).
    if kernels_for(grad) is cpu:
        return cpu.scale_grad(grad, factors, z.dtype)
    return (grad * factors.view(-1, *[1] * (grad.dim() - 1))).to(z.dtype)


torch.library.impl("maxsquare::scale_grad", "default", _scale_grad)


# Shapes -------------------------------------------------------------------------------------------


@torch.library.register_fake("maxsquare::classify")  # type: ignore[untyped-decorator]
def _classify_shapes(
    z: Tensor, guide: Tensor | None, labels: Tensor | None, valid: Tensor | None, *numbers: Any
) -> tuple[Tensor, Tensor]:
    spec = spec_of(*numbers[:4])
    classes = spec.classes(z)
    y = z.new_empty((z.shape[0], *spec.spatial(z)), dtype=index_dtype(classes))
    return y, z.new_empty((z.shape[0], classes + 1), dtype=torch.long)


@torch.library.register_fake("maxsquare::weighted_sum")  # type: ignore[untyped-decorator]
def _weighted_sum_shapes(
    z: Tensor, weights: Tensor, y: Tensor | None, valid: Tensor | None, *numbers: Any
) -> tuple[Tensor, Tensor]:
    height, *_, needs_grad = numbers
    dtype = accumulation_dtype(z.dtype)
    grad = z.new_empty((z.shape[0], 0))
    if needs_grad:
        grad = torch.empty_like(z) if height is None else z.new_empty(z.shape, dtype=dtype)
    return z.new_empty(z.shape[0], dtype=dtype), grad


@torch.library.register_fake("maxsquare::class_sums")  # type: ignore[untyped-decorator]
def _class_sums_shapes(z: Tensor, valid: Tensor | None, *numbers: Any) -> Tensor:
    classes = spec_of(*numbers).classes(z)
    return z.new_empty((z.shape[0], classes), dtype=accumulation_dtype(z.dtype))


@torch.library.register_fake("maxsquare::scale_grad")  # type: ignore[untyped-decorator]
def _scale_grad_shapes(grad: Tensor, factors: Tensor, z: Tensor) -> Tensor:
    return torch.empty_like(grad, dtype=z.dtype, memory_format=torch.contiguous_format)


# Function transforms ------------------------------------------------------------------------------


def _over_joined_images(function: Callable[..., Any]) -> Callable[..., Any]:
    """The vmap rule of a function of images: the mapped dimension merges with theirs."""

    def rule(info: Any, dims: tuple[int | None, ...], *arguments: Any) -> Any:
        def join(tensor: Tensor, dim: int | None) -> Tensor:
            if dim is None:
                return tensor.expand(info.batch_size, *tensor.shape).flatten(0, 1)
            return tensor.movedim(dim, 0).flatten(0, 1)

        joined = [
            join(argument, dim) if isinstance(argument, Tensor) else argument
            for argument, dim in zip(arguments, dims, strict=True)
        ]

        def split(result: Tensor) -> Tensor:
            images = result.shape[0] // info.batch_size
            return result.view(info.batch_size, images, *result.shape[1:])

        results = function(*joined)
        if isinstance(results, Tensor):
            return split(results), 0
        return tuple(map(split, results)), (0,) * len(results)

    return rule


for _name in ("classify", "weighted_sum", "class_sums", "scale_grad"):
    _operator = getattr(OPERATORS, _name)
    torch.library.register_vmap(f"maxsquare::{_name}", _over_joined_images(_operator))


# Derivatives --------------------------------------------------------------------------------------


class _WeightedSum(torch.autograd.Function):
    """The sum over all images, for eager calls.

    It has no setup_context: for that, PyTorch inspects the signature of forward at every call.
    """

    @staticmethod
    def forward(
        ctx: Any,
        z: Tensor,
        weights: Tensor,
        y: Tensor | None,
        valid: Tensor | None,
        potential: Potential,
        spec: LogitsSpec,
        needs_grad: bool,
    ) -> Tensor:
        kernels: Any = kernels_for(z)
        parts, grad = kernels.weighted_parts(z, weights, y, valid, potential, spec, needs_grad)
        ctx.potential, ctx.spec, ctx.needs_grad = potential, spec, needs_grad
        ctx.save_for_backward(z, weights, y, valid, grad)
        total: Tensor = parts.view(()) if parts.numel() == 1 else parts.sum()
        return total

    @staticmethod
    def backward(ctx: Any, total_grad: Tensor) -> tuple[Tensor | None, ...]:
        options: Any = (ctx.potential, ctx.spec, ctx.needs_grad)
        return _gradient(total_grad, *ctx.saved_tensors, *options), *[None] * 6


class _TransformedWeightedSum(torch.autograd.Function):
    """The sums of images and their gradient, which is empty if not needed, for transforms."""

    @staticmethod
    def forward(
        z: Tensor,
        weights: Tensor,
        y: Tensor | None,
        valid: Tensor | None,
        potential: Potential,
        spec: LogitsSpec,
        needs_grad: bool,
    ) -> tuple[Tensor, Tensor]:
        sums, grad = OPERATORS.weighted_sum(
            *(z, weights, y, valid, *spec_numbers(spec), *numbers_of(potential), needs_grad)
        )
        return sums, grad

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        *tensors, ctx.potential, ctx.spec, ctx.needs_grad = inputs
        _, grad = output
        ctx.mark_non_differentiable(grad)
        # Otherwise autograd would allocate a gradient of zeros for the second output.
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, grad)
        ctx.save_for_forward(*tensors, grad)

    @staticmethod
    def backward(ctx: Any, sums_grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if sums_grad is None:
            return (None,) * 7
        options: Any = (ctx.potential, ctx.spec, ctx.needs_grad)
        return _gradient(sums_grad, *ctx.saved_tensors, *options), *[None] * 6

    @staticmethod
    def jvp(ctx: Any, z_tangent: Tensor, *_: Any) -> tuple[Tensor, None]:
        z = ctx.saved_tensors[0]
        ones = z.new_ones(z.shape[0], dtype=accumulation_dtype(z.dtype))
        options: Any = (ctx.potential, ctx.spec, ctx.needs_grad)
        gradient = _gradient(ones, *ctx.saved_tensors, *options)
        return (gradient * z_tangent).flatten(1).sum(1, dtype=ones.dtype), None

    vmap = staticmethod(
        _over_joined_images(lambda *arguments: _TransformedWeightedSum.apply(*arguments))
    )


class _ClassSums(torch.autograd.Function):
    """The sums of probabilities, for eager calls."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, valid: Tensor | None, spec: LogitsSpec) -> Tensor:
        kernels: Any = kernels_for(z)
        ctx.spec = spec
        ctx.save_for_backward(z, valid)
        sums: Tensor = kernels.class_sums(z, valid, spec)
        return sums

    @staticmethod
    def backward(ctx: Any, sums_grad: Tensor) -> tuple[Tensor | None, ...]:
        z, valid = ctx.saved_tensors
        ones = sums_grad.new_ones(z.shape[0])
        arguments = (ones, z, sums_grad, None, valid, None, Linear(), ctx.spec, False)
        return _gradient(*arguments), None, None


class _TransformedClassSums(_ClassSums):
    """The sums of probabilities, for function transforms."""

    @staticmethod
    def forward(z: Tensor, valid: Tensor | None, spec: LogitsSpec) -> Tensor:  # type: ignore[override]
        sums: Tensor = OPERATORS.class_sums(z, valid, *spec_numbers(spec))
        return sums

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.spec = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def jvp(ctx: Any, z_tangent: Tensor, *_: Any) -> Tensor:
        z, valid = ctx.saved_tensors
        formula = lambda z: plain.class_sums(z, valid, ctx.spec)  # noqa: E731
        sums, backward = torch.func.vjp(formula, z)[:2]
        # The transpose of backward, which is linear; forward mode cannot nest.
        transposed = torch.func.vjp(lambda grad: backward(grad)[0], torch.zeros_like(sums))[1]
        tangent: Tensor = transposed(z_tangent)[0]
        return tangent

    vmap = staticmethod(
        _over_joined_images(lambda *arguments: _TransformedClassSums.apply(*arguments))
    )


def _gradient(
    sums_grad: Tensor,
    z: Tensor,
    weights: Tensor,
    y: Tensor | None,
    valid: Tensor | None,
    grad: Tensor | None,
    potential: Potential,
    spec: LogitsSpec,
    needs_grad: bool,
) -> Tensor:
    """The gradient with respect to z, which is differentiable if the caller may need that.

    sums_grad: the upstream gradient, for each image or for all. grad: the gradient for an upstream
    gradient of 1, if the forward pass computed it (needs_grad).
    """
    gradient: Tensor
    if torch.is_grad_enabled() or _is_transformed(sums_grad):
        sums_grad, options = sums_grad.expand(z.shape[0]), (potential, spec, needs_grad)
        gradient = _Gradient.apply(sums_grad, z, weights, y, valid, grad, *options)
    elif needs_grad:
        assert grad is not None
        gradient = _scale_grad(grad, sums_grad, z)
    else:
        kernels = kernels_for(z) or plain
        weights = weights * (sums_grad.unsqueeze(1) if sums_grad.dim() else sums_grad)
        _, gradient = kernels.weighted_parts(z, weights, y, valid, potential, spec, True)
        if gradient.dtype != z.dtype:
            gradient = gradient.to(z.dtype)
    return gradient


class _Gradient(torch.autograd.Function):
    """The differentiable `_gradient`; its derivatives are those of the plain formula."""

    @staticmethod
    def forward(
        sums_grad: Tensor,
        z: Tensor,
        weights: Tensor,
        y: Tensor | None,
        valid: Tensor | None,
        grad: Tensor | None,
        potential: Potential,
        spec: LogitsSpec,
        needs_grad: bool,
    ) -> Tensor:
        gradient: Tensor
        if needs_grad:
            gradient = OPERATORS.scale_grad(grad, sums_grad, z)
        else:
            weights, numbers = weights * sums_grad.unsqueeze(1), numbers_of(potential)
            arguments = (z, weights, y, valid, *spec_numbers(spec), *numbers, True)
            gradient = OPERATORS.weighted_sum(*arguments)[1].to(z.dtype)
        return gradient

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        tensors, (ctx.potential, ctx.spec, _) = inputs[:5], inputs[6:]
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def _formula(ctx: Any) -> Callable[..., Tensor]:
        """The plain formula: (sums_grad, z, weights) -> gradient."""
        *_, y, valid = ctx.saved_tensors

        def gradient(sums_grad: Tensor, z: Tensor, weights: Tensor) -> Tensor:
            arguments = (weights, y, valid, ctx.potential, ctx.spec)
            backward = torch.func.vjp(lambda z: plain.weighted_sum(z, *arguments)[0], z)[1]
            result: Tensor = backward(sums_grad)[0]
            return result

        return gradient

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        backward = torch.func.vjp(_Gradient._formula(ctx), *ctx.saved_tensors[:3])[1]
        return *backward(upstream), *[None] * 6

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        inputs = ctx.saved_tensors[:3]
        sums_grad_tangent, z_tangent, weights_tangent = tangents[:3]
        formula = _Gradient._formula(ctx)
        sums_grad, z, weights = inputs
        tangent = torch.zeros_like(z)
        if sums_grad_tangent is not None:  # the gradient is linear in sums_grad
            tangent = tangent + formula(sums_grad_tangent, z, weights)
        if weights_tangent is not None:  # and in the weights
            tangent = tangent + formula(sums_grad, z, weights_tangent)
        if z_tangent is not None:  # second derivatives are symmetric
            backward = torch.func.vjp(lambda z: formula(sums_grad, z, weights), z)[1]
            tangent = tangent + backward(z_tangent)[0]
        return tangent

    vmap = staticmethod(_over_joined_images(lambda *arguments: _Gradient.apply(*arguments)))


# Compiled and exported programs call the operators themselves, which have first derivatives only.


def _setup_weighted_sum(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    tensors, spec, (*potential, needs_grad) = inputs[:4], inputs[4:8], inputs[8:]
    typed = (*tensors, potential_of(*potential), spec_of(*spec), needs_grad)
    _TransformedWeightedSum.setup_context(ctx, typed, output)


def _setup_class_sums(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _TransformedClassSums.setup_context(ctx, (*inputs[:2], spec_of(*inputs[2:])), output)


torch.library.register_autograd(
    "maxsquare::weighted_sum",
    lambda ctx, *grads: (_TransformedWeightedSum.backward(ctx, *grads)[0], *[None] * 11),
    setup_context=_setup_weighted_sum,
)
torch.library.register_autograd(
    "maxsquare::class_sums",
    lambda ctx, grad: (_ClassSums.backward(ctx, grad)[0], *[None] * 5),
    setup_context=_setup_class_sums,
)


# Calls --------------------------------------------------------------------------------------------


def prepare(z: Tensor, spec: LogitsSpec) -> tuple[Tensor, LogitsSpec]:
    """Logits and their spec; logits without kernels are upsampled here, once for all steps."""
    if not spec.from_logits or (spec.size is not None and len(spec.size) != 2):
        has_kernels = False
    elif torch.compiler.is_compiling():
        # Within a compiled transform, the compiler would drop an operator's derivatives.
        ordinary = not torch._C._are_functorch_transforms_active()
        has_kernels = ordinary and _has_kernels(z.device, z.dtype)
    else:
        ordinary = type(z).__torch_dispatch__ is Tensor.__torch_dispatch__
        has_kernels = ordinary and kernels_for(z) is not None
    if has_kernels:
        return z, spec
    how = (spec.size, spec.align_corners, spec.binary, spec.from_logits)
    return plain.upsampled(z, spec), LogitsSpec(*how, has_kernels=False)


def classify(
    z: Tensor,
    guide: Tensor | None,
    labels: Tensor | None,
    valid: Tensor | None,
    spec: LogitsSpec,
    threshold: float | None = None,
    ignore_index: int = -1,
) -> tuple[Tensor, Tensor]:
    """`plain.classify` by the fastest path."""
    tensors = (z.detach(), None if guide is None else guide.detach(), labels, valid)
    if not spec.has_kernels:
        return plain.classify(*tensors, spec, threshold, ignore_index)
    if torch.compiler.is_compiling() or _is_transformed(z):
        y, counts = OPERATORS.classify(*tensors, *spec_numbers(spec), threshold, ignore_index)
    else:
        kernels: Any = kernels_for(z)
        y, counts = kernels.classify(*tensors, spec, threshold, ignore_index)
    return y, counts


def weighted_sum(
    z: Tensor,
    weights: Tensor,
    y: Tensor | None,
    valid: Tensor | None,
    potential: Potential,
    spec: LogitsSpec,
) -> Tensor:
    """The sum of `plain.weighted_sum` over images, by the fastest path, without its gradient."""
    if not spec.has_kernels:
        return plain.weighted_sum(z, weights, y, valid, potential, spec)[0].sum()
    needs_grad = spec.size is not None and torch.is_grad_enabled() and z.requires_grad
    total: Tensor
    if torch.compiler.is_compiling():
        numbers = (*spec_numbers(spec), *numbers_of(potential), needs_grad)
        total = OPERATORS.weighted_sum(z, weights, y, valid, *numbers)[0].sum()
    elif _is_transformed(z):
        arguments = (z, weights, y, valid, potential, spec, needs_grad)
        total = _TransformedWeightedSum.apply(*arguments)[0].sum()
    else:
        total = _WeightedSum.apply(z, weights, y, valid, potential, spec, needs_grad)
    return total


def class_sums(z: Tensor, valid: Tensor | None, spec: LogitsSpec) -> Tensor:
    """`plain.class_sums` by the fastest path."""
    if not spec.has_kernels:
        return plain.class_sums(z, valid, spec)
    if torch.compiler.is_compiling():
        sums: Tensor = OPERATORS.class_sums(z, valid, *spec_numbers(spec))
    else:
        function = _TransformedClassSums if _is_transformed(z) else _ClassSums
        sums = function.apply(z, valid, spec)
    return sums
