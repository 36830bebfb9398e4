"""Builds wheels with ready-made CPU kernels, all on one machine: Zig compiles for every system.

    python hatch_build.py dist

An ordinary build has no kernels: its wheel runs anywhere, and compiles them on first use.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

# A wheel's platform: the libraries' suffix, and the target and processor of each level. The kernels
# need memory and its functions only: of glibc's versions, the oldest that pip's tags name.
PLATFORMS = {
    "manylinux_2_17_x86_64": (
        ".so",
        {
            "x86-64-v3": ("x86_64-linux-gnu.2.17", "x86_64_v3"),
            "x86-64-v4": ("x86_64-linux-gnu.2.17", "x86_64_v4"),
        },
    ),
    "manylinux_2_17_aarch64": (".so", {"arm64": ("aarch64-linux-gnu.2.17", "generic")}),
    "macosx_11_0_arm64": (".dylib", {"arm64": ("aarch64-macos.11.0", "apple_m1")}),
    "macosx_11_0_x86_64": (".dylib", {"x86-64-v3": ("x86_64-macos.11.0", "x86_64_v3")}),
    "win_amd64": (
        ".dll",
        {
            "x86-64-v3": ("x86_64-windows-gnu", "x86_64_v3"),
            "x86-64-v4": ("x86_64-windows-gnu", "x86_64_v4"),
        },
    ),
}
VARIABLE = "MAXSQUARE_PLATFORM"


class CustomBuildHook(BuildHookInterface):  # type: ignore[type-arg]
    """Adds the libraries to the wheel of the platform that VARIABLE names."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        platform = os.environ.get(VARIABLE)
        self.scratch = None
        if not platform or version == "editable":
            return
        # Where these are compiled, the package has the flags.
        sys.path.insert(0, self.root)
        from maxsquare.engine.libraries import FLAGS, SOURCE

        self.scratch = Path(tempfile.mkdtemp())
        suffix, levels = PLATFORMS[platform]
        for level, (target, processor) in levels.items():
            for precision, options in {"single": [], "double": ["-DDOUBLE"]}.items():
                library = self.scratch / f"cpu-{level}-{precision}{suffix}"
                # In two steps: Zig would compile its own libraries anew for every level.
                zig = [sys.executable, "-m", "ziglang", "cc", "-target", target]
                compiled = [f"-mcpu={processor}", "-c", *FLAGS, *options, str(SOURCE)]
                subprocess.run([*zig, *compiled, "-o", f"{library}.o"], check=True)
                linked = ["-shared", "-s", f"{library}.o"]
                subprocess.run([*zig, *linked, "-o", str(library)], check=True)
                build_data["force_include"][str(library)] = f"maxsquare/engine/{library.name}"
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{platform}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        if self.scratch:
            shutil.rmtree(self.scratch)


def build(platform: str, folder: Path) -> None:
    """Build the wheel of a platform in the folder."""
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", folder],
        env={**os.environ, VARIABLE: platform},
        cwd=Path(__file__).parent,
        check=True,
    )


if __name__ == "__main__":
    folder = Path(*sys.argv[1:2] or ["dist"]).absolute()
    # Builds beside each other would each find no folder, and all but one fail to make it.
    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(build, PLATFORMS, [folder] * len(PLATFORMS)))
