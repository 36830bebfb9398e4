"""Export a trained model as one small file for others: its weights in half precision.

    python examples/export_model.py runs/source/source-only/last.pt model.safetensors

Opening the file runs no code from it. It holds the settings of its run without the folders of that
machine, so that evaluate.py and train_uda.py --init can read it directly.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from uda import checkpoint, report
from uda.errors import UserError

# Settings that only make sense on the machine of the run.
LOCAL = ("out", "data_root", "init", "resume")


@dataclass(frozen=True)
class Options:
    """Write the weights of a checkpoint as a safetensors file in half precision."""

    checkpoint: tyro.conf.Positional[Path]
    """A checkpoint of train_uda.py."""
    out: tyro.conf.Positional[Path]
    """The file to write, new, with the ending .safetensors."""


def main(arguments: Sequence[str] | None = None) -> int:
    return report.exit_code(lambda: run(report.command_line(Options, arguments)))


def run(options: Options) -> None:
    if options.out.suffix != ".safetensors":
        raise UserError(f"{options.out} does not end in .safetensors: choose such a name.")
    if options.out.exists():
        raise UserError(f"{options.out} exists: choose another name, or remove it.")
    state = checkpoint.load(options.checkpoint, needs=("model", "settings"))
    settings = {name: value for name, value in state["settings"].items() if name not in LOCAL}
    checkpoint.export(options.out, state["model"], settings)
    print(f"{options.out}: {options.out.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    sys.exit(main())
