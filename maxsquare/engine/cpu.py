"""The two operators on CPUs: a call of the library of `cpu.cpp` by several threads."""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import threading
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor

from maxsquare.engine.layout import axis, flat_stride, strides
from maxsquare.engine.libraries import library
from maxsquare.engine.plain import LogitsSpec, accumulation_dtype, index_dtype
from maxsquare.potentials import Potential, Tsallis

# A chunk of pixels fills the second cache with its logits, so that threads seldom meet at the
# counter of chunks; more rows of cells than these would take more memory for what chunks share.
CHUNK_PIXELS = 4096
CHUNKS_OF_CELLS = 64
# Logits for which it is worth to wake another thread: some tens of microseconds of work.
LOGITS_PER_THREAD = 2**16

# As `Dtype` in cpu.cpp.
DTYPES = (
    *(torch.float32, torch.float64, torch.bfloat16, torch.float16),
    *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
)

# Call ---------------------------------------------------------------------------------------------


class Axis(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("scale", "offset", "unit", "source", "size")]


class Head(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("stride", ctypes.c_int64 * 5),
        ("rows", Axis),
        ("columns", Axis),
    ]


class Task(ctypes.Structure):
    """An operator's work, as cpu.cpp describes it."""

    _fields_ = [
        *((name, Head) for name in ("z", "guide", "slope")),
        *(
            (name, ctypes.c_void_p)
            for name in (
                "labels valid y weights partial_sums partial_counts partial_slopes sums counts"
            ).split()
        ),
        *((name, ctypes.c_int64) for name in ("images", "classes", "channels", "length")),
        ("shape", ctypes.c_int64 * 3),
        *(
            (name, ctypes.c_int64)
            for name in ("chunks", "chunk_size", "next_chunk", "ignore_index")
        ),
        *((name, ctypes.c_double) for name in ("q", "shift", "constant", "threshold")),
        *(
            (name, ctypes.c_int32)
            for name in (
                "dtype label_dtype wide_index kind upsampled flat by_class has_threshold held"
            ).split()
        ),
    ]

    def point(self, **tensors: Tensor | None) -> None:
        """Point to tensors, which live as long as the task: a thread may outlive an interrupt."""
        for name, tensor in tensors.items():
            if tensor is not None:
                setattr(self, name, tensor.data_ptr())
        self.tensors = (*getattr(self, "tensors", ()), *tensors.values())


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
    task, spatial = make_task(z, guide, None, spec)
    if labels is not None:
        labels = (labels if labels.dtype in DTYPES else labels.long()).contiguous()
        task.label_dtype = DTYPES.index(labels.dtype)
        # Labels lie at full resolution, whatever the logits do.
        set_chunks(task, upsampled=False)
    bins = task.classes + 1
    y = z.new_empty((task.images, *spatial), dtype=index_dtype(task.classes))
    counts = z.new_empty((task.images, bins), dtype=torch.long)
    task.point(
        y=y,
        counts=counts,
        labels=labels,
        valid=None if valid is None else valid.contiguous(),
        partial_counts=counts.new_zeros((task.images, task.chunks, bins)),
    )
    task.wide_index = y.dtype != torch.int8
    task.has_threshold, task.threshold = threshold is not None, threshold or 0
    task.ignore_index = ignore_index
    run("classify", task, z.dtype)
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
    slope = None
    if needs_grad:
        slope = torch.empty_like(z) if spec.size is None else z.new_empty(z.shape, dtype=dtype)
    task, _ = make_task(z, None, slope, spec)
    sums = z.new_empty(task.images, dtype=dtype)
    # Of each chunk of cells, the source row that it shares with the next.
    shared = (task.images, task.chunks, task.channels, z.shape[-1])
    task.point(
        y=None if y is None else y.contiguous(),
        valid=None if valid is None else valid.contiguous(),
        weights=weights.to(dtype).contiguous(),
        sums=sums,
        partial_sums=z.new_empty((task.images, task.chunks), dtype=torch.float64),
        partial_slopes=z.new_empty(shared, dtype=dtype) if needs_grad and spec.size else None,
    )
    task.wide_index = y is not None and y.dtype != torch.int8
    task.by_class, task.kind = weights.shape[1] > 1, potential.kind()
    if isinstance(potential, Tsallis):
        shift = potential.shift()
        task.q, task.shift, task.constant = potential.q, shift, shift + potential.offset
    run("weighted_sum", task, z.dtype)
    return sums, slope


def scale_grad(slope: Tensor, factors: Tensor, dtype: torch.dtype) -> Tensor:
    """Every image's slope times its factor, in a dtype."""
    kernels = library(slope.dtype)
    assert kernels is not None
    slope, factors = slope.contiguous(), factors.to(slope.dtype).contiguous()
    result = torch.empty_like(slope, dtype=dtype)
    kernels.scale(
        DTYPES.index(dtype),
        ctypes.c_int64(len(slope)),
        ctypes.c_int64(slope[:1].numel()),
        *(ctypes.c_void_p(tensor.data_ptr()) for tensor in (slope, factors, result)),
    )
    return result


def make_task(
    z: Tensor,
    guide: Tensor | None,
    slope: Tensor | None,
    spec: LogitsSpec,
) -> tuple[Task, tuple[int, ...]]:
    """How logits and slope lie in memory, and the work in chunks; the result's resolution."""
    spatial, size, align_corners = spec.spatial(z), spec.size, spec.align_corners
    heads = {"z": z, "guide": guide, "slope": slope}
    flat_strides = [flat_stride(tensor) for tensor in heads.values() if tensor is not None]
    task = Task(
        images=z.shape[0],
        classes=spec.classes(z),
        channels=z.shape[1],
        length=math.prod(spatial),
        shape=(1, 1, 1, *spatial)[-3:],
        dtype=DTYPES.index(z.dtype),
        upsampled=size is not None,
        flat=size is None and None not in flat_strides,
    )
    task.tensors = tuple(heads.values())
    for name, tensor in heads.items():
        if tensor is None:
            continue
        head = Head(tensor.data_ptr(), strides(tensor, task.flat))
        if size is not None:
            head.rows = Axis(*axis(tensor.shape[2], size[0], align_corners))
            head.columns = Axis(*axis(tensor.shape[3], size[1], align_corners))
        setattr(task, name, head)
    set_chunks(task, upsampled=size is not None)
    return task, spatial


def set_chunks(task: Task, upsampled: bool) -> None:
    """Cut every image into chunks, whatever the number of threads."""
    parts = task.z.rows.source if upsampled else task.length
    task.chunk_size = -(-parts // CHUNKS_OF_CELLS) if upsampled else CHUNK_PIXELS
    task.chunks = -(-parts // max(task.chunk_size, 1))


def run(operator: str, task: Task, dtype: torch.dtype) -> None:
    """Have as many threads as PyTorch uses take chunks of the task until none is left."""
    kernels = library(dtype)
    assert kernels is not None
    kernel: Any = getattr(kernels, operator)
    pointer = ctypes.byref(task)
    helpers = min(
        torch.get_num_threads(),
        task.images * task.chunks,
        task.images * task.length * task.classes // LOGITS_PER_THREAD,
    )
    futures = HELPERS.call(kernel, pointer, helpers - 1)
    done = [kernel(pointer)]
    # A thread that has not begun is not needed any more.
    done += [future.result() for future in futures if not future.cancel()]
    if not all(done):
        raise MemoryError("no memory for the scratch of maxsquare's kernels")
    getattr(kernels, f"finish_{operator}")(pointer)


class Helpers:
    """Threads that call kernels, which release the interpreter's lock.

    Unlike those of ThreadPoolExecutor they serve every thread until the process ends, do not delay
    its end, and hold no lock in which a signal could interrupt them.
    """

    def __init__(self) -> None:
        self.calls: SimpleQueue[tuple[Future[int], Any, Any]] = SimpleQueue()
        self.threads: list[threading.Thread] = []

    def call(self, kernel: Any, pointer: Any, count: int) -> list[Future[int]]:
        """Have so many threads call a kernel, or as many as there are."""
        with contextlib.suppress(RuntimeError):  # no more threads can be started
            # To count processors takes longer than all else here.
            while len(self.threads) < count and len(self.threads) < (os.cpu_count() or 1):
                thread = threading.Thread(target=self.work, name="maxsquare", daemon=True)
                thread.start()
                self.threads.append(thread)
        futures: list[Future[int]] = [Future() for _ in range(min(count, len(self.threads)))]
        for future in futures:
            self.calls.put((future, kernel, pointer))
        return futures

    def work(self) -> None:
        """Call, one after the other, what no caller has taken back."""
        while True:
            future, kernel, pointer = self.calls.get()
            if future.set_running_or_notify_cancel():
                future.set_result(kernel(pointer))
            del future, kernel, pointer  # else the tensors would live until the next call


HELPERS = Helpers()


def start_anew() -> None:
    """A forked process has none of its parent's threads."""
    global HELPERS
    HELPERS = Helpers()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=start_anew)
