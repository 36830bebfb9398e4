"""What README.md and the pages beside examples and benchmarks tell a reader to run does run."""

from __future__ import annotations

import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tyro
from readme_loop import blocks, train

import maxsquare
from maxsquare import __version__, functional

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "examples" / "README.md", ROOT / "benchmarks" / "README.md"]


def of_all_pages(language: str) -> list[Any]:
    return [
        pytest.param(block, id=f"{page.relative_to(ROOT)}-{number}")
        for page in PAGES
        for number, block in enumerate(blocks(page, language))
    ]


@pytest.mark.parametrize("block", of_all_pages("python"))
def test_a_block_of_python_trains_the_readers_network(block: str) -> None:
    train(block)


@pytest.mark.parametrize("block", of_all_pages("sh"))
def test_a_block_of_shell_names_scripts_and_options_that_exist(block: str) -> None:
    lines = [line.strip() for line in block.replace("\\\n", " ").splitlines() if line.strip()]
    commands = [shlex.split(part, comments=True) for line in lines for part in line.split("&&")]
    assert commands
    for command in filter(None, commands):
        program, *arguments = command
        if not program.endswith("python") or not arguments[0].endswith(".py"):
            assert Path(program).name in ("python", "pip", "pytest", "THP_MEM_ALLOC_ENABLE=1")
            continue
        script = ROOT / arguments[0]
        assert script.is_file()
        module = importlib.import_module(script.stem)
        form = getattr(module, "Options", None) or getattr(module, "Settings", None)
        if form is not None and "--help" not in arguments:
            tyro.cli(form, args=arguments[1:])


def test_links_lead_to_files() -> None:
    for page in PAGES:
        links = re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8"))
        missing = [link for link in links if not (page.parent / link).exists()]
        assert missing == [], f"{page.name}: {missing}"


def test_the_readme_is_read_in_five_minutes() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 900


def test_the_changelog_tells_of_this_version() -> None:
    assert f"## [{__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_the_reference_has_every_public_name_and_not_those_of_pytorch(tmp_path: Path) -> None:
    pytest.importorskip("sphinx", reason="needs sphinx: .[dev]")
    command = [sys.executable, "-m", "sphinx", "-nqW", "-b", "text", "docs", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    text = (tmp_path / "index.txt").read_text(encoding="utf-8")
    for name in {*maxsquare.__all__} - {"functional"}:
        assert re.search(rf"^(class )?maxsquare\.{name}\b", text, re.MULTILINE), name
    for name in functional.__all__:
        assert re.search(rf"^maxsquare\.functional\.{name}\(", text, re.MULTILINE), name
    assert not re.search("state_dict|register_buffer|Alias for field", text)
    assert "reduction: Literal['mean', 'sum', 'none'] = 'mean'" in text


def test_the_projects_page_links_the_reference() -> None:
    assert 'Documentation = "https://' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
