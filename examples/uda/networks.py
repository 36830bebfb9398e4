"""A network of the user's own, named as package.module:factory, in place of DeepLabv2."""

from __future__ import annotations

import importlib
import operator
import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from uda import checkpoint
from uda.errors import UserError

# Names of the logits in a mapping: torchvision's and transformers'.
LOGITS = ("out", "logits")


def build(name: str, classes: int) -> nn.Module:
    """The network of a factory, whose output becomes (logits, low_logits).

    The network may return logits of shape (N, classes, h, w), at any resolution; or a sequence that
    begins with them; or a mapping with an entry "out" or "logits", else one that begins with them.
    If the next entry has the shape of logits, too, it is taken for the low-level logits; otherwise
    these are None.

    Args:
        name: package.module:factory, a callable that takes the number of classes. Modules in the
            current folder are found, too.
        classes: number of classes.

    Raises:
        UserError: there is no such factory, or it returns no nn.Module.
    """
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    module, _, attribute = name.partition(":")
    try:
        factory = operator.attrgetter(attribute)(importlib.import_module(module))
    except Exception as error:  # the module may raise anything while it is imported
        raise UserError(f"--network {name} cannot be imported ({_said(error)}).") from error
    if not callable(factory):
        raise UserError(f"--network {name} is a {type(factory).__name__}, not a callable.")
    try:
        network = factory(classes)
    except Exception as error:
        raise UserError(f"--network {name} fails for {classes} classes: {_said(error)}.") from error
    if not isinstance(network, nn.Module):
        raise UserError(f"--network {name} returned a {type(network).__name__}, not an nn.Module.")

    def as_heads(_: nn.Module, images: tuple[Tensor], output: Any) -> tuple[Tensor, Tensor | None]:
        return _heads(output, (len(images[0]), classes), name)

    network.register_forward_hook(as_heads)
    return network


def _heads(output: Any, shape: tuple[int, int], name: str) -> tuple[Tensor, Tensor | None]:
    """The logits of (N, C) = `shape` in the output of a network, and the low-level logits."""
    if isinstance(output, Mapping):
        named = [key for key in LOGITS if key in output][:1]
        entries = [output[key] for key in (*named, *(key for key in output if key not in named))]
    else:
        entries = [*output] if isinstance(output, list | tuple) else [output]
    logits, low_logits, *_ = (*entries, None, None)
    if not _are_logits(logits, shape):
        got = f"a {type(output).__name__}"
        if isinstance(logits, Tensor):
            got = f"{logits.dtype} of shape {tuple(logits.shape)}"
        raise UserError(
            f"--network {name} returned {got}, not floating-point logits of shape ({shape[0]}, "
            f"{shape[1]}, height, width)."
        )
    return logits, low_logits if _are_logits(low_logits, shape) else None


def _are_logits(entry: Any, shape: tuple[int, int]) -> bool:
    return (
        isinstance(entry, Tensor)
        and entry.is_floating_point()
        and entry.ndim == 4
        and entry.shape[:2] == shape
    )


@torch.no_grad()
def try_out(network: nn.Module, sizes: Iterable[tuple[int, int]], name: str) -> bool:
    """Show a network images of some sizes; returns whether it has low-level logits.

    Raises:
        UserError: the network fails, or does not return logits.
    """
    network.eval()
    for height, width in sizes:
        try:
            _, low_logits = network(torch.zeros(1, 3, height, width))
        except UserError:
            raise
        except Exception as error:
            raise UserError(
                f"--network {name} fails for images of {width}x{height}: {_said(error)}."
            ) from error
    return low_logits is not None


def load_weights(network: nn.Module, path: Path) -> None:
    """Give a network the weights of a file; UserError if they do not fit completely."""
    first = next(iter(network.state_dict()), "")
    weights = checkpoint.strip_prefix(checkpoint.read_weights(path), first)
    checkpoint.load_weights(network, weights, path)


def _said(error: Exception) -> str:
    """An error as the end of its traceback shows it, in one line and without a full stop."""
    text = str(error).strip().partition("\n")[0].rstrip(".")
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
