"""The API reference, made from the docstrings: python -m sphinx -nW docs build/docs"""

import re
from typing import Any

import maxsquare
from maxsquare import functional

project, release = "maxsquare", maxsquare.__version__
html_title = f"maxsquare {release}"
html_theme = "furo"

extensions = ["sphinx.ext.autodoc", "sphinx.ext.mathjax", "sphinx.ext.napoleon"]
napoleon_custom_sections = [("Call", "params_style"), "Shape", "Source"]
# Of a class what it adds to nn.Module, whose members PyTorch documents; of types, the signature's.
autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_inherit_docstrings = False
# What other references document.
nitpick_ignore_regex = [("py:.*", r"(.*\.)?(torch|nn|collections|typing|Tensor|Sequence)\b.*")]

PUBLIC = {name: f"maxsquare.{name}" for name in maxsquare.__all__}
PUBLIC |= {name: f"maxsquare.functional.{name}" for name in functional.__all__}


def as_restructured_text(
    app: Any, what: str, name: str, thing: Any, _: Any, lines: list[str]
) -> None:
    """Docstrings are plain text: `code` is a link if it is public, and * and | are themselves."""

    def link(code: re.Match[str]) -> str:
        target = PUBLIC.get(code[1].rpartition(".")[2])
        return f":py:obj:`~{target}`" if target else f"``{code[1]}``"

    within = False  # formulas and examples, which end at a blank line
    for i, line in enumerate(lines):
        within = bool(line) and (within or line.lstrip().startswith((".. math::", ">>>")))
        if not within:
            lines[i] = re.sub(r"`([^`]+)`", link, re.sub(r"[*|]", r"\\\g<0>", line))


def skip(app: Any, what: str, name: str, thing: Any, skipped: bool, _: Any) -> bool | None:
    """Not the function behind a module, nor the fields of tuples, whose docstring has them."""
    return True if name == "function" or type(thing).__name__ == "_tuplegetter" else None


def setup(app: Any) -> None:
    app.connect("autodoc-skip-member", skip)
    # Before napoleon, which writes markup of its own.
    app.connect("autodoc-process-docstring", as_restructured_text, priority=400)
