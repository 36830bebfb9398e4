"""Memory for gradients as large as the logits, which costs more than the arithmetic that fills it.

The system hands out a large tensor in pages of 4 KiB, each with a fault and a zeroing of its own,
and takes them back with the tensor. Linux offers pages 512 times as large to whoever asks, and
lets a program keep memory that it gives up until somebody needs it. Here a gradient that is gone
leaves its memory, marked so, to the next one of its size.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import time
import weakref

import torch
from torch import Tensor

HUGE_PAGE = 2**21
# What 512 small pages cost. Huge ones take a tenth of that; but hosts of virtual machines take
# back free memory in huge pages, and to get one from the host again takes up to ten times that.
SLOW_SECONDS = 5e-4
# So many slow ones are put up with: an interruption is not a host.
PATIENCE_SECONDS = 2e-3

# Linux has both.
AVAILABLE = hasattr(mmap, "MADV_HUGEPAGE") and hasattr(mmap, "MADV_FREE")
# Of two heads in two domains, whose images differ in size; what was given up first is dropped.
MOST_KEPT = 4
_kept: list[mmap.mmap] = []


def empty_like(z: Tensor) -> Tensor:
    """`torch.empty_like` of a CPU tensor, in memory as above if it fills several huge pages."""
    length = z.numel() * z.itemsize
    if not AVAILABLE or length < 2 * HUGE_PAGE:
        return torch.empty_like(z)
    memory = _kept_memory(length) or _fresh(length)
    # What the tensor holds on to, so that its end, and that of all its views, is noticed.
    buffer = (ctypes.c_byte * length).from_buffer(memory)
    weakref.finalize(buffer, _keep, memory).atexit = False
    storage = torch.frombuffer(buffer, dtype=torch.uint8).untyped_storage()
    strides = torch.empty_like(z, device="meta").stride()
    return z.new_empty(0).set_(storage, 0, z.shape, strides)


def _kept_memory(length: int) -> mmap.mmap | None:
    for memory in _kept[:]:
        if len(memory) == length:
            # If another thread has not been faster.
            with contextlib.suppress(ValueError):
                _kept.remove(memory)
                return memory
    return None


def _keep(memory: mmap.mmap) -> None:
    # A system that does not know of such memory gets it back.
    with contextlib.suppress(OSError):
        memory.madvise(mmap.MADV_FREE)
        _kept.append(memory)
        del _kept[:-MOST_KEPT]


def _fresh(length: int) -> mmap.mmap:
    """Memory of the system, in huge pages if there are any, and as long as they come fast."""
    memory = mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    began = time.perf_counter()
    with contextlib.suppress(OSError):
        for start in range(0, length - HUGE_PAGE, HUGE_PAGE):
            # The huge page that a byte lies in begins before it, and ends within the next two.
            memory.madvise(mmap.MADV_HUGEPAGE, start, min(2 * HUGE_PAGE, length - start))
            # Touched here, by one thread: two that meet in a page would both zero one of their own.
            memory[start] = 0
            if time.perf_counter() - began > PATIENCE_SECONDS + start / HUGE_PAGE * SLOW_SECONDS:
                break
    return memory
