"""Fresh memory, which costs more than the arithmetic that fills it.

The system hands out a large tensor in pages of 4 KiB, each with a fault and a zeroing of its
own: for a gradient as large as the logits that takes longer than computing it. Linux offers
pages 512 times as large to whoever asks.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

HUGE_PAGE = 2**21
# What 512 small pages cost. Huge ones take a tenth of that; but hosts of virtual machines take
# back free memory in huge pages, and to get one from the host again takes up to ten times that.
SLOW_SECONDS = 5e-4
# So many slow ones are put up with: an interruption is not a host.
PATIENCE_SECONDS = 2e-3


def empty_like(z: Tensor) -> Tensor:
    """`torch.empty_like`, in huge pages where it fills several and the system has them."""
    out = torch.empty_like(z)
    start = -(-out.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    stop = out.data_ptr() + out.numel() * out.itemsize
    advise = _madvise()
    if advise is not None and stop - start >= 2 * HUGE_PAGE:
        # Touched here, by one thread: two that meet in a page would both zero one of their own.
        step = HUGE_PAGE // out.itemsize
        touched = out.as_strided((out.numel() // step,), (step,))
        began = time.perf_counter()
        for k, element in enumerate(torch.split(touched, 1)):
            # Advice: where it is not taken, the small pages are as good as ever. The page that
            # the element lies in begins before it, and ends within the next two.
            here = start + k * HUGE_PAGE
            advise(here, min(2 * HUGE_PAGE, stop - here), mmap.MADV_HUGEPAGE)
            element.zero_()
            if time.perf_counter() - began > PATIENCE_SECONDS + k * SLOW_SECONDS:
                break
    return out


@functools.cache
def _madvise() -> Callable[[int, int, int], int] | None:
    """The C library's function, on Linux."""
    if sys.platform != "linux" or not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    return madvise
