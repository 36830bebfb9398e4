"""Compile the Triton kernels for GPUs that are not there, and print what ptxas says of registers.

Run as a process of its own, since Triton's interpreter, once chosen, stays.

    python tests/compile_kernels.py 80 90 100
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from maxsquare.engine import LogitsSpec, cuda
from maxsquare.potentials import CrossEntropy, Tsallis

POINTERS = {torch.float32: "*fp32", torch.float64: "*fp64", torch.bfloat16: "*bf16"}


def signature_of(argument: Any) -> Any:
    """How Triton writes the type of an argument."""
    if argument is None:
        return "constexpr"
    if isinstance(argument, tuple):
        return tuple(map(signature_of, argument))
    return (
        argument if isinstance(argument, str) else "fp32" if isinstance(argument, float) else "i32"
    )


def compile_for(arch: int, kernel: Any, arguments: dict[str, Any], form: Any, warps: int) -> str:
    """The PTX of a kernel."""
    types = {name: signature_of(argument) for name, argument in arguments.items()}
    constants = {(list(types).index(name),): None for name, a in arguments.items() if a is None}
    types["FORM"] = "constexpr"
    constants[(len(types) - 1,)] = form
    source = ASTSource(fn=kernel, signature=types, constexprs=constants)
    options = {"num_warps": warps, "num_stages": 1}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options).asm["ptx"]


def resources(ptx: str, arch: int) -> dict[str, int]:
    """Registers and bytes of spills of a thread."""
    ptxas = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    blackwell = ptxas.with_name("ptxas-blackwell")
    program = blackwell if arch >= 100 and blackwell.exists() else ptxas
    target = f"sm_{arch}a" if arch >= 90 else f"sm_{arch}"
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        report = subprocess.run(
            [program, "-v", f"--gpu-name={target}", file.name, "-o", "/dev/null"],
            capture_output=True,
            text=True,
            check=True,
        ).stderr
    spills = sum(map(int, re.findall(r"(\d+) bytes spill", report)))
    return {"registers": int(re.findall(r"Used (\d+) registers", report)[0]), "spills": spills}


def cases() -> dict[str, tuple[Any, dict[str, Any], cuda.Launch]]:
    """Kernels with their arguments, as losses of street scenes launch them."""
    found = {}
    for classes, dtype, size in (
        (19, torch.bfloat16, None),
        (19, torch.float32, (64, 128)),
        (150, torch.float32, (64, 128)),
        (19, torch.float64, (64, 128)),
    ):
        z = torch.zeros(1, classes, *((8, 16) if size else (64, 128)), dtype=dtype)
        accumulated = POINTERS[cuda.accumulation_dtype(dtype)]
        read = accumulated if size else POINTERS[dtype]
        head = {"ptr": read, "strides": (2,) * 5, "rows": (2,) * 5, "columns": (2,) * 5}
        z_head = {f"z_{name}": value for name, value in head.items()}
        guide = {f"guide_{name}": value for name, value in head.items()}
        name = f"{classes} classes, {str(dtype)[6:]}{', upsampled' if size else ''}"
        index = "*i8" if classes < 128 else "*i32"
        for potential in (Tsallis(2, -1), Tsallis(0.5), CrossEntropy()):
            launch = cuda.Launch(
                *([z], LogitsSpec(size, True)),
                kind=potential.kind(),
                by_class=True,
                q=getattr(potential, "q", 0),
            )
            found[f"weighted_sum, {potential}, {name}"] = (
                cuda._weighted_sum,
                {
                    **z_head,
                    "weights_ptr": accumulated,
                    "y_ptr": index,
                    "valid_ptr": None,
                    "sums_ptr": accumulated,
                    "slope_ptr": accumulated if size else POINTERS[dtype],
                    "slope_strides": (2,) * 5,
                    **dict.fromkeys(("length", "shape", "tiles", "slope_size"), 2),
                    "shape": (2, 2, 2),
                },
                launch,
            )
        for threshold in (0.95,):
            launch = cuda.Launch([z], LogitsSpec(size, True))
            found[f"classify, threshold {threshold}, {name}"] = (
                cuda._classify,
                {
                    **z_head,
                    **(guide | {"guide_ptr": None if threshold is None else read}),
                    "valid_ptr": "*i1",
                    "y_ptr": index,
                    "length": 2,
                    "shape": (2, 2, 2),
                    "tiles": 2,
                    "threshold": threshold,
                },
                launch,
            )
    return found


def main() -> None:
    report = {}
    for arch in map(int, sys.argv[1:]):
        for name, (kernel, arguments, launch) in cases().items():
            ptx = compile_for(arch, kernel, arguments, launch.form, launch.warps)
            report[f"sm_{arch}: {name}"] = resources(ptx, arch)
    json.dump(report, sys.stdout, indent=1)


if __name__ == "__main__":
    main()
