"""Likely mistakes: each is an error or one warning, which says what to write instead."""

from __future__ import annotations

import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import LOSSES, Member, random_labels, random_logits
from torch import Tensor

from maxsquare import (
    InformationMaximizationLoss,
    IWMaxSquareLoss,
    MaxSquareLoss,
    MultiLevelGuidance,
    MultiLevelLoss,
    PredictionStatistics,
    TeacherLoss,
    checks,
    functional,
)

LOGITS = random_logits((2, 4, 5, 6))
FULL = (20, 24)
LABELS = random_labels((2, 4, *FULL)).clamp(min=0)
ONE_HOT = torch.nn.functional.one_hot(LABELS, 4).movedim(-1, 1)
Call = Callable[..., Any]
IMAGE_WISE: dict[str, Call] = {
    "IWMaxSquareLoss": IWMaxSquareLoss(),
    "InformationMaximizationLoss": InformationMaximizationLoss(IWMaxSquareLoss()),
    "MultiLevelLoss": lambda z, **call: MultiLevelLoss(IWMaxSquareLoss())(z, z, **call),
    "max_square": lambda z, **call: functional.max_square(z, ratio=0.2, **call),
    "entropy": lambda z, **call: functional.entropy(z, ratio=0.2, **call),
    "tsallis_entropy": lambda z, **call: functional.tsallis_entropy(z, 1.5, ratio=0.2, **call),
    "image_weights": functional.image_weights,
}
WITH_LABELS = {**IMAGE_WISE, "cross_entropy": functional.cross_entropy}


def each(calls: dict[str, Call]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("call", calls.values(), ids=calls)


def told(call: Call, *inputs: Any, **options: Any) -> str:
    """The error's sentence."""
    with pytest.raises(ValueError) as caught:
        call(*inputs, **options)
    return str(caught.value)


def warned(call: Call, *inputs: Any, **options: Any) -> list[str]:
    """The warnings' sentences, as Python shows them: one for each line and text."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(2):
            call(*inputs, **options)
    return [str(warning.message) for warning in caught]


# Labels -------------------------------------------------------------------------------------------


@each(WITH_LABELS)
def test_labels_of_full_resolution_without_size_are_told_the_size(call: Call) -> None:
    assert "write size=labels.shape[-2:]" in told(call, LOGITS, labels=LABELS)
    call(LOGITS, labels=LABELS, size=LABELS.shape[-2:])
    # Coarser ones have no such remedy.
    assert "size=" not in told(call, LOGITS, labels=LABELS[:, :4, :4])


@pytest.mark.parametrize("member", LOSSES, ids=repr)
def test_a_mask_of_full_resolution_without_size_is_told_the_size(member: Member) -> None:
    inputs = (LOGITS,) * member.heads
    assert "write size=valid.shape[-2:]" in told(member.make(), *inputs, valid=LABELS > 0)
    assert "write size=valid.shape[-2:]" in told(member.function, *inputs, valid=LABELS > 0)


@pytest.mark.parametrize(
    "call",
    [MultiLevelGuidance(), functional.guidance_loss, functional.guidance_labels],
    ids=["MultiLevelGuidance", "guidance_loss", "guidance_labels"],
)
def test_heads_of_different_resolution_without_size_are_told_the_size(call: Call) -> None:
    assert "write size=images.shape[-2:]" in told(call, LOGITS, LOGITS[..., :3])
    for teacher in (TeacherLoss(), functional.teacher_loss):
        assert "write size=images.shape[-2:]" in told(teacher, LOGITS, LOGITS[..., :3])


@each(WITH_LABELS)
@pytest.mark.parametrize("dtype", [torch.long, torch.float32, torch.bool], ids=str)
def test_one_hot_labels_are_told_to_be_classes(call: Call, dtype: torch.dtype) -> None:
    one_hot = ONE_HOT.to(dtype)
    for labels, axis in ((one_hot, "1"), (one_hot.movedim(1, -1), "-1")):
        sentence = told(call, LOGITS, labels=labels, size=FULL)
        assert "one-hot" in sentence and "write labels" in sentence
        written = sentence.partition("write ")[2]
        assert torch.equal(eval(written, {"labels": labels}), LABELS)
        assert f"argmax({axis})" in sentence
    # Both mistakes at once.
    assert "size=labels.shape[-2:]" in told(call, LOGITS, labels=one_hot)


def test_one_hot_labels_of_pixels_without_an_image_are_told_to_be_classes() -> None:
    logits, labels = random_logits((9, 4)), torch.eye(4)[random_labels((9, 4)).clamp(min=0)]
    assert "write labels.argmax(1)" in told(functional.cross_entropy, logits, labels)


def test_overlapping_classes_are_told_the_loss_to_take() -> None:
    sentence = told(functional.cross_entropy, LOGITS, ONE_HOT, size=FULL, activation="sigmoid")
    assert "torch.nn.functional.binary_cross_entropy_with_logits(logits, labels.float())" in (
        sentence
    )
    assert "labels.argmax(1)" in sentence
    assert "binary" not in told(functional.cross_entropy, LOGITS, ONE_HOT, size=FULL)


@each(IMAGE_WISE)
@pytest.mark.parametrize("ignored", [-1, 255])
def test_labels_that_leave_an_image_nothing_to_count_are_one_warning(
    call: Call, ignored: int
) -> None:
    labels = LABELS.clone()
    labels[1] = ignored
    valid = torch.ones_like(labels, dtype=torch.bool)
    (sentence,) = warned(call, LOGITS, labels=labels, size=FULL)
    assert "image 1" in sentence and "labels=None" in sentence
    valid[1] = False
    assert warned(call, LOGITS, labels=labels, size=FULL, valid=valid) == []
    assert warned(call, LOGITS, labels=LABELS, size=FULL) == []


def test_labels_that_leave_a_channel_nothing_to_count_name_its_image() -> None:
    labels = LABELS.clone()
    labels[1] = -1
    (sentence,) = warned(IWMaxSquareLoss(activation="sigmoid"), LOGITS, labels=labels, size=FULL)
    assert "image 1" in sentence


# Size ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("member", LOSSES, ids=repr)
@pytest.mark.parametrize("size", [(4, 24), (20, 5), (1, 1), 4])
def test_a_size_below_the_logits_is_one_warning(member: Member, size: Any) -> None:
    inputs = (LOGITS,) * member.heads
    for call in (member.make(), member.function):
        sentences = warned(call, *inputs, size=size)
        # In the tests the function of a multi-level loss is two functions.
        assert len(set(sentences)) == 1 and len(sentences) <= member.heads
        assert "smaller than the logits (5, 6)" in sentences[0]
        assert "write size=None" in sentences[0]
        assert warned(call, *inputs, size=(5, 6)) == []


# Probabilities ------------------------------------------------------------------------------------

each_activation = pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
P = {"softmax": LOGITS.softmax(1), "sigmoid": LOGITS.sigmoid()}
OF_ONE_HEAD: dict[str, Call] = {
    "max_square": functional.max_square,
    "entropy": functional.entropy,
    "tsallis_entropy": lambda z, **call: functional.tsallis_entropy(z, 1.5, **call),
    "pseudo_label_loss": functional.pseudo_label_loss,
    "image_weights": functional.image_weights,
    "class_proportions": functional.class_proportions,
    "cross_entropy": lambda z, **call: functional.cross_entropy(z, LABELS[:, :5, :6], **call),
}
OF_TWO_HEADS: dict[str, Call] = {
    "guidance_loss": functional.guidance_loss,
    "guidance_labels": functional.guidance_labels,
    "teacher_loss": functional.teacher_loss,
    "MultiLevelGuidance": lambda *heads, **call: MultiLevelGuidance(**call)(*heads),
    "MultiLevelLoss": lambda *heads, **call: MultiLevelLoss(MaxSquareLoss(**call))(*heads),
    "TeacherLoss": lambda *heads, **call: TeacherLoss(**call)(*heads),
}


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """No line has called a function yet."""
    monkeypatch.setattr(checks, "_CALLS_READ", set())


@pytest.mark.usefixtures("unread")
@each(OF_ONE_HEAD)
@each_activation
def test_probabilities_given_to_a_function_are_one_warning(call: Call, activation: str) -> None:
    (sentence,) = warned(call, P[activation], activation=activation)
    assert f"as logits, and takes logits: leave the {activation} to the loss" in sentence
    assert ("from_logits=False" in sentence) != ("cross_entropy" in sentence)


@pytest.mark.usefixtures("unread")
@each(OF_TWO_HEADS)
@each_activation
def test_probabilities_given_as_another_head_are_one_warning(call: Call, activation: str) -> None:
    with pytest.warns(UserWarning) as caught:
        call(LOGITS, P[activation], activation=activation)
    (sentence,) = (str(warning.message) for warning in caught)
    assert re.search(r"as (low|teacher)_logits, and takes logits: leave the ", sentence)
    assert f"leave the {activation} to the loss" in sentence


@pytest.mark.usefixtures("unread")
def test_a_list_of_heads_is_read_whole_and_once() -> None:
    heads = [LOGITS, P["softmax"]]
    multi_level = MultiLevelLoss(MaxSquareLoss())
    for call in (MultiLevelGuidance(), multi_level, functional.guidance_loss):
        (sentence,) = warned(call, LOGITS, heads)
        assert "as low_logits" in sentence


@pytest.mark.usefixtures("unread")
def test_every_line_that_calls_a_function_is_read_once() -> None:
    functional.entropy(LOGITS)
    with pytest.warns(UserWarning, match="looks like probabilities") as caught:
        functional.entropy(P["softmax"])
    assert caught[0].filename == __file__
    for logits in (LOGITS, P["softmax"]):
        functional.entropy(logits)


@pytest.mark.usefixtures("unread")
def test_a_module_does_not_keep_a_function_from_being_read() -> None:
    MaxSquareLoss()(LOGITS)
    with pytest.warns(UserWarning, match="looks like probabilities") as caught:
        MaxSquareLoss()(P["softmax"])
    assert len(caught) == 1
    with pytest.warns(UserWarning, match="looks like probabilities"):
        functional.max_square(P["softmax"])


def test_statistics_of_probabilities_are_one_warning() -> None:
    statistics = PredictionStatistics()
    (sentence,) = warned(statistics.update, P["softmax"])
    assert "leave the softmax to the loss." in sentence


@pytest.mark.usefixtures("unread")
def test_transforms_and_compilers_read_nothing() -> None:
    p, low = P["softmax"], P["softmax"]
    torch.func.grad(functional.max_square)(p)
    torch.func.vmap(functional.entropy)(p.unsqueeze(0))
    functional.entropy(p.to("meta"))
    for call in (functional.guidance_loss, MultiLevelLoss(IWMaxSquareLoss())):
        torch.compile(call, backend="eager", fullgraph=True)(p, low, size=(4, 4))
    assert not checks._CALLS_READ


def test_a_compiler_does_not_specialise_on_a_size_below_the_logits() -> None:
    class Loss(torch.nn.Module):
        def forward(self, logits: Tensor, like: Tensor) -> Tensor:
            return functional.max_square(logits, size=like.shape[-2:])

    height, width = torch.export.Dim("height"), torch.export.Dim("width")
    program = torch.export.export(
        Loss(),
        (LOGITS, torch.zeros(9, 11)),
        dynamic_shapes=({}, {0: height, 1: width}),
    )
    for size in ((3, 4), (5, 30)):
        expected = functional.max_square(LOGITS, size=size)
        assert torch.equal(program.module()(LOGITS, torch.zeros(size)), expected)


def test_a_warning_points_at_the_callers_line_from_the_command_line() -> None:
    script = (
        "import torch; from maxsquare import MaxSquareLoss, functional\n"
        "MaxSquareLoss()(torch.zeros(1, 2, 5, 5), size=4)\n"
        "functional.entropy(torch.zeros(1, 2, 5, 5), size=4)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stderr.count("maxsquare: size (4, 4) is smaller") == 2
    assert "<string>:2:" in done.stderr and "<string>:3:" in done.stderr
