"""The wheels with ready-made kernels run where they can, and are what their names say elsewhere.

ELF, Mach-O and PE are read as their specifications have it, by the few fields that matter here.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from maxsquare.engine import libraries

pytestmark = [
    # To build wheels of every platform takes minutes.
    pytest.mark.stress,
    pytest.mark.skipif(
        not importlib.util.find_spec("ziglang") or not importlib.util.find_spec("hatchling"),
        reason="needs ziglang and hatchling",
    ),
]

ROOT = Path(__file__).parents[1]
EXPORTS = {
    *("classify", "class_sums", "weighted_sum", "scale_grad"),
    *("call_bytes", "progress_bytes"),
}
LEVELS = {
    "manylinux_2_17_x86_64": ["x86-64-v3", "x86-64-v4"],
    "manylinux_2_17_aarch64": ["arm64"],
    "macosx_11_0_arm64": ["arm64"],
    "macosx_11_0_x86_64": ["x86-64-v3"],
    "win_amd64": ["x86-64-v3", "x86-64-v4"],
}
each_platform = pytest.mark.parametrize("platform", LEVELS)


@pytest.fixture(scope="module")
def wheels(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Every platform's wheel, as the one command builds them."""
    folder = request.config.getoption("--wheels")
    if folder is None:
        folder = tmp_path_factory.mktemp("wheels")
        run = subprocess.run(
            [sys.executable, str(ROOT / "hatch_build.py"), str(folder)],
            capture_output=True,
            text=True,
            check=False,
        )
        assert run.returncode == 0, run.stdout + run.stderr
    return {path.stem.split("-py3-none-")[1]: path for path in folder.glob("*.whl")}


@pytest.fixture(scope="module")
def unpacked(wheels: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every wheel's package folder."""
    folders = {}
    for platform, path in wheels.items():
        folders[platform] = tmp_path_factory.mktemp("unpacked") / platform
        with zipfile.ZipFile(path) as archive:
            archive.extractall(folders[platform])
    return folders


def libraries_of(folder: Path) -> list[Path]:
    return sorted((folder / "maxsquare" / "engine").glob("cpu-*"))


def test_there_is_a_wheel_of_every_platform(wheels: dict[str, Path]) -> None:
    assert wheels.keys() == LEVELS.keys()


@each_platform
def test_a_wheel_is_small_and_has_every_level_in_both_precisions(
    wheels: dict[str, Path], unpacked: dict[str, Path], platform: str
) -> None:
    assert wheels[platform].stat().st_size < 2 * 2**20
    assert [path.stem for path in libraries_of(unpacked[platform])] == [
        f"cpu-{level}-{precision}"
        for level in LEVELS[platform]
        for precision in ("double", "single")
    ]
    # Whoever's processor is older still compiles.
    assert (unpacked[platform] / "maxsquare" / "engine" / "cpu.cpp").is_file()


@each_platform
def test_a_library_has_its_format_its_exports_and_no_needs_beyond_c(
    unpacked: dict[str, Path], platform: str
) -> None:
    for path in libraries_of(unpacked[platform]):
        content = path.read_bytes()
        if platform.startswith("manylinux"):
            check_elf(content, 183 if platform.endswith("aarch64") else 62)
        elif platform.startswith("macosx"):
            check_mach_o(content, 0x100000C if platform.endswith("arm64") else 0x1000007)
        else:
            check_pe(content)


def text_at(content: bytes, offset: int) -> str:
    return content[offset : content.index(0, offset)].decode()


def check_elf(content: bytes, machine: int) -> None:
    assert content[:6] == b"\x7fELF\x02\x01" and struct.unpack_from("<HH", content, 16) == (
        3,
        machine,
    )
    (offset,) = struct.unpack_from("<Q", content, 0x28)
    size, count = struct.unpack_from("<HH", content, 0x3A)
    # Type, offset, size, and the section of the texts, of each section.
    sections = [struct.unpack_from("<4xI16xQQI", content, offset + k * size) for k in range(count)]
    exported, needed, libraries = set(), set(), set()
    for kind, start, length, texts in sections:
        if kind == 11:  # symbols for the loader
            for at in range(start + 24, start + length, 24):
                name, section = struct.unpack_from("<IxxH", content, at)
                (exported if section else needed).add(text_at(content, sections[texts][1] + name))
        elif kind == 6:  # what the loader does
            for tag, value in struct.iter_unpack("<QQ", content[start : start + length]):
                if tag == 1:
                    libraries.add(text_at(content, sections[texts][1] + value))
        # Debugging information and other symbols are stripped.
        assert kind != 2
    assert exported >= EXPORTS
    assert needed <= {"malloc", "free", "memset", "memcpy", "memmove", "madvise"} and libraries == {
        "libc.so.6"
    }
    # The tag's promise: no newer version of glibc is named.
    versions = re.findall(rb"GLIBC_2\.(\d+)", content)
    assert versions and max(map(int, versions)) <= 17


def check_mach_o(content: bytes, processor: int) -> None:
    magic, cpu, _, kind, count = struct.unpack_from("<5I", content)
    assert (magic, cpu, kind) == (0xFEEDFACF, processor, 6)
    exported, dependencies, signed, at = set(), [], False, 32
    for _ in range(count):
        command, size = struct.unpack_from("<II", content, at)
        if command == 2:  # symbols
            start, symbols, texts, _ = struct.unpack_from("<4I", content, at + 8)
            for k in range(symbols):
                name, kind, section = struct.unpack_from("<IBB", content, start + 16 * k)
                if kind & 1 and section:  # external, and defined
                    exported.add(text_at(content, texts + name))
        elif command == 0xC:  # a dependency
            dependencies.append(text_at(content, at + struct.unpack_from("<I", content, at + 8)[0]))
        elif command == 0x32:  # the system, and its oldest version
            assert struct.unpack_from("<II", content, at + 8) == (1, 11 << 16)
        signed |= command == 0x1D
        at += size
    assert exported >= {f"_{name}" for name in EXPORTS}
    assert dependencies == ["/usr/lib/libSystem.B.dylib"]
    # The system loads nothing unsigned on arm64.
    assert signed or processor != 0x100000C


def check_pe(content: bytes) -> None:
    (header,) = struct.unpack_from("<I", content, 0x3C)
    signature, machine, count = struct.unpack_from("<4sHH", content, header)
    size, characteristics = struct.unpack_from("<HH", content, header + 20)
    assert (signature, machine, characteristics & 0x2000) == (b"PE\0\0", 0x8664, 0x2000)
    tables = struct.unpack_from("<4I", content, header + 24 + 112)
    sections = [
        struct.unpack_from("<8x4I", content, header + 24 + size + 40 * k) for k in range(count)
    ]

    def offset_of(address: int) -> int:
        for length, start, _, position in sections:
            if start <= address < start + length:
                return address - start + position
        raise AssertionError(address)

    exports, imports = offset_of(tables[0]), offset_of(tables[2])
    (names,) = struct.unpack_from("<I", content, exports + 24)
    (number,) = struct.unpack_from("<I", content, exports + 32)
    addresses = struct.unpack_from(f"<{names}I", content, offset_of(number))
    assert {text_at(content, offset_of(address)) for address in addresses} == EXPORTS
    dependencies = []
    while address := struct.unpack_from("<12xI", content, imports)[0]:
        dependencies.append(text_at(content, offset_of(address)).lower())
        imports += 20
    # What every Windows 10 has.
    assert all(name.startswith(("api-ms-win-crt-", "kernel32.dll")) for name in dependencies)


# Where they run


LOOP = """
import sys, torch
from maxsquare.engine import libraries
sys.argv = ["readme_loop.py", {page!r}]
exec(open({script!r}).read())
for dtype in (torch.float32, torch.float64):
    print(libraries.library(dtype)._name)
"""


def runs_here(platform: str) -> bool:
    machine = "aarch64" if libraries.ARM else "x86_64"
    return sys.platform == "linux" and platform.endswith(machine) and bool(libraries.levels())


@each_platform
def test_a_wheel_runs_without_a_compiler(
    unpacked: dict[str, Path], platform: str, tmp_path: Path
) -> None:
    """README's loop, where PATH is empty, with the libraries of the wheel."""
    if not platform.startswith("manylinux") or not runs_here(platform):
        pytest.skip("made for another machine")
    code = LOOP.format(page=str(ROOT / "README.md"), script=str(ROOT / "tests" / "readme_loop.py"))
    kept = ("LD_LIBRARY_PATH", "OMP_NUM_THREADS")
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=tmp_path,
        env={
            **{name: os.environ[name] for name in kept if name in os.environ},
            "PYTHONPATH": str(unpacked[platform]),
            "PATH": "",
            "XDG_CACHE_HOME": str(tmp_path),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    names = run.stdout.splitlines()[-2:]
    assert [Path(name).parent for name in names] == [
        unpacked[platform] / "maxsquare" / "engine"
    ] * 2
    assert not list(tmp_path.iterdir())


def build_driver(library: Path, precision: str, target: str, folder: Path) -> Path:
    """A program that calls a library, without Python."""
    source = libraries.SOURCE.read_text(encoding="utf-8")
    part = source[source.index("enum Dtype") : source.index("// Vectors")]
    (folder / "call.h").write_text(re.sub("^EXPORT.*", "", part, flags=re.MULTILINE))
    shutil.copy(library, folder)
    program = folder / ("driver.exe" if "windows" in target else "driver")
    # Of a DLL the driver's linker needs the list of names; of the others the library itself.
    linked = folder / library.name
    if "windows" in target:
        definition = folder / "cpu.def"
        definition.write_text(f"LIBRARY {library.name}\nEXPORTS\n" + "\n".join(sorted(EXPORTS)))
        linked = folder / "cpu.lib"
        subprocess.run(
            [
                *(sys.executable, "-m", "ziglang", "dlltool", "-m", "i386:x86-64"),
                *("-d", str(definition), "-l", str(linked)),
            ],
            check=True,
        )
    subprocess.run(
        [
            *(sys.executable, "-m", "ziglang", "cc", "-target", target, "-x", "c++", "-O1"),
            *(["-DDOUBLE"] if precision == "double" else []),
            *(f"-I{folder}", str(ROOT / "tests" / "driver.cpp"), "-x", "none", str(linked)),
            *([] if "windows" in target else ["-Wl,-rpath,$ORIGIN"]),
            *("-o", str(program)),
        ],
        check=True,
    )
    return program


def results(command: list[str]) -> list[tuple[str, np.ndarray]]:
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    lines = [line.split() for line in run.stdout.splitlines()]
    return [(name, np.array(values, dtype=float)) for name, *values in lines]


@pytest.mark.skipif(not runs_here("x86_64"), reason="compares with x86-64")
@pytest.mark.parametrize("precision", ["single", "double"])
@pytest.mark.parametrize(
    ("platform", "level", "target", "emulator"),
    [
        (
            *("manylinux_2_17_aarch64", "arm64", "aarch64-linux-gnu.2.17"),
            ["qemu-aarch64-static", "-L", "/usr/aarch64-linux-gnu"],
        ),
        ("win_amd64", "x86-64-v3", "x86_64-windows-gnu", ["wine"]),
    ],
    ids=["aarch64", "Windows"],
)
def test_a_library_of_another_machine_computes_the_same_in_an_emulator(
    unpacked: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    platform: str,
    level: str,
    target: str,
    emulator: list[str],
    precision: str,
) -> None:
    if not shutil.which(emulator[0]) or not all(map(os.path.exists, emulator[2:])):
        pytest.skip(f"needs {' '.join(emulator)}")
    monkeypatch.setenv("WINEDEBUG", "-all")
    monkeypatch.setenv("WINEPREFIX", str(tmp_path / "wine"))
    programs = []
    for each, of, at in (
        ("manylinux_2_17_x86_64", "x86-64-v3", "x86_64-linux-gnu.2.17"),
        (platform, level, target),
    ):
        (library,) = (unpacked[each] / "maxsquare" / "engine").glob(f"cpu-{of}-{precision}.*")
        folder = tmp_path / each
        folder.mkdir()
        programs.append(build_driver(library, precision, at, folder))
    expected = results([str(programs[0])])
    found = results([*emulator, str(programs[1])])
    assert len(expected) == 32 and [name for name, _ in found] == [name for name, _ in expected]
    # They may round otherwise where only one fuses a product with a sum.
    tolerance = 1e-12 if precision == "double" else 2e-5
    for (name, values), (_, others) in zip(expected, found, strict=True):
        assert np.abs(values).max() > 0, name
        np.testing.assert_allclose(values, others, rtol=tolerance, atol=tolerance, err_msg=name)
