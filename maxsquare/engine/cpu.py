"""The operators on CPUs: several threads call the library of `cpu.cpp`."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
import os
import struct
import threading
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor

from maxsquare.engine.libraries import library
from maxsquare.engine.plain import LogitsSpec, accumulation_dtype, index_dtype
from maxsquare.potentials import Potential, Tsallis

# The logits of a chunk fill the second-level cache, so threads rarely contend for the counter of
# chunks. More chunks of cells would need more memory for the rows that they share.
CHUNK_PIXELS = 4096
CHUNKS_OF_CELLS = 64
# The number of logits that justifies waking another thread: some tens of microseconds of work.
LOGITS_PER_THREAD = 2**16

# As `Dtype` in cpu.cpp.
DTYPES = {
    dtype: number
    for number, dtype in enumerate(
        (
            *(torch.float32, torch.float64, torch.bfloat16, torch.float16),
            *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
        )
    )
}
# As `Call` in cpu.cpp: three tensors, five pointers, integers, floats, options.
CALL = struct.Struct("@" + 3 * "P5q5q" + "5P" + "5q" + "4d" + "9i" + "0q")
NO_TENSOR = (0,) * 11
PADDING = ((0,) * 3, (0,) * 2, (0,), ())  # by the number of spatial dimensions


class Progress(ctypes.Structure):
    """As `Progress` in cpu.cpp."""

    _fields_ = [(name, ctypes.c_int64) for name in ("next", "completed", "has_clamped")]


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
    y = z.new_empty((z.shape[0], *spec.spatial(z)), dtype=index_dtype(classes))
    counts = z.new_empty((z.shape[0], classes + 1), dtype=torch.long)
    if labels is not None:
        labels = (labels if labels.dtype in DTYPES else labels.long()).contiguous()
    run(
        *("classify", spec, (classes + 1) * 8, z, counts),
        guide=guide,
        labels=labels,
        valid=valid,
        y=y,
        threshold=threshold,
        ignore_index=ignore_index,
    )
    return y, counts


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
    dtype = accumulation_dtype(z.dtype)
    if weights.dtype != dtype:
        weights = weights.to(dtype)
    sums = z.new_empty(z.shape[0], dtype=dtype)
    grad, partial_bytes = None, 8
    if needs_grad and spec.size is None:
        grad = torch.empty_like(z)
    elif needs_grad:
        grad = z.new_empty(z.shape, dtype=dtype)
        # A chunk of cells shares a source row with the next one.
        partial_bytes += z.shape[1] * z.shape[3] * dtype.itemsize
    run(
        *("weighted_sum", spec, partial_bytes, z, sums),
        grad=grad,
        valid=valid,
        y=None if y is None else y.contiguous(),
        weights=weights.contiguous(),
        potential=potential,
    )
    return sums, grad


weighted_parts = weighted_sum  # The sum of each image is one part.


def class_sums(z: Tensor, valid: Tensor | None, spec: LogitsSpec) -> Tensor:
    """`plain.class_sums`."""
    classes = spec.classes(z)
    sums = z.new_empty((z.shape[0], classes), dtype=accumulation_dtype(z.dtype))
    run("class_sums", spec, classes * 8, z, sums, valid=valid)
    return sums


def scale_grad(grad: Tensor, factors: Tensor, dtype: torch.dtype) -> Tensor:
    """Every image's gradient times its factor, in a dtype."""
    grad, factors = grad.contiguous(), factors.to(grad.dtype).expand(len(grad)).contiguous()
    result = torch.empty_like(grad, dtype=dtype)
    kernel("scale_grad", grad.dtype)(
        DTYPES[dtype],
        len(grad),
        grad[:1].numel(),
        grad.data_ptr(),
        factors.data_ptr(),
        result.data_ptr(),
    )
    return result


def run(
    operator: str,
    spec: LogitsSpec,
    partial_bytes: int,
    z: Tensor,
    result: Tensor,
    *,
    guide: Tensor | None = None,
    grad: Tensor | None = None,
    labels: Tensor | None = None,
    valid: Tensor | None = None,
    y: Tensor | None = None,
    weights: Tensor | None = None,
    potential: Potential | None = None,
    threshold: float | None = None,
    ignore_index: int = -1,
) -> None:
    """Run a kernel on as many threads as PyTorch uses; each takes chunks until none is left.

    partial_bytes: the size of the partial result of a chunk.
    """
    images, channels, *spatial = z.shape
    height, width = spec.size or (0, 0)
    length = height * width if height else math.prod(spatial)
    # Labels have the resolution of the result.
    if not height or labels is not None:
        chunk_size = CHUNK_PIXELS
        chunks = -(-length // chunk_size)
    else:
        chunk_size = max(-(-spatial[0] // CHUNKS_OF_CELLS), 1)
        chunks = -(-spatial[0] // chunk_size)
    valid = None if valid is None else valid.contiguous()
    q = shift = offset = 0.0
    if isinstance(potential, Tsallis):
        q, shift, offset = potential.q, potential.shift(), potential.offset
    call = CALL.pack(
        *pack(z),
        *(NO_TENSOR if guide is None else pack(guide)),
        *(NO_TENSOR if grad is None else pack(grad)),
        0 if labels is None else labels.data_ptr(),
        0 if valid is None else valid.data_ptr(),
        0 if y is None else y.data_ptr(),
        0 if weights is None else weights.data_ptr(),
        result.data_ptr(),
        *(height, width, chunks, chunk_size, ignore_index),
        *(q, shift, shift + offset, threshold or 0.0),
        2 + len(spatial),
        spec.align_corners,
        spec.binary,
        DTYPES[z.dtype],
        0 if labels is None else DTYPES[labels.dtype],
        y is not None and y.dtype != torch.int8,
        0 if potential is None else potential.kind(),
        weights is not None and weights.shape[1] > 1,
        threshold is not None,
    )
    total = images * chunks
    partials = bytearray(ctypes.sizeof(Progress) + total * partial_bytes)
    arguments = (call, ctypes.byref(Progress.from_buffer(partials)))
    function = kernel(operator, z.dtype)
    threads = min(total, images * channels * length // LOGITS_PER_THREAD)
    if threads > 1:
        tensors = (z, result, guide, grad, labels, valid, y, weights)
        threads = min(threads, torch.get_num_threads())
        done = HELPERS.call(function, arguments, tensors, threads - 1)
    else:
        done = [function(*arguments)]
    if not all(done):
        raise MemoryError("no memory for the scratch of maxsquare's kernels")


def pack(tensor: Tensor) -> tuple[int, ...]:
    """As `Tensor` in cpu.cpp."""
    shape = tensor.shape
    padding = PADDING[len(shape) - 2]
    return tensor.data_ptr(), *shape, *padding, *tensor.stride(), *padding


@functools.cache
def kernel(name: str, dtype: torch.dtype) -> Any:
    """A function of the library for logits of a dtype, which must exist."""
    kernels = library(accumulation_dtype(dtype))
    assert kernels is not None
    for exported, size in (("call_bytes", CALL.size), ("progress_bytes", ctypes.sizeof(Progress))):
        assert ctypes.c_int64.in_dll(kernels, exported).value == size, exported
    numbers, pointers = (ctypes.c_int, *[ctypes.c_int64] * 2), [ctypes.c_void_p] * 3
    kernels.scale_grad.argtypes = (*numbers, *pointers)
    return getattr(kernels, name)


class SharedCall:
    """A call of a kernel that other threads may join until its caller has done the work.

    It holds no lock in which a signal could interrupt the caller: popping from a list is atomic,
    and SimpleQueue is made for reentrant use.
    """

    def __init__(
        self, function: Any, arguments: tuple[Any, ...], tensors: Any, helpers: int
    ) -> None:
        self.function, self.arguments = function, arguments
        # The tensors must stay alive, as a helper may run on after the caller is interrupted.
        self.tensors = tensors
        self.helpers = helpers
        self.places = [None] * helpers
        self.results: SimpleQueue[int] = SimpleQueue()

    def join(self) -> None:
        """Help if a place is left."""
        try:
            self.places.pop()
        except IndexError:
            return
        self.results.put(self.function(*self.arguments))

    def finish(self) -> list[int]:
        """Do the remaining work, then wait for the helpers that have joined."""
        joined = self.helpers
        done = [self.function(*self.arguments)]
        # Helpers that have not joined yet are no longer needed.
        with contextlib.suppress(IndexError):
            while True:
                self.places.pop()
                joined -= 1
        return done + [self.results.get() for _ in range(joined)]


class Helpers:
    """Threads that call kernels, which run without the interpreter's lock.

    Unlike those of ThreadPoolExecutor they serve all threads until the process exits, and do not
    delay its exit.
    """

    def __init__(self) -> None:
        self.calls: SimpleQueue[SharedCall] = SimpleQueue()
        self.threads: list[threading.Thread] = []

    def call(
        self, function: Any, arguments: tuple[Any, ...], tensors: Any, count: int
    ) -> list[int]:
        """Call a kernel together with `count` helpers, or as many as there are."""
        with contextlib.suppress(RuntimeError):  # no more threads can be started
            # Counting processors is the slowest step, so it comes last.
            while len(self.threads) < count and len(self.threads) < (os.cpu_count() or 1):
                thread = threading.Thread(target=self.work, name="maxsquare", daemon=True)
                thread.start()
                self.threads.append(thread)
        shared = SharedCall(function, arguments, tensors, min(count, len(self.threads)))
        for _ in range(shared.helpers):
            self.calls.put(shared)
        return shared.finish()

    def work(self) -> None:
        """Join one call after another."""
        while True:
            shared = self.calls.get()
            shared.join()
            del shared  # otherwise its tensors would live until the next call


HELPERS = Helpers()


def start_anew() -> None:
    """Forget the helpers in a forked process, which has none of its parent's threads."""
    global HELPERS
    HELPERS = Helpers()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=start_anew)
