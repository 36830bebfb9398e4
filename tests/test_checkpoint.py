"""Promises of uda.checkpoint: nothing is lost, nothing unsafe runs, errors say what to do."""

from __future__ import annotations

import io
import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from uda import checkpoint
from uda.errors import UserError

STATE = {"network": "small", "classes": 19, "step": 3, "model": {"w": torch.arange(4000.0)}}


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    checkpoint.save(path, {"step": 1})
    checkpoint.save(path, STATE)
    state = checkpoint.load(path, expect={"network": "small", "classes": 19})
    assert torch.equal(state.pop("model")["w"], STATE["model"]["w"])
    assert state == {key: value for key, value in STATE.items() if key != "model"}
    assert os.listdir(tmp_path) == ["last.pt"]


def test_a_kill_while_writing_leaves_the_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "last.pt"
    checkpoint.save(path, STATE)

    def killed(descriptor: int) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "fsync", killed)
        checkpoint.save(path, STATE | {"step": 4})
    assert checkpoint.load(path)["step"] == 3
    checkpoint.save(path, STATE | {"step": 5})
    assert checkpoint.load(path)["step"] == 5
    assert os.listdir(tmp_path) == ["last.pt"]


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    path = tmp_path / "last.pt"
    checkpoint.save(path, STATE)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # A limit on the size of files makes writes fail half-way, as a full disk does.
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))
    try:
        with pytest.raises(
            UserError, match=r"last\.pt could not be written \(File too large\).*free "
        ):
            checkpoint.save(path, STATE | {"step": 4})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert checkpoint.load(path)["step"] == 3
    assert os.listdir(tmp_path) == ["last.pt"]


LOADER_DIED = RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")


@pytest.mark.parametrize("signalled", [KeyboardInterrupt(), LOADER_DIED], ids=["Ctrl-C", "loader"])
def test_what_a_signal_raises_while_torch_writes_is_no_failed_write(
    signalled: BaseException, tmp_path: Path
) -> None:
    class Interrupted(io.BytesIO):
        def write(self, _: object) -> int:
            raise signalled

    def before_torch_writes(_: object) -> None:
        raise signalled

    path = tmp_path / "last.pt"
    checkpoint.save(path, STATE)
    for content in (lambda _: torch.save(STATE, Interrupted()), before_torch_writes):
        with pytest.raises(type(signalled)) as raised:
            checkpoint.write(path, content)
        assert raised.value is signalled
    assert checkpoint.load(path)["step"] == 3


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone/last\.pt could not be written \(No such file"):
        checkpoint.save(tmp_path / "gone" / "last.pt", STATE)


@pytest.mark.parametrize("kept", [0.0, 0.01, 0.5, 0.99])
def test_a_half_written_file_is_refused(kept: float, tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    checkpoint.save(path, STATE)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(UserError, match=r"last\.pt cannot be read as a checkpoint"):
        checkpoint.load(path)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"\x89PNG\r\n\x1a\n"])
def test_a_file_of_another_kind_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "other").write_bytes(content)
    with pytest.raises(UserError, match="other cannot be read as a checkpoint"):
        checkpoint.read(tmp_path / "other")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.pt cannot be read .*No such file"):
        checkpoint.load(tmp_path / "none.pt")


@pytest.mark.parametrize(
    ("expect", "message"),
    [
        ({"classes": 16}, r"last\.pt was written with classes = 19.*this run has classes = 16"),
        ({"network": "resnet101"}, r"network = small.*network = resnet101"),
        ({"stage": "source"}, r"last\.pt is no checkpoint .* no entry 'stage'"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(
    expect: dict[str, object], message: str, tmp_path: Path
) -> None:
    checkpoint.save(tmp_path / "last.pt", STATE)
    with pytest.raises(UserError, match=message):
        checkpoint.load(tmp_path / "last.pt", expect=expect)


def test_a_checkpoint_without_a_needed_entry_is_refused(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "last.pt", STATE)
    assert checkpoint.load(tmp_path / "last.pt", needs=("model", "step"))["step"] == 3
    with pytest.raises(UserError, match=r"last\.pt is no checkpoint .* no entry 'random'"):
        checkpoint.load(tmp_path / "last.pt", needs=("model", "random"))


def test_a_flipped_bit_among_the_weights_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    torch.save({"model": {"w": torch.zeros(1000)}}, path)
    content = bytearray(path.read_bytes())
    content[content.index(bytes(4000)) + 2000] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="last/data/0 in it is damaged"):
        checkpoint.read(path)


@pytest.mark.parametrize("kind", [np.float64, np.float32, np.int64])
def test_numpy_numbers_of_published_checkpoints_are_read(kind: type, tmp_path: Path) -> None:
    torch.save({"best_MIou": kind(44.25)}, tmp_path / "published.pth")
    best = checkpoint.read(tmp_path / "published.pth")["best_MIou"]
    assert best == kind(44.25).item() and type(best) in (int, float)


def test_the_random_state_survives_a_checkpoint(tmp_path: Path) -> None:
    def draw() -> list[float]:
        cuda = torch.rand(2, device="cuda").tolist() if torch.cuda.is_available() else []
        return [random.random(), random.gauss(0, 1), *np.random.randn(3), *torch.rand(2), *cuda]

    draw()  # leaves half of a pair of normal numbers waiting in two of the generators
    checkpoint.save(tmp_path / "last.pt", {"random": checkpoint.random_state()})
    wanted = draw()
    draw()
    checkpoint.restore_random_state(checkpoint.load(tmp_path / "last.pt")["random"])
    assert draw() == wanted
