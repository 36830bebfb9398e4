"""The Triton kernels against the plain formula: on a GPU, else by Triton's interpreter.

The interpreter is slow: a program takes it a hundredth of a second, and there is one for every
cell of an upsampling. Hence the small shapes.
"""

from __future__ import annotations

import importlib
import os
from typing import Any

import pytest
import torch
from support import (
    MEMBERS,
    Member,
    activate,
    assert_close,
    assert_within_budget,
    inputs_of,
    lay_out,
    oracle,
    random_labels,
    random_logits,
    random_valid,
    value_and_gradient,
)
from torch import Tensor

from maxsquare import engine
from maxsquare.engine import Problem, paths, pixelwise
from maxsquare.potentials import POWER_FROM_Q, Label, Tsallis

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    # Triton asks for it when it is imported, which another module may have done before.
    os.environ["TRITON_INTERPRET"] = "1"
    for name in ("triton.language.standard", "triton.language"):
        importlib.reload(importlib.import_module(name))
kernels = importlib.import_module("maxsquare.engine.kernels")

needs_cuda = pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
# What numpy has to say of NaN and of infinities when it plays the GPU.
quiet = pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")
each_size = pytest.mark.parametrize(
    ("size", "align_corners"),
    [((5, 3), False), ((3, 4), True), ((1, 2), False), ((1, 1), True)],
)
# Either side of the q where the logarithm changes its form, and the q with a form of their own.
TSALLIS = [Tsallis(q) for q in (0.5, 1, 1.0001, POWER_FROM_Q, 2)]
GUIDED = Problem(Label(), threshold=0.6)


@pytest.fixture(autouse=True)
def by_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every computation of the library takes the path under test."""
    monkeypatch.setattr(paths, "choose_path", lambda *tensors: kernels)


def logits(*shape: int, seed: int = 0, spread: float = 2.0) -> Tensor:
    return random_logits(shape, seed=seed, spread=spread).to(DEVICE)


def valid_for(z: Tensor, problem: Problem) -> Tensor:
    return random_valid((len(z), *(problem.size or z.shape[2:])), share=0.8).to(z.device)


def assert_equal_to_plain(z: Tensor, problem: Problem, **maps: Any) -> None:
    """Sums and terms, indices and counts, and gradients for an upstream gradient that varies."""
    weigh = {"weigh": lambda counts: 1 / (1 + counts.to(z.dtype))}
    for name, how in (("accumulate", {}), ("accumulate", weigh), ("terms", {})):
        results = []
        for module in (engine, pixelwise):
            x = z.detach().requires_grad_()
            value, *integers = getattr(module, name)(x, problem, **maps, **how)
            upstream = random_logits(tuple(value.shape)).to(value)
            (slope,) = torch.autograd.grad(value, x, upstream)
            results.append((value.detach(), slope, integers))
        (value, slope, integers), (expected, expected_slope, expected_integers) = results
        assert_close(value, expected)
        assert_close(slope, expected_slope)
        assert all(map(torch.equal, integers, expected_integers))


# Losses -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("member", MEMBERS, ids=repr)
def test_value_and_gradient_equal_the_formula(member: Member) -> None:
    inputs = tuple(z.detach().to(DEVICE) for z in inputs_of(member, (1, 3, 2, 1)))
    options: dict[str, Any] = {"size": (3, 2), "align_corners": True}
    loss = member.make()
    value, gradients = value_and_gradient(lambda *heads: loss(*heads, **options), inputs)
    expected, slopes = value_and_gradient(lambda *heads: oracle(member, heads, **options), inputs)
    assert_close(value, expected)
    for gradient, slope in zip(gradients, slopes, strict=True):
        assert_close(gradient, slope)


# Potentials -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("activation", "from_logits"), [("softmax", True), ("softmax", False), ("sigmoid", False)]
)
@pytest.mark.parametrize("potential", [*TSALLIS, Label()], ids=str)
def test_potential_equals_that_of_potentials(
    potential: Tsallis | Label, activation: str, from_logits: bool
) -> None:
    binary = activation == "sigmoid"
    z = logits(2, 1 if binary else 5, 7)
    if not from_logits:
        z = activate(z, activation)
    if isinstance(potential, Tsallis):
        potential = potential._replace(normalised=from_logits)
    problem = Problem(potential, binary=binary, from_logits=from_logits, by_class=True)
    assert_equal_to_plain(z, problem, valid=valid_for(z, problem))


@pytest.mark.parametrize("q", [0.5, 1.001, 1.4])
def test_small_logarithms_keep_their_digits(q: float) -> None:
    # Confident: log p of the predicted class goes from -1 to -1e-12.
    z = torch.tensor([[[1.0, 4.0, 10.0, 28.0], [0, 0, 0, 0]]], dtype=torch.float64, device=DEVICE)
    problem = Problem(Tsallis(q))
    phi = engine.terms(z, problem)[0]
    torch.testing.assert_close(phi, pixelwise.terms(z, problem)[0], rtol=1e-9, atol=0)


# Prediction -------------------------------------------------------------------------------------


@pytest.mark.parametrize("binary", [False, True], ids=["softmax", "sigmoid"])
def test_guided_labels_and_their_slope(binary: bool) -> None:
    z, guide = logits(2, 1 if binary else 4, 3, 5), logits(2, 1 if binary else 4, 3, 5, seed=1)
    problem = GUIDED._replace(binary=binary)
    valid = valid_for(z, problem)
    assert_equal_to_plain(z, problem, guide=guide, valid=valid)
    y = engine.predict(z, problem, guide=guide, valid=valid)
    assert torch.equal(y, pixelwise.predict(z, problem, guide=guide, valid=valid))
    assert (y == -1).any() and (y >= 0).any()


def test_of_equals_the_first_is_predicted() -> None:
    z = torch.zeros(1, 5, 3, dtype=torch.float64, device=DEVICE)
    z[0, 2:, 1] = 1
    assert engine.predict(z, Problem(Label())).tolist() == [[0, 2, 0]]
    assert engine.predict(z, Problem(Label(), threshold=0.1), guide=z).tolist() == [[0, 2, 0]]


def test_given_labels() -> None:
    z = logits(2, 4, 3, 5)
    labels = random_labels(tuple(z.shape)).to(z.device)
    labels[0, 0] = 255
    problem = Problem(Label(), ignore_index=255)
    assert_equal_to_plain(z, problem, labels=labels, valid=valid_for(z, problem))
    assert_equal_to_plain(z, problem, labels=labels.clamp_min(0).to(torch.uint8))


@quiet
@pytest.mark.parametrize("label", [4, -2, 2**32 + 1])
def test_a_label_that_is_no_class_shows(label: int) -> None:
    z = logits(1, 4, 3).requires_grad_()
    labels = torch.tensor([[0, label, 1]], device=DEVICE)
    phi, _, _ = engine.terms(z, Problem(Label()), labels=labels)
    phi.sum().backward()
    assert z.grad is not None
    assert phi.isnan().tolist() == [[False, True, False]]
    assert z.grad[0].isnan().all(0).tolist() == [False, True, False]


# Upsampling -------------------------------------------------------------------------------------


@each_size
@pytest.mark.parametrize(
    "problem",
    [Problem(Tsallis(2), by_class=True), Problem(Tsallis(1.2, False), binary=True)],
    ids=["softmax", "sigmoid"],
)
def test_upsampling(problem: Problem, size: tuple[int, int], align_corners: bool) -> None:
    z = logits(1, 1 if problem.binary else 3, 2, 2)
    if problem.binary:
        z = activate(z, "sigmoid")
    problem = problem._replace(
        size=size, align_corners=align_corners, from_logits=not problem.binary
    )
    assert_equal_to_plain(z, problem, valid=valid_for(z, problem))


@pytest.mark.parametrize("source", [(2, 2), (3, 1)], ids=["same cells", "other cells"])
@pytest.mark.parametrize("align_corners", [False, True])
def test_upsampling_of_two_heads(source: tuple[int, int], align_corners: bool) -> None:
    z, guide = logits(1, 3, 2, 2), logits(1, 3, *source, seed=1)
    assert_equal_to_plain(z, GUIDED._replace(size=(5, 4), align_corners=align_corners), guide=guide)


def test_upsampling_of_many_pixels_per_cell() -> None:
    z = logits(1, 3, 1, 2)
    assert_equal_to_plain(z, Problem(Tsallis(1), size=(19, 31)))


# Memory -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [2, 33])
def test_pixels_beyond_one_tile(classes: int) -> None:
    z = logits(2, classes, kernels.MAX_PIXELS + 1)
    assert_equal_to_plain(z, Problem(Tsallis(2), by_class=True))


@pytest.mark.parametrize("size", [None, (2, 1)], ids=["as is", "upsampled"])
def test_classes_beyond_one_chunk(size: tuple[int, int] | None) -> None:
    z, guide = (logits(1, kernels.MAX_CLASSES + 3, 1, 2, seed=seed) for seed in (0, 1))
    z[:, 0] -= 1e4
    assert_equal_to_plain(z, Problem(Tsallis(1), size, by_class=True))
    assert_equal_to_plain(z, Problem(Label(), size, threshold=0.01), guide=guide)


@pytest.mark.parametrize("layout", ["channels_last", "reversed", "strided", "expanded"])
@pytest.mark.parametrize(
    "shape", [(2, 3, 7), (2, 3, 3, 5), (1, 3, 2, 3, 2), (1, 3, 3, 1, 2), (1, 3, 2, 2, 1)], ids=str
)
def test_layouts(shape: tuple[int, ...], layout: str) -> None:
    z, guide = lay_out(logits(*shape), layout), logits(*shape, seed=1)
    assert_equal_to_plain(z, GUIDED, guide=guide)
    assert_equal_to_plain(z.transpose(2, -1), Problem(Tsallis(2)))


def test_layouts_of_upsampled_logits() -> None:
    z = lay_out(logits(1, 3, 2, 2), "channels_last")
    valid = torch.ones((), dtype=torch.bool, device=DEVICE).expand(1, 3, 4)
    assert_equal_to_plain(z, Problem(Tsallis(2), (3, 4)), valid=valid)


@pytest.mark.parametrize("size", [None, (2, 3)], ids=["as is", "upsampled"])
def test_no_images(size: tuple[int, int] | None) -> None:
    assert_equal_to_plain(logits(0, 3, 2, 2), Problem(Tsallis(2), size, by_class=True))


@pytest.mark.parametrize("size", [None, (3, 4)], ids=["as is", "upsampled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_low_precision_accumulates_in_float32(
    dtype: torch.dtype, size: tuple[int, int] | None
) -> None:
    z, problem = logits(1, 3, 2, 2).to(dtype), Problem(Tsallis(1), size)
    results = [
        value_and_gradient(lambda z, f=f: f(z, problem)[0], (x,))
        for f, x in (
            (engine.accumulate, z),
            (pixelwise.accumulate, z),
            (pixelwise.accumulate, z.double()),
        )
    ]
    (value, (slope,)), (plain, (plain_slope,)), (exact, (exact_slope,)) = results
    assert value.dtype == torch.float32 and slope.dtype == dtype
    assert_within_budget(value, plain, exact, torch.float32)
    assert_within_budget(slope, plain_slope, exact_slope, dtype)


@pytest.mark.parametrize("size", [None, (3, 4)], ids=["as is", "upsampled"])
def test_repeats_are_equal_and_inputs_unchanged(size: tuple[int, int] | None) -> None:
    z, guide = logits(2, 3, 2, 2), logits(2, 3, 2, 2, seed=1)
    before = z.clone(), guide.clone()
    weights = torch.ones(2, 1, device=DEVICE)
    problem = GUIDED._replace(size=size)
    first, second = (kernels.sweep(z, problem, guide=guide, weights=weights) for _ in range(2))
    assert torch.equal(first.sums, second.sums) and torch.equal(first.slope, second.slope)
    assert torch.equal(z, before[0]) and torch.equal(guide, before[1])


# Special values ---------------------------------------------------------------------------------


@quiet
@pytest.mark.parametrize("problem", [*(Problem(p) for p in TSALLIS), GUIDED], ids=str)
def test_what_stands_at_invalid_pixels_does_not_matter(problem: Problem) -> None:
    z = logits(1, 3, 5)
    valid = torch.tensor([[True, False, True, False, True]], device=DEVICE)
    spoiled = torch.where(
        valid, z, torch.tensor([float("nan"), float("inf")] * 3, device=DEVICE)[:5]
    )
    call = lambda z: engine.accumulate(z, problem, valid=valid)[0]  # noqa: E731
    for clean, result in zip(*(value_and_gradient(call, (x,)) for x in (z, spoiled)), strict=True):
        torch.testing.assert_close(clean, result, rtol=0, atol=0)


@quiet
@pytest.mark.parametrize("potential", [Tsallis(0.5), Tsallis(1), Tsallis(2), Label()], ids=str)
def test_masked_classes_and_large_logits(potential: Tsallis | Label) -> None:
    z = logits(1, 3, 4)
    z[0, 0], z[0, 1, 0], z[0, 2, 1] = -float("inf"), 1e4, -1e4
    assert_equal_to_plain(z, Problem(potential))


@quiet
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "problem", [Problem(Tsallis(2)), Problem(Tsallis(1), by_class=True), GUIDED]
)
def test_nan_shows(problem: Problem, bad: float) -> None:
    z = logits(1, 3, 4).requires_grad_()
    with torch.no_grad():
        z[0, 1, 2] = bad
    phi, y, _ = engine.terms(z, problem, guide=z.detach() if problem == GUIDED else None)
    (slope,) = torch.autograd.grad(phi.sum(), z)
    assert phi.isnan().tolist() == [[False, False, True, False]]
    assert slope[0].isnan().all(0).tolist() == [False, False, True, False]
    assert torch.equal(y, pixelwise.terms(z, problem, guide=z if problem == GUIDED else None)[1])


# CUDA -------------------------------------------------------------------------------------------


@needs_cuda
@pytest.mark.parametrize("size", [None, (40, 60)], ids=["as is", "upsampled"])
def test_capture_in_a_graph(size: tuple[int, int] | None) -> None:
    z, problem = logits(2, 19, 8, 9).float(), Problem(Tsallis(2), size)
    weights = torch.ones(2, 1, device=DEVICE)
    expected = kernels.sweep(z, problem, weights=weights)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = kernels.sweep(z, problem, weights=weights)
    graph.replay()
    assert torch.equal(captured.sums, expected.sums)
    assert torch.equal(captured.slope, expected.slope)
