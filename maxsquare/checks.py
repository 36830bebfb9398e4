"""Checks of all arguments: TypeError for a wrong kind, ValueError for a wrong value.

A likely mistake with a defined result is a warning. No check reads elements of a GPU tensor, for
which the host would wait, except `warn_of_probabilities`, once per module.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import Any, Literal, get_args

import torch
from torch import Tensor

Reduction = Literal["mean", "sum", "none"]
Scale = Literal["paper", "reference"]
Activation = Literal["softmax", "sigmoid"]
Average = Literal["accepted", "valid", "share"]
CHOICES = {
    "reduction": get_args(Reduction),
    "scale": get_args(Scale),
    "activation": get_args(Activation),
    "average": get_args(Average),
}

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (
    *(torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.uint8, torch.uint16, torch.uint32, torch.uint64),
)
# The abstract classes accept NumPy's numbers, but Python's own types match faster.
INTEGER: Any = (int, Integral)
LENGTH: Any = (int, torch.SymInt, Integral)
REAL: Any = (int, float, Real)
FLAGS = ("from_logits", "align_corners")
RANGES = {
    "ratio": (-1, 1, "from -1 to 1"),
    "threshold": (0, 1, "from 0 to 1"),
    "q": (math.ulp(0), torch.finfo(torch.float32).max, "above 0, and finite"),
    "weight": (0, sys.float_info.max, "of at least 0"),
}
# How far from 1 the sum of a pixel's probabilities may be, in half precision with many classes.
PROBABILITY_TOLERANCE = 0.02
# How far from 1 the sum of a prior may be.
PRIOR_TOLERANCE = 1e-3
# They take no probabilities.
LOGITS_ALONE = ("cross_entropy", "PredictionStatistics")
# nn.Module's wrappers of forward, and those of no_grad, stand between a caller and the library.
LIBRARIES = ("maxsquare.", "torch.")
# The logits of fewer pixels may look like probabilities by chance.
FEWEST_PIXELS = 16


def check_options(**options: Any) -> None:
    """Raise for the first option that is not what it must be."""
    for name, value in options.items():
        if name in CHOICES:
            if not isinstance(value, str) or value not in CHOICES[name]:
                wanted = " or ".join(map(repr, CHOICES[name]))
                raise ValueError(f"{name} must be {wanted}, not {value!r}")
        elif name in FLAGS:
            # This accepts NumPy's bool without importing NumPy.
            if not isinstance(value, bool) and type(value).__name__ not in ("bool_", "bool"):
                raise TypeError(f"{name} must be True or False, not {value!r}")
        elif name == "ignore_index":
            if isinstance(value, bool) or not isinstance(value, INTEGER):
                raise TypeError(f"ignore_index must be an int, not {value!r}")
            if not -(2**63) <= value < 2**63:
                raise ValueError(f"ignore_index must fit into 64 bits, not {value!r}")
        elif name != "ratio" or value is not None:
            check_number(name, value)


def check_number(name: str, value: Any) -> None:
    """Raise if an option is not a number in its range; `ratio` must not be None here."""
    least, most, wanted = RANGES[name]
    if isinstance(value, bool) or not isinstance(value, REAL):
        raise TypeError(f"{name} must be a number {wanted}, not {value!r}")
    if not least <= value <= most:
        raise ValueError(f"{name} must be a number {wanted}, not {value!r}")


def check_logits(name: str, logits: Tensor, activation: str) -> None:
    """Logits are floating point, (N, C) or (N, C, *spatial) of up to three dimensions."""
    _tensor(name, logits)
    if logits.dtype not in FLOATS:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, not {logits.dtype}")
    if not 2 <= logits.dim() <= 5:
        raise ValueError(
            f"{name} must have shape (N, C, *spatial) with 0 to 3 spatial dimensions, "
            f"not {tuple(logits.shape)}"
        )
    if logits.shape[1] < (2 if activation == "softmax" else 1):
        raise ValueError(
            f"{name} must have at least 2 classes (activation='sigmoid' takes a single channel), "
            f"not shape {tuple(logits.shape)}"
        )


def check_size(size: int | Sequence[int] | None, logits: Tensor) -> tuple[int, ...] | None:
    """`size` as one int for each spatial dimension of the logits."""
    if size is None:
        return None
    dims = logits.dim() - 2
    # Not any sequence: the elements of bytes are ints.
    given: Any = size if isinstance(size, (list, tuple)) else (size,) * max(dims, 1)
    axes = ("depth", "height", "width")[3 - dims :] if dims else ()
    wanted = f"({', '.join(axes)}{',' if dims == 1 else ''})"
    lengths: list[Any] = []
    for length in given:
        if isinstance(length, bool) or not isinstance(length, LENGTH):
            raise TypeError(f"size must be ints {wanted}, not {size!r}")
        lengths.append(length if isinstance(length, torch.SymInt) else int(length))
    if not dims or 0 in logits.shape[2:]:
        raise ValueError(
            "size needs logits of shape (N, C, *spatial), with pixels to interpolate, not "
            f"{tuple(logits.shape)}: write size=None"
        )
    if len(lengths) != dims:
        raise ValueError(
            f"size must be {wanted} for logits of shape {tuple(logits.shape)}, not {size!r}: write "
            f"size=images.shape[-{dims}:]"
        )
    for length in lengths:
        if length < 1:
            raise ValueError(f"size must be positive ints {wanted}, not {size!r}")
    # A compiler would guard the comparison of dynamic sizes.
    if not torch.compiler.is_compiling():
        for length, own in zip(lengths, logits.shape[2:], strict=True):
            if length < own:
                warn(
                    f"size {tuple(lengths)} is smaller than the logits {tuple(logits.shape[2:])}, "
                    f"and interpolation leaves pixels out: size is the {wanted} of the labels or "
                    "images, not a factor; write size=None for a loss at the logits' own "
                    "resolution."
                )
                break
    return tuple(lengths)


def check_heads(
    low_logits: Tensor | Sequence[Tensor], logits: Tensor, *, resized: bool
) -> list[Tensor]:
    """The low-level heads, which must match `logits`, up to height and width if resized."""
    heads = [low_logits] if isinstance(low_logits, Tensor) else low_logits
    if not isinstance(heads, (list, tuple)) or not heads:
        given = repr(heads) if isinstance(heads, (list, tuple)) else type(heads).__name__
        raise TypeError(f"low_logits must be a tensor or a list of tensors, not {given}")
    for head in heads:
        _tensor("low_logits", head)
        if head.dtype != logits.dtype:
            raise TypeError(f"low_logits must be {logits.dtype} like logits, not {head.dtype}")
        _same_shape("low_logits", head, logits, resized)
    return list(heads)


def check_teacher(teacher_logits: Tensor, logits: Tensor, *, resized: bool) -> None:
    """A teacher's logits match `logits` up to dtype, and up to height and width if resized."""
    _tensor("teacher_logits", teacher_logits)
    if teacher_logits.dtype not in FLOATS:
        raise TypeError(f"teacher_logits must be floating point, not {teacher_logits.dtype}")
    _same_shape("teacher_logits", teacher_logits, logits, resized)


def _same_shape(name: str, head: Tensor, logits: Tensor, resized: bool) -> None:
    """Two heads have one shape, up to height and width if resized, and one device."""
    same = head.shape[:2] == logits.shape[:2] and head.dim() == logits.dim()
    if not same or (0 in head.shape[2:] if resized else head.shape != logits.shape):
        hint = ""
        if same and not resized and logits.dim() > 2:
            dims = logits.dim() - 2
            hint = f": write size=images.shape[-{dims}:], to which the loss upsamples both"
        raise ValueError(
            f"{name} must match the shape of logits {tuple(logits.shape)}"
            f"{' up to height and width' if resized else ''}, not {tuple(head.shape)}{hint}"
        )
    _same_device(name, head, logits)


def check_image_wise(labels: Tensor | None, ratio: float | None) -> None:
    """Only image-wise losses use labels."""
    if labels is not None and ratio is None:
        raise ValueError(
            "labels must be None for a loss that is not image-wise: they count the classes of "
            "an image, and are not to be learnt"
        )


def check_prior(prior: Sequence[float] | Tensor | None, activation: str) -> Tensor | None:
    """The expected proportions (C,) of classes, which sum to 1, or with sigmoid of each channel.

    They have PyTorch's default dtype, because some devices lack float64.
    """
    if prior is None:
        return None
    try:
        tau = torch.as_tensor(prior, dtype=torch.get_default_dtype()).detach().clone()
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"prior must be a tensor or a sequence of numbers, not {prior!r}") from None
    if tau.dim() != 1 or not bool(((tau >= 0) & (tau <= 1)).all()):
        raise ValueError(f"prior must be (C,) numbers from 0 to 1, not {prior!r}")
    if activation == "softmax" and abs(tau.sum().item() - 1) > PRIOR_TOLERANCE:
        raise ValueError(f"prior must sum to 1, not to {tau.sum().item():g}")
    return tau


def check_weight(weight: Tensor, logits: Tensor, activation: str) -> None:
    """The weight of the labelled pixels of each class, (C,)."""
    _tensor("weight", weight)
    if weight.dtype not in FLOATS:
        raise TypeError(f"weight must be floating point, not {weight.dtype}: write weight.float()")
    if activation == "sigmoid":
        raise ValueError("weight must be None with activation='sigmoid', where channels overlap")
    if tuple(weight.shape) != (logits.shape[1],):
        raise ValueError(
            f"weight must have a number for each class, ({logits.shape[1]},), not "
            f"{tuple(weight.shape)}"
        )
    _same_device("weight", weight, logits)


def check_map(
    name: str,
    pixels: Tensor,
    logits: Tensor,
    spatial: Sequence[int],
    *,
    overlapping: bool = False,
) -> None:
    """`valid` is bool, `labels` integer, both (N, *spatial of the result).

    overlapping: whether they teach channels, each of which is a class of its own.
    """
    _tensor(name, pixels)
    wanted = (logits.shape[0], *spatial) if logits.dim() > 2 else tuple(logits.shape[:1])
    matches = tuple(pixels.shape) == wanted
    if name == "labels" and not matches:
        _refuse_one_hot(pixels, logits, wanted, overlapping)
    if name == "valid" and pixels.dtype is not torch.bool:
        raise TypeError(f"valid must be a bool tensor, not {pixels.dtype}: write valid != 0")
    if name == "labels" and pixels.dtype not in INTEGERS:
        raise TypeError(
            f"labels must be an integer tensor, not {pixels.dtype}: write labels.long()"
        )
    if not matches:
        hint, dims = "", len(wanted) - 1
        if tuple(pixels.shape) == (wanted[0], 1, *wanted[1:]):
            hint = f": write {name}.squeeze(1)"
        elif dims and pixels.shape[:-dims] == wanted[:1] and _covers(pixels, logits, dims):
            hint = f": write size={name}.shape[-{dims}:], which upsamples the logits in the loss"
        raise ValueError(f"{name} must have shape {wanted}, not {tuple(pixels.shape)}{hint}")
    _same_device(name, pixels, logits)


def _covers(pixels: Tensor, logits: Tensor, dims: int) -> bool:
    """Whether pixels are at least as fine as the logits in their last dimensions."""
    fine, coarse = pixels.shape[-dims:], logits.shape[2:]
    return all(a >= b for a, b in zip(fine, coarse, strict=True))


def _refuse_one_hot(
    labels: Tensor, logits: Tensor, wanted: Sequence[int], overlapping: bool
) -> None:
    """Labels are class maps; one-hot ones are (N, C, *spatial) or (N, *spatial, C)."""
    classes, dims = logits.shape[1], len(wanted) - 1
    if classes == 1 or labels.dim() != dims + 2 or labels.shape[0] != wanted[0]:
        return
    if labels.shape[1] == classes:
        axis, resolution = "1", labels.shape[2:]
    elif labels.shape[-1] == classes:
        axis, resolution = "-1", labels.shape[1:-1]
    else:
        return
    numbers = "labels.int()" if labels.dtype is torch.bool else "labels"
    write = f"{numbers}.argmax({axis})"
    if tuple(resolution) != tuple(wanted[1:]):
        write += f" and size=labels.shape[-{dims}:] of the result"
    if overlapping:
        write += (
            " if a pixel has one class, and if classes overlap take torch.nn.functional."
            "binary_cross_entropy_with_logits(logits, labels.float())"
        )
    raise ValueError(
        f"labels must be class indices of shape {tuple(wanted)}, not one-hot "
        f"{tuple(labels.shape)}: write {write}"
    )


def check_labels(labels: object) -> None:
    """A loss that learns from labels requires them."""
    _tensor("labels", labels)


def check_classes(labels: Tensor, unknown: Tensor, classes: int, ignore_index: int) -> None:
    """Labels on a CPU must be classes; unknown: how many of each image are not."""
    if labels.device.type != "cpu" or not can_read(unknown) or not unknown.any():
        return
    y = labels.long()
    outside = (y != -1) & (y != ignore_index) & ((y < 0) | (y >= classes))
    raise ValueError(
        f"labels must be classes 0 to {classes - 1}, or -1 or ignore_index ({ignore_index}), not "
        f"{int(y[outside][0])}: if that marks pixels without a label, give it as ignore_index"
    )


def warn_of_uncounted(counts: Tensor, y: Tensor, valid: Tensor | None, channels: int) -> None:
    """Warn of images of which labels count no pixel, on a CPU; channels: of one image."""
    if not counts.is_cpu or not can_read(counts):
        return
    # A list is faster than the operators that would find these images.
    for n, row in enumerate(counts.tolist()):
        if any(row[:-1]) or not y[n].numel() or not (valid is None or valid[n].any()):
            continue
        warn(
            f"labels leave image {n // channels} of the batch no pixel to count, so that each of "
            "its pixels weighs 1, far more than those of other images: write valid=False for the "
            "image, or labels=None to count the prediction."
        )
        return


def warn_at_first_call(
    argument: str, heads: Sequence[Tensor], activation: str, from_logits: bool
) -> None:
    """Warn of probabilities given to a function, at the first call of every line that calls it.

    Modules read their input on their own; on a GPU the host would wait.
    """
    if torch.compiler.is_compiling() or not heads[0].is_cpu:
        return
    function, caller = sys._getframe(1), sys._getframe(2)
    while caller.f_back and caller.f_globals is function.f_globals:
        function, caller = caller, caller.f_back
    line = (id(function.f_code), id(caller.f_code), caller.f_lasti)
    call = (argument, activation, from_logits, *line)
    if call in _CALLS_READ or not all(map(can_read, heads)):
        return
    _CALLS_READ.add(call)
    if not caller.f_globals.get("__name__", "").startswith("maxsquare."):
        for head in heads:
            name = function.f_code.co_name
            warn_of_probabilities(name, argument, head, activation, from_logits)


_CALLS_READ: set[tuple[object, ...]] = set()


def warn_of_probabilities(
    name: str, argument: str, logits: Tensor, activation: str, from_logits: bool
) -> None:
    """Warn if logits look like probabilities, or if probabilities do not."""
    if logits.numel() < FEWEST_PIXELS * (logits.shape[1] if activation == "softmax" else 1):
        return
    x = logits.detach()
    inside = ((x >= 0) & (x <= 1)).all()
    if activation == "softmax":
        total = x.sum(1, dtype=torch.float32)
        likely = inside & ((total - 1).abs() <= PROBABILITY_TOLERANCE).all()
        possible = likely
    else:
        likely, possible = inside & ((x > 0) & (x < 1)).any(), inside
    # The host waits for a GPU once.
    probabilities, is_possible = torch.stack((likely, possible)).tolist()
    if from_logits and probabilities:
        instead = "" if name in LOGITS_ALONE else ", or say from_logits=False"
        warn(
            f"{name} is given what looks like probabilities as {argument}, and takes logits: "
            f"leave the {activation} to the loss{instead}."
        )
    elif not from_logits and not is_possible:
        warn(
            f"{name} with from_logits=False takes probabilities, and is given numbers that are "
            f"none as {argument}: leave from_logits=True for logits."
        )


def warn(said: str) -> None:
    """Warn of a likely mistake, at the line that called the library."""
    frame, level = sys._getframe(1), 2
    while frame.f_back and frame.f_globals.get("__name__", "").startswith(LIBRARIES):
        frame, level = frame.f_back, level + 1
    silence = 'warnings.filterwarnings("ignore", "maxsquare:")'
    warnings.warn(f"maxsquare: {said} ({silence} silences this.)", stacklevel=level)


def can_read(tensor: Tensor) -> bool:
    """Whether a tensor's elements can be read, unlike in a compiler, transform or graph capture."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or tensor.device.type == "meta"
        or type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__
        or (tensor.is_cuda and torch.cuda.is_current_stream_capturing())
    )


def _tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        hint = ""
        if isinstance(value, Mapping):
            hint = f": give one of its entries {', '.join(map(str, value))}"
        elif isinstance(value, (list, tuple)):
            hint = ": give one head's; low-level heads are the second argument of MultiLevelLoss"
        raise TypeError(f"{name} must be a tensor, not {type(value).__name__}{hint}")
    if value.layout is not torch.strided or value.is_nested:
        kind = "nested" if value.is_nested else value.layout
        raise TypeError(f"{name} must be a dense tensor, not a {kind} one")


def _same_device(name: str, tensor: Tensor, logits: Tensor) -> None:
    if tensor.device != logits.device:
        raise ValueError(f"{name} must be on {logits.device} like logits, not on {tensor.device}")
