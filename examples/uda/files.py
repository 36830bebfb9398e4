"""Text files of a user, read in bounded memory: a file may be any file under the right name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from uda.errors import UserError

# Hundreds of times what settings or a label map need, and a list of all images of any data set.
LARGEST_JSON = 2**20
LARGEST_LIST = 2**22


def read_text(path: Path, largest: int) -> str:
    """The text in a UTF-8 file, which may begin with a byte order mark.

    Raises:
        ValueError: the file is longer than `largest` bytes or no text.
    """
    with path.open("rb") as file:
        content = file.read(largest + 1)
    if len(content) > largest:
        raise ValueError(f"it has more than {largest:,} bytes")
    return content.decode("utf-8-sig")


def parse_json(text: str) -> Any:
    """What a JSON text says.

    Raises:
        ValueError: it is too long, too deep or no JSON, or an object names a key twice, of which
            Python would keep the last value without a word.
    """
    if len(text) > LARGEST_JSON:
        raise ValueError(f"it has more than {LARGEST_JSON:,} characters")
    try:
        return json.loads(text, object_pairs_hook=_object)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content: dict[str, Any] = {}
    for name, value in pairs:
        if name in content:
            raise ValueError(f"it names {name!r} twice")
        content[name] = value
    return content


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of these scripts; UserError if there is none."""
    try:
        content = parse_json(read_text(path, LARGEST_JSON))
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): restore it or remove it.") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged (it holds no object): restore it or remove it.")
    return content
