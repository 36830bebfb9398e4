"""What the Triton kernels become on an H100, without one: prints JSON of each kernel as launched.

Triton specialises a launch by its arguments, and chooses layouts by what it knows of the addresses:
a driver that only names its target lets the launches of real calls compile.
"""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from maxsquare.engine import LogitsSpec, cuda
from maxsquare.potentials import Tsallis

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class NamedTarget:
    """A driver that has no device, but names one."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", int(sys.argv[1]), 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def disassembled(cubin: bytes, option: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [TOOLS / "cuobjdump", option, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def counted(compiled: Any) -> dict[str, Any]:
    """Registers, accesses of local memory, instructions, those of the shortest loop, and widths."""
    sass = disassembled(compiled.asm["cubin"], "-sass")
    usage = disassembled(compiled.asm["cubin"], "-res-usage")
    lines = re.findall(r"/\*([0-9a-f]{4,5})\*/\s+(.*?);", sass)
    places = {int(place, 16): i for i, (place, _) in enumerate(lines)}
    loops = []
    for i, (_, text) in enumerate(lines):
        target = re.search(r"BRA.*?0x([0-9a-f]+)", text)
        if target and places.get(int(target[1], 16), i) < i:
            loops.append(i + 1 - places[int(target[1], 16)])
    widths = [
        kind + (width or ".32")
        for _, text in lines
        for kind, width in re.findall(
            r"\b(LDG|STG)\.E(?:\.\w+)*?(\.64|\.128|\.U16|\.U8|\.S8)?\b", text
        )
    ]
    return {
        "registers": int(re.findall(r"REG:(\d+)", usage)[0]),
        "spills": sum("LDL" in text or "STL" in text for _, text in lines),
        "instructions": sum(not text.startswith("NOP") for _, text in lines),
        "loop": min(loops, default=0),
        "widths": {width: widths.count(width) for width in sorted(set(widths))},
    }


def cases() -> dict[str, Callable[[], Any]]:
    """Calls of losses of street scenes."""
    found: dict[str, Callable[[], Any]] = {}
    ones, by_class = torch.empty(1, 1), torch.empty(1, 19)
    y = torch.empty(1, 512, 1024, dtype=torch.int8)
    for dtype in (torch.float32, torch.bfloat16):
        full = torch.empty(1, 19, 512, 1024, dtype=dtype)
        low = torch.empty(1, 19, 65, 129, dtype=dtype)
        for name, z, spec in (
            ("full", full, LogitsSpec()),
            ("upsampled", low, LogitsSpec((512, 1024), True)),
        ):
            for what, weights, index, q in (
                ("gradient", ones, None, 2),
                ("gradient by class", by_class, y, 2),
                ("gradient of q = 0.5", ones, None, 0.5),
            ):
                arguments = (z, weights, index, None, Tsallis(q), spec, True)
                call = cuda.weighted_sum
                found[f"{name} {str(dtype)[6:]} {what}"] = lambda c=call, a=arguments: c(*a)
            arguments = (z, z, None, None, spec, 0.95)
            call = cuda.classify
            found[f"{name} {str(dtype)[6:]} guidance"] = lambda c=call, a=arguments: c(*a)
            found[f"{name} {str(dtype)[6:]} sums"] = lambda z=z, s=spec: cuda.class_sums(z, None, s)
        full = full.contiguous(memory_format=torch.channels_last)
        arguments = (full, ones, None, None, Tsallis(2), LogitsSpec(), True)
        found[f"channels-last {str(dtype)[6:]} gradient"] = lambda a=arguments: cuda.weighted_sum(
            *a
        )
    return found


def main() -> None:
    driver.set_active(NamedTarget())
    torch.cuda.device_of = lambda tensor: contextlib.nullcontext()
    report: dict[str, Any] = {}
    for name, call in cases().items():

        def run(
            z: Any, kernel: Any, grid: Any, *rest: Any, name: str = name, **options: Any
        ) -> None:
            compiled = kernel.warmup(*rest, grid=grid, **options)
            report[f"{name}: {kernel.__name__}"] = counted(compiled)

        cuda.run = run
        call()
    json.dump(report, sys.stdout, indent=1)


if __name__ == "__main__":
    main()
