"""CONTRIBUTING.md names files, tests and options that exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import tyro

import speed

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
COMMANDS = [
    shlex.split(line, comments=True)
    for block in re.findall(r"```sh\n(.*?)```", TEXT, re.DOTALL)
    for line in block.splitlines()
]


def test_every_file_named_exists() -> None:
    named = re.findall(r"`([\w./]+(?:/|\.\w+|/run))`", TEXT)
    assert {"tests/support.py", "maxsquare/engine/", ".ci/run"} <= set(named)
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_every_test_named_exists() -> None:
    tests = [command[3:] for command in COMMANDS if command[1:3] == ["-m", "pytest"]]
    assert tests
    for arguments in tests:
        files = ["tests/support.py", *(name for name in arguments if name.endswith(".py"))]
        assert len(files) > 1
        text = "".join((ROOT / name).read_text(encoding="utf-8") for name in files)
        selected = arguments[arguments.index("-k") + 1] if "-k" in arguments else ""
        words = set(re.findall(r"\w+", selected)) - {"and", "not"}
        assert [word for word in words if word not in text] == []


def test_the_benchmark_takes_the_options_named() -> None:
    commands = [command for command in COMMANDS if "speed.py" in " ".join(command)]
    assert commands
    for command in commands:
        assert (ROOT / command[1]).exists()
        assert tyro.cli(speed.Options, args=command[2:]).quick


def test_the_classifiers_promise_what_is_tested() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
    promised = re.findall(r"Python :: (3\.\d+)", project)
    assert sorted(promised) == sorted(re.findall(r"^ +(3\.\d+)$", workflow, re.MULTILINE))
    assert promised[0] in re.findall(r'requires-python = ">=(.*)"', project)
    assert re.findall(r"Operating System :: (.*)\"", project) == ["POSIX :: Linux"]
    assert "runs-on: ubuntu" in workflow
