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
from collections.abc import Callable

import torch
from torch import Tensor

HUGE_PAGE = 2**21
# Beyond, small pages: the hosts of some virtual machines take back free memory in huge pages,
# and a result that finds hundreds of them gone takes longer than it would in small ones.
MOST_BYTES = 2**28


def empty_like(z: Tensor) -> Tensor:
    """`torch.empty_like`, in huge pages where it fills several and the system has them."""
    out = torch.empty_like(z)
    start = -(-out.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    length = out.data_ptr() + out.numel() * out.itemsize - start
    advise = _madvise()
    if advise is not None and 2 * HUGE_PAGE <= length <= MOST_BYTES:
        # Advice: where it is not taken, the small pages are as good as ever.
        advise(start, length, mmap.MADV_HUGEPAGE)
        # Touched here, by one thread: two that meet in a page would both zero one of their own.
        step = HUGE_PAGE // out.itemsize
        out.as_strided((out.numel() // step,), (step,)).zero_()
    return out


@functools.cache
def _madvise() -> Callable[[int, int, int], int] | None:
    """The C library's function, on Linux."""
    if sys.platform != "linux" or not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    return madvise
