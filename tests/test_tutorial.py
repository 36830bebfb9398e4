"""The tutorial: its source beside it, the outputs that are shown, and that it still runs."""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

FOLDER = Path(__file__).parents[1] / "examples"
CHOICE = r"information chooses maximum squares, 1, .*\nentropy chooses maximum squares, 100, "


@pytest.fixture(scope="module")
def nbformat() -> ModuleType:
    return pytest.importorskip("nbformat", reason="needs nbformat: .[dev]")


def printed(notebook: Any) -> str:
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert {output.get("name", "stdout") for output in outputs} == {"stdout"}  # no warning
    return "".join(output.get("text", "") for output in outputs)


def pictures(notebook: Any) -> int:
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return sum("image/png" in output.get("data", {}) for output in outputs)


def test_the_notebook_is_its_source_with_outputs(nbformat: ModuleType) -> None:
    jupytext = pytest.importorskip("jupytext", reason="needs jupytext: .[dev]")
    notebook = nbformat.read(FOLDER / "tutorial.ipynb", as_version=4)
    source = jupytext.read(FOLDER / "tutorial.py")
    assert [(cell.cell_type, cell.source) for cell in notebook.cells] == [
        (cell.cell_type, cell.source) for cell in source.cells
    ]
    assert pictures(notebook) == 4
    assert re.search(CHOICE, printed(notebook))
    # The address of no file of the machine that ran it.
    assert "/tmp" not in (FOLDER / "tutorial.ipynb").read_text(encoding="utf-8")


@pytest.mark.stress
@pytest.mark.filterwarnings("ignore")  # of Jupyter's own libraries
def test_the_notebook_runs_and_chooses_as_it_says(
    nbformat: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    nbclient = pytest.importorskip("nbclient", reason="needs nbclient: .[dev]")
    monkeypatch.setenv("PYTHONWARNINGS", "ignore")
    notebook = nbformat.read(FOLDER / "tutorial.ipynb", as_version=4)
    resources = {"metadata": {"path": str(FOLDER)}}
    nbclient.NotebookClient(notebook, timeout=900, resources=resources).execute()
    assert pictures(notebook) == 4
    assert re.search(CHOICE, printed(notebook))
