"""Losses are constructed, shown, copied, pickled, subclassed and compiled as modules are."""

from __future__ import annotations

import copy
import inspect
import pickle
import re
import subprocess
import sys
import typing

import pytest
import torch
from support import LOSSES, Member, random_logits
from torch import Tensor, nn

import maxsquare
from maxsquare import (
    EntropyLoss,
    InformationMaximizationLoss,
    IWEntropyLoss,
    IWMaxSquareLoss,
    MaxSquareLoss,
    MultiLevelGuidance,
    MultiLevelLoss,
    PseudoLabelLoss,
    TeacherLoss,
    TsallisEntropyLoss,
    functional,
)
from maxsquare.checks import check_options

each_loss = pytest.mark.parametrize("member", LOSSES, ids=repr)
FUNCTIONS = {
    MaxSquareLoss: functional.max_square,
    IWMaxSquareLoss: functional.max_square,
    EntropyLoss: functional.entropy,
    IWEntropyLoss: functional.entropy,
    TsallisEntropyLoss: functional.tsallis_entropy,
    PseudoLabelLoss: functional.pseudo_label_loss,
    MultiLevelGuidance: functional.guidance_loss,
    TeacherLoss: functional.teacher_loss,
}
OTHER_FUNCTIONS = [
    functional.cross_entropy,
    functional.image_weights,
    functional.guidance_labels,
    functional.class_proportions,
]
OF_A_CALL = {"logits", "low_logits", "teacher_logits", "size", "align_corners", "valid", "labels"}


@pytest.mark.parametrize("loss", FUNCTIONS, ids=lambda loss: loss.__name__)
def test_the_signature_names_every_option_of_the_function(loss: type[nn.Module]) -> None:
    options = set(inspect.signature(loss).parameters)
    assert options == set(inspect.signature(FUNCTIONS[loss]).parameters) - OF_A_CALL


@pytest.mark.parametrize("option", ["reduction", "scale", "activation", "average"])
def test_the_types_of_options_are_the_values_that_they_take(option: str) -> None:
    callables = [*(loss.__init__ for loss in FUNCTIONS), *FUNCTIONS.values(), *OTHER_FUNCTIONS]
    types = {typing.get_type_hints(call).get(option) for call in callables} - {None}
    (literal,) = types
    assert typing.get_origin(literal) is typing.Literal
    with pytest.raises(ValueError) as caught:
        check_options(**{option: "other"})
    assert str(caught.value) == f"{option} must be {_or(typing.get_args(literal))}, not 'other'"


def _or(values: tuple[str, ...]) -> str:
    return " or ".join(map(repr, values))


def test_the_documentation_of_the_package_lists_modules_and_functions() -> None:
    listed = set(re.findall(r"`(\w+)`", maxsquare.__doc__))
    named = {*maxsquare.__all__, *functional.__all__} - {"functional", "GradientProfile"}
    assert listed == named


def make(member: Member) -> tuple[nn.Module, tuple[Tensor, ...]]:
    return member.make(), (random_logits((2, 4, 5, 6)),) * member.heads


@each_loss
def test_copies_and_pickles_compute_the_same(member: Member) -> None:
    loss, heads = make(member)
    expected = loss(*heads, size=(7, 9))
    for other in (copy.copy(loss), copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert torch.equal(other(*heads, size=(7, 9)), expected)
        assert repr(other) == repr(loss)


@each_loss
def test_a_loss_is_constructed_within_a_compiled_function(member: Member) -> None:
    _, heads = make(member)
    expected = member.make()(*heads, size=(7, 9))

    def compute(*heads: Tensor) -> Tensor:
        return member.make()(*heads, size=(7, 9))

    torch._dynamo.reset()  # every loss is another constant of the same code
    compiled = torch.compile(compute, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*heads), expected)


def test_options_that_change_after_construction_count() -> None:
    logits, low_logits = random_logits((2, 4, 5, 6)), random_logits((2, 4, 5, 6), seed=1)
    loss = MultiLevelLoss(InformationMaximizationLoss(MaxSquareLoss()), threshold=0.5)
    loss.target_loss.target_loss.reduction = "none"
    assert loss(logits, low_logits).shape == (2, 5, 6)
    expected = MultiLevelLoss(MaxSquareLoss(reduction="sum"), threshold=0.5)
    loss = MultiLevelLoss(MaxSquareLoss(), threshold=0.5)
    loss.target_loss.reduction = "sum"
    assert torch.equal(loss(logits, low_logits), expected(logits, low_logits))


def test_a_subclass_with_an_option_of_its_own_works_and_shows_it() -> None:
    class Cooled(IWMaxSquareLoss):
        def __init__(self, temperature: float, ratio: float = 0.3) -> None:
            super().__init__(ratio, scale="reference")
            self.temperature = temperature

        def forward(self, logits: Tensor, **call: object) -> Tensor:
            return super().forward(logits / self.temperature, **call)

    logits = random_logits((2, 4, 5, 6))
    expected = IWMaxSquareLoss(0.3, scale="reference")(logits / 2)
    assert torch.equal(Cooled(2)(logits), expected)
    assert "temperature=2" in repr(Cooled(2)) and "ratio=0.3" in repr(Cooled(2))


@pytest.mark.parametrize("loss", [MaxSquareLoss, EntropyLoss])
def test_a_ratio_makes_a_plain_loss_image_wise(loss: type[nn.Module]) -> None:
    logits = random_logits((2, 4, 5, 6))
    image_wise = {MaxSquareLoss: IWMaxSquareLoss, EntropyLoss: IWEntropyLoss}[loss]
    assert torch.equal(loss(ratio=0.4)(logits), image_wise(0.4)(logits))
    with pytest.raises(TypeError, match="ratio"):
        image_wise(ratio=None)


def test_the_library_imports_neither_a_compiler_nor_triton() -> None:
    script = "import sys, maxsquare; print({'torch._dynamo', 'triton'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stderr
