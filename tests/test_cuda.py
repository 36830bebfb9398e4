"""The Triton kernels against the plain formula: on a GPU, else by Triton's interpreter.

The interpreter is slow: a program takes it a hundredth of a second, and there is one for every
cell of an upsampling. Hence the small shapes.
"""

from __future__ import annotations

import importlib
import math
import re
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support import (
    LOSSES,
    Member,
    assert_close,
    assert_within_budget,
    inputs_of,
    lay_out,
    loss_named,
    oracle,
    random_labels,
    random_logits,
    random_valid,
    triton_kernels,
    value_and_gradient,
)
from torch import Tensor

from maxsquare.engine import LogitsSpec, operators, plain
from maxsquare.potentials import POWER_FROM_Q, CrossEntropy, Linear, Potential, Tsallis

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
cuda = triton_kernels()
if cuda is None:
    pytest.skip("needs Triton 3.7, or 3.4 with a GPU", allow_module_level=True)
triton = importlib.import_module("triton")

needs_cuda = pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
# What numpy has to say of NaN and of infinities when it plays the GPU.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")
each_size = pytest.mark.parametrize(
    ("size", "align_corners"),
    [(None, False), ((5, 3), False), ((3, 4), True), ((1, 2), False), ((1, 1), True)],
    ids=str,
)
each_resolution = pytest.mark.parametrize("size", [None, (3, 4)], ids=["as is", "upsampled"])
# Either side of the q where the logarithm changes its form, and the q with a form of their own.
POTENTIALS = [*(Tsallis(q) for q in (0.5, 1, 1.0001, POWER_FROM_Q)), Tsallis(2, -1), CrossEntropy()]


@pytest.fixture(autouse=True)
def fresh_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    """Launches are planned once, but tests change the constants of the plans."""
    monkeypatch.setattr(cuda, "_LAUNCHES", {})


def logits(*shape: int, seed: int = 0, spread: float = 2.0) -> Tensor:
    return random_logits(shape, seed=seed, spread=spread).to(DEVICE)


def surrounded(z: Tensor, value: float = float("nan")) -> Tensor:
    """The same inside a larger buffer of NaN, which a read or write out of bounds meets."""
    buffer = torch.full([n + 2 for n in z.shape], value, dtype=z.dtype, device=z.device)
    inner = buffer[tuple(slice(1, -1) for _ in z.shape)]
    inner.copy_(z)
    return inner


def assert_sums_equal(
    z: Tensor,
    potential: Potential,
    spec: LogitsSpec = LogitsSpec(),  # noqa: B008
    valid: Tensor | None = None,
    y: Tensor | None = None,
    by_class: bool = True,
) -> None:
    """Sums and gradients of the kernels are those of the plain formula."""
    classes, shape = spec.classes(z), (len(z), *spec.spatial(z))
    if isinstance(potential, Linear):
        y = None
    elif y is None and (by_class or isinstance(potential, CrossEntropy)):
        y = random_labels((shape[0], classes, *shape[1:])).to(z.device)
    y = None if y is None else y.to(plain.index_dtype(classes))
    weights = 0.5 + torch.rand(len(z), classes if by_class else 1, dtype=torch.float64)
    weights = weights.to(z.device, plain.accumulation_dtype(z.dtype))
    arguments = (z, weights, y, valid, potential, spec)
    sums, grad = cuda.weighted_sum(*arguments, True)
    expected, expected_grad = plain.weighted_sum(*arguments, True)
    assert_close(sums, expected, z.dtype)
    assert_close(grad, expected_grad, z.dtype)
    alone, none = cuda.weighted_sum(*arguments, False)
    # Value alone may be added in another order.
    assert_close(alone, sums, z.dtype)
    assert none is None


def assert_classes_equal(
    z: Tensor,
    spec: LogitsSpec = LogitsSpec(),  # noqa: B008
    *,
    guide: Tensor | None = None,
    labels: Tensor | None = None,
    valid: Tensor | None = None,
    threshold: float | None = None,
) -> None:
    """Classes and counts of the kernels are those of the plain formula."""
    arguments = (z, guide, labels, valid, spec, threshold)
    y, counts = cuda.classify(*arguments)
    expected_y, expected_counts = plain.classify(*arguments)
    assert torch.equal(y, expected_y)
    assert torch.equal(counts, expected_counts)


@pytest.mark.parametrize("member", LOSSES, ids=repr)
def test_value_and_gradient_of_a_loss_equal_the_formula(
    member: Member, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operators, "kernels_for", lambda z: cuda)
    inputs = tuple(z.detach().to(DEVICE) for z in inputs_of(member, (1, 3, 2, 1)))
    options: dict[str, Any] = {"size": (3, 2), "align_corners": True}
    loss = member.make()
    value, gradients = value_and_gradient(lambda *heads: loss(*heads, **options), inputs)
    expected, slopes = value_and_gradient(lambda *heads: oracle(member, heads, **options), inputs)
    assert_close(value, expected)
    for gradient, slope in zip(gradients, slopes, strict=True):
        assert_close(gradient, slope)


@each_size
@pytest.mark.parametrize("potential", POTENTIALS, ids=str)
def test_sums_and_gradients(potential: Potential, size: Any, align_corners: bool) -> None:
    assert_sums_equal(logits(1, 3, 2, 3), potential, LogitsSpec(size, align_corners))


@each_size
def test_classes(size: Any, align_corners: bool) -> None:
    z, spec = logits(1, 3, 2, 3), LogitsSpec(size, align_corners)
    # A guide of another resolution, and one of the same.
    guide = z.roll(1, 1) if size is None else logits(1, 3, 3, 2, seed=1)
    valid = random_valid((1, *spec.spatial(z)), share=0.8).to(DEVICE)
    assert_classes_equal(z, spec)
    assert_classes_equal(z, spec, threshold=0.6, valid=valid)
    assert_classes_equal(z, spec, threshold=0.6, guide=guide)
    assert_classes_equal(z, spec, threshold=0.6, guide=z.roll(1, 1))


@each_size
def test_class_sums(size: Any, align_corners: bool) -> None:
    z, spec = logits(2, 3, 2, 3), LogitsSpec(size, align_corners)
    valid = random_valid((2, *spec.spatial(z)), share=0.8).to(DEVICE)
    for mask in (None, valid):
        assert_close(cuda.class_sums(z, mask, spec), plain.class_sums(z, mask, spec))


@each_resolution
def test_class_sums_leave_out_whatever_stands_at_other_pixels(size: Any) -> None:
    z, spec = logits(1, 3, 2, 3), LogitsSpec(size)
    valid = torch.ones(1, *spec.spatial(z), dtype=torch.bool, device=DEVICE)
    valid[..., 0] = False
    z[:, 1, :, 0] = -torch.inf if size else torch.nan
    found = cuda.class_sums(z, valid, spec)
    assert found.isfinite().all()
    assert_close(found, plain.class_sums(z, valid, spec))


@each_resolution
@pytest.mark.parametrize("weighted_by", ["class", "image"])
def test_masks_and_weights(size: Any, weighted_by: str) -> None:
    z, spec = logits(2, 3, 2, 2), LogitsSpec(size)
    valid = random_valid((2, *spec.spatial(z))).to(DEVICE)
    by_class = weighted_by == "class"
    assert_sums_equal(z, Tsallis(2, -1), spec, valid, by_class=by_class)
    assert_sums_equal(z, Linear(), spec, valid)


@each_resolution
def test_a_single_channel_is_a_problem_of_two_classes(size: Any) -> None:
    z, spec = logits(2, 1, 2, 2), LogitsSpec(size, binary=True)
    assert_sums_equal(z, Tsallis(1), spec)
    assert_sums_equal(z, Linear(), spec)
    assert_classes_equal(z, spec, threshold=0.7)
    assert_close(cuda.class_sums(z, None, spec), plain.class_sums(z, None, spec))


def test_classes_of_labels_are_counted() -> None:
    z, labels = logits(2, 3, 2, 4), torch.tensor([[[0, 1, 2, -1], [3, -7, 255, 2**33]]] * 2)
    valid = random_valid((2, 2, 4)).to(DEVICE)
    assert_classes_equal(z, labels=labels.to(DEVICE), valid=valid)


@pytest.mark.parametrize("kernels", [cuda, None], ids=["kernels", "plain formula"])
@pytest.mark.parametrize("order", [(1, 2, 0), (0, 2, 1)], ids=["batch last", "width first"])
def test_labels_of_any_layout(
    order: tuple[int, int, int], kernels: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operators, "kernels_for", lambda z: kernels)
    z, loss = logits(2, 3, 3, 4), loss_named("iw_max_square").make()
    labels = random_labels(tuple(z.shape)).to(DEVICE)
    stored = lay_out_map(labels, order)
    assert torch.equal(stored, labels) and not stored.is_contiguous()
    value, gradients = value_and_gradient(lambda z: loss(z, labels=labels), (z,))
    torch.compiler.reset()  # what it compiled for other kernels
    compiled = torch.compile(loss, fullgraph=True)
    for call in (loss, compiled):
        result = value_and_gradient(lambda z, call=call: call(z, labels=stored), (z,))
        assert_close(result[0], value)
        assert_close(result[1][0], gradients[0])


def lay_out_map(y: Tensor, order: tuple[int, int, int]) -> Tensor:
    """The same map, whose dimensions are stored in this order."""
    back = tuple(order.index(dim) for dim in range(3))
    return y.permute(order).contiguous().permute(back)


@pytest.mark.parametrize("classes", [2, 33])
def test_pixels_beyond_one_tile(classes: int) -> None:
    z = logits(1, classes, 9, 131)
    assert_sums_equal(z, Tsallis(2, -1))
    assert_classes_equal(z)
    assert_close(cuda.class_sums(z, None, LogitsSpec()), plain.class_sums(z, None, LogitsSpec()))


UPSAMPLINGS = {
    "strips of several cells": ((3, 9), (4, 34), True),
    "cells wider than a strip": ((2, 2), (2, 40), True),
    "half a cell before the first corner": ((2, 9), (7, 36), False),
    "one row and column": ((1, 1), (5, 40), True),
    "fewer pixels than corners": ((7, 37), (3, 5), False),
}


@pytest.mark.parametrize("name", UPSAMPLINGS)
def test_upsampled_by_any_ratio(name: str) -> None:
    spatial, size, align_corners = UPSAMPLINGS[name]
    z, spec = logits(1, 3, *spatial), LogitsSpec(size, align_corners)
    assert_sums_equal(z, Tsallis(1.2), spec)
    assert_classes_equal(z, spec)
    assert_close(cuda.class_sums(z, None, spec), plain.class_sums(z, None, spec))


@pytest.mark.parametrize("align_corners", [False, True])
def test_corners_that_programs_share(align_corners: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bands of several rows of cells, as in large images."""
    monkeypatch.setattr(cuda, "PROGRAMS", 6)
    z, spec = logits(1, 2, 5, 5), LogitsSpec((9, 41), align_corners)
    launch = cuda.Launch(z, spec, [])
    assert launch.band > 1 and launch.bands > 1 and launch.strips > 1
    assert_sums_equal(z, Tsallis(2, -1), spec)
    assert_classes_equal(z, spec, threshold=0.5, guide=logits(1, 2, 5, 5, seed=1))


def test_pixels_beyond_one_program_that_counts() -> None:
    assert_classes_equal(logits(1, 2, 1, cuda.COUNTED + 3))


@pytest.mark.parametrize(
    "size",
    # The interpreter takes a minute.
    [None, pytest.param((3, 4), marks=pytest.mark.stress)],
    ids=["as is", "upsampled"],
)
def test_classes_beyond_one_chunk(size: Any) -> None:
    z, spec = logits(1, cuda.MAX_BINS + 2, 2, 1), LogitsSpec(size)
    assert_sums_equal(z, Tsallis(1.2), spec)
    assert_sums_equal(z, CrossEntropy(), spec)
    assert_sums_equal(z, Linear(), spec)
    assert_close(cuda.class_sums(z, None, spec), plain.class_sums(z, None, spec))
    assert_classes_equal(z, spec, threshold=0.01, guide=z.roll(1, 1))
    z[:, :] = 0
    assert_classes_equal(z, spec)


@pytest.mark.parametrize("layout", ["channels_last", "reversed", "strided", "expanded"])
@pytest.mark.parametrize("shape", [(1, 3, 2, 3), (1, 3, 2, 1, 3), (1, 2, 5)], ids=str)
def test_layouts(shape: tuple[int, ...], layout: str) -> None:
    z = lay_out(logits(*shape), layout)
    assert_sums_equal(z, Tsallis(2, -1))
    assert_classes_equal(z, threshold=0.5, guide=logits(*shape, seed=1))


def test_layouts_of_upsampled_logits() -> None:
    z, spec = lay_out(logits(1, 3, 2, 3), "channels_last"), LogitsSpec((3, 4))
    assert_sums_equal(z, Tsallis(2, -1), spec)
    assert_classes_equal(z, spec)


def test_full_resolution_is_read_in_vectors_where_they_are_whole() -> None:
    """All strides of 8, of 2, and odd ones: the same results."""
    for width in (8, 6, 5):
        z = logits(2, 3, 2, width)
        assert cuda.Launch(z, LogitsSpec(), []).config.unit == math.gcd(8, 2 * width)
        assert_sums_equal(z, Tsallis(2, -1))
        assert_classes_equal(z)


@each_resolution
def test_nothing_beside_the_tensors_is_read_or_written(
    size: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    z, guide = surrounded(logits(2, 3, 2, 3)), surrounded(logits(2, 3, 2, 3, seed=1))
    weights = surrounded(torch.ones(2, 3, dtype=z.dtype, device=DEVICE))
    spec = LogitsSpec(size, align_corners=True)
    y, counts = cuda.classify(z, guide, None, None, spec, 0.5)
    expected = plain.classify(z, guide, None, None, spec, 0.5)
    assert torch.equal(y, expected[0]) and torch.equal(counts, expected[1])
    arguments = (z, weights, y, None, Tsallis(1), spec, True)
    # Every tensor that a call allocates lies inside a buffer, too.
    buffers: list[tuple[Tensor, Tensor]] = []

    def allocate(shape: Any, dtype: torch.dtype) -> Tensor:
        shape = (shape,) if isinstance(shape, int) else shape
        buffer = torch.full((math.prod(shape) + 64,), 7, dtype=dtype, device=DEVICE)
        inner = buffer[32:-32].view(shape)
        buffers.append((buffer, inner))
        return inner

    original = Tensor.new_empty

    def new_empty(z: Tensor, shape: Any, dtype: torch.dtype | None = None, **place: Any) -> Tensor:
        # Triton's interpreter allocates with a device; we do not.
        return original(z, shape, **place) if place else allocate(shape, dtype or z.dtype)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty_like", lambda z: allocate(z.shape, z.dtype))
        patch.setattr(Tensor, "new_empty", new_empty)
        found = cuda.weighted_sum(*arguments)
    assert len(buffers) > 1
    for buffer, _ in buffers:
        assert (buffer[:32] == 7).all() and (buffer[-32:] == 7).all()
    for result, reference in zip(found, plain.weighted_sum(*arguments), strict=True):
        assert_close(result, reference)


@each_resolution
def test_offsets_beyond_32_bits(size: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels of the largest images, whose offsets take 64 bits, at a size that fits."""
    inner = cuda.KernelConfig
    monkeypatch.setattr(
        cuda, "KernelConfig", lambda **options: inner(**{**options, "index": cuda.tl.int64})
    )
    z, spec = logits(2, 3, 2, 3), LogitsSpec(size)
    assert_sums_equal(z, Tsallis(2, -1), spec)
    assert_classes_equal(z, spec, threshold=0.5, guide=z.roll(1, 1))
    assert_close(cuda.class_sums(z, None, spec), plain.class_sums(z, None, spec))


@pytest.mark.skipif(sys.platform != "linux", reason="needs memory that is not there until used")
@each_resolution
def test_logits_that_lie_far_apart(size: Any) -> None:
    """Classes 2^31 elements apart, as in images of so many pixels."""
    far = torch.empty(2**31 + 2 * 6, dtype=torch.bfloat16, device=DEVICE)
    z = far.as_strided((1, 2, 2, 3), (0, 2**31, 3, 1))
    z.copy_(logits(1, 2, 2, 3))
    spec = LogitsSpec(size)
    assert cuda.Launch(z, spec, []).config.index == cuda.tl.int64
    assert_sums_equal(z, Tsallis(2, -1), spec)
    assert_classes_equal(z, spec)


@each_resolution
def test_no_images(size: Any) -> None:
    z, spec = logits(0, 3, 2, 2), LogitsSpec(size)
    assert_sums_equal(z, Tsallis(2, -1), spec)
    assert_classes_equal(z, spec)
    assert cuda.class_sums(z, None, spec).shape == (0, 3)


@each_resolution
@pytest.mark.parametrize("potential", [Tsallis(0.5), Tsallis(1), Tsallis(1.2)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_low_precision_accumulates_in_float32(
    size: Any, dtype: torch.dtype, potential: Potential
) -> None:
    z, spec = logits(1, 5, 2, 3).to(dtype), LogitsSpec(size)
    weights = torch.ones(1, 1, device=DEVICE)
    arguments = (None, None, potential, spec, True)
    found = cuda.weighted_sum(z, weights, *arguments)
    as_plain = plain.weighted_sum(z, weights, *arguments)
    exact = plain.weighted_sum(z.double(), weights.double(), *arguments)
    assert found[0].dtype == torch.float32
    for result, reference, truth in zip(found, as_plain, exact, strict=True):
        assert_within_budget(result, reference, truth, dtype)


@pytest.mark.parametrize("q", [0.5, 0.9, 1.0001, 1.2])
def test_sure_predictions_keep_their_digits_in_float32(q: float) -> None:
    """p^q - p of a p near 1, where a difference would lose them."""
    z = torch.tensor([13.8, 0.0, 0.0], device=DEVICE).view(1, 3, 1, 1)
    weights = torch.ones(1, 1, device=DEVICE)
    arguments = (None, None, Tsallis(q), LogitsSpec(), True)
    found = cuda.weighted_sum(z, weights, *arguments)
    exact = plain.weighted_sum(z.double(), weights.double(), *arguments)
    for result, truth in zip(found, exact, strict=True):
        # Z is rounded near 1 before its logarithm is taken: two roundings of float32.
        torch.testing.assert_close(result.double(), truth, rtol=2e-4, atol=2.4e-7)


def test_a_float64_threshold_is_not_rounded() -> None:
    z = torch.tensor([[[1.0]], [[0.0]]], dtype=torch.float64, device=DEVICE)[None]
    largest = z.softmax(1).max().item()
    for threshold, accepted in ((largest - 1e-12, 0), (largest + 1e-12, -1)):
        for spec in (LogitsSpec(), LogitsSpec((2, 2))):
            y, _ = cuda.classify(z, None, None, None, spec, threshold)
            assert (y == accepted).all()


@each_resolution
def test_repeats_are_equal_and_inputs_unchanged(size: Any) -> None:
    z = logits(1, 3, 2, 3)
    before, weights = z.clone(), torch.ones(1, 1, dtype=z.dtype, device=DEVICE)
    arguments = (z, weights, None, None, Tsallis(1), LogitsSpec(size), True)
    first, second = (cuda.weighted_sum(*arguments) for _ in range(2))
    assert all(map(torch.equal, first, second))
    assert torch.equal(z, before)


@pytest.mark.parametrize("potential", POTENTIALS, ids=str)
def test_a_pixel_that_does_not_count_may_hold_anything(potential: Potential) -> None:
    z = logits(1, 3, 2, 3)
    valid = torch.ones(1, 2, 3, dtype=torch.bool, device=DEVICE)
    valid[0, 0, 1] = valid[0, 1, 2] = False
    z[0, :, 0, 1], z[0, 1, 1, 2] = torch.nan, torch.inf
    assert_sums_equal(z, potential, valid=valid, y=torch.zeros(1, 2, 3, device=DEVICE))
    assert_classes_equal(z, threshold=0.5, valid=valid)


@each_resolution
@pytest.mark.parametrize("potential", POTENTIALS, ids=str)
def test_masked_classes_and_huge_logits(potential: Potential, size: Any) -> None:
    z, spec = logits(1, 3, 2, 2, spread=1e4), LogitsSpec(size)
    z[:, 2] = -torch.inf
    y = torch.zeros((1, *spec.spatial(z)), device=DEVICE)
    assert_sums_equal(z, potential, spec, y=y)
    assert_classes_equal(z, spec)


@pytest.mark.parametrize(
    ("bad", "size"),
    [
        (torch.nan, None),
        (torch.inf, (3, 4)),
        pytest.param(torch.inf, None, marks=pytest.mark.stress),
        pytest.param(torch.nan, (3, 4), marks=pytest.mark.stress),
    ],
)
def test_what_is_not_finite_shows(bad: float, size: Any) -> None:
    z, spec = logits(2, 3, 2, 2), LogitsSpec(size)
    z[0, 1, 0, 0] = bad
    weights = torch.ones(2, 3, dtype=z.dtype, device=DEVICE)
    for threshold, guide in ((None, None), (0.5, None), (0.5, z.roll(1, 1))):
        assert_classes_equal(z, spec, threshold=threshold, guide=guide)
        y, _ = cuda.classify(z, guide, None, None, spec, threshold)
        assert (y[0] == 3).any() and not (y[1] == 3).any()
        for potential in (Tsallis(2, -1), CrossEntropy()):
            sums, grad = cuda.weighted_sum(z, weights, y, None, potential, spec, True)
            assert sums.isnan().tolist() == [True, False]
            assert grad[0].isnan().any() and not grad[1].isnan().any()
    assert cuda.class_sums(z, None, spec).isnan().any(1).tolist() == [True, False]


@pytest.mark.parametrize("upsampled", [False, True])
def test_images_of_varying_size_share_few_compilations(upsampled: bool) -> None:
    """Of a kernel's arguments Triton specialises the config alone (`do_not_specialize`)."""
    generator = torch.Generator().manual_seed(0)
    configs = set()
    for height, width in torch.randint(200, 1200, (100, 2), generator=generator).tolist():
        if upsampled:
            z, size = torch.empty(1, 19, 1 + height // 8, 1 + width // 8), (height, width)
        else:
            z, size = torch.empty(1, 19, height, width, device="meta"), None
        launch = cuda.Launch(z, LogitsSpec(size, align_corners=True), [])
        configs.add((launch.config, *launch.options.items()))
    # At full resolution: the widths of vectors, 1, 2, 4, and 8.
    assert len(configs) <= (4 if not upsampled else 3), configs


def test_a_launch_is_planned_once_for_each_shape_layout_and_option() -> None:
    z, spec = logits(2, 3, 4, 6), LogitsSpec()
    plan = cuda.planned(z, spec, kind=0)
    assert cuda.planned(z + 1, spec, kind=0) is plan
    others = [
        cuda.planned(z[:1], spec, kind=0),
        cuda.planned(z.float(), spec, kind=0),
        cuda.planned(z.contiguous(memory_format=torch.channels_last), spec, kind=0),
        cuda.planned(z, LogitsSpec((8, 12)), kind=0),
        cuda.planned(z, spec, [z], kind=0),
        cuda.planned(z, spec, kind=1),
    ]
    assert len({id(other) for other in [plan, *others]}) == 7


def test_plans_do_not_accumulate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "MAX_LAUNCHES", 3)
    for width in range(1, 8):
        cuda.planned(torch.empty(1, 2, 1, width), LogitsSpec())
    assert len(cuda._LAUNCHES) <= 3


# They arrange memory, and launch nothing.
NO_LAUNCH = re.compile(
    "aten::(empty|new_empty|view|as_strided|expand|squeeze|unsqueeze|detach|set_|to$)"
)
LAUNCH = re.compile("aten::(sum|mul|div|add|fill_|copy_|pow|where|clamp)")


def launches(events: Any) -> int:
    """How many kernels these operations of PyTorch launch, by their names."""
    count = 0
    for event in events:
        if LAUNCH.match(event.name):
            count += 1
        elif event.cpu_children:
            count += launches(event.cpu_children)
        elif event.name.startswith("aten::"):
            assert NO_LAUNCH.match(event.name), event.name
    return count


@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("size", [None, (32, 64)], ids=["as is", "upsampled"])
def test_a_step_launches_at_most_six_kernels(
    size: Any, images: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Value and gradient of the plain loss, that of the upstream gradient of 1 included."""
    ours: list[Any] = []
    monkeypatch.setattr(operators, "kernels_for", lambda z: cuda)
    monkeypatch.setattr(cuda, "run", lambda z, kernel, *_, **__: ours.append(kernel))
    loss, z = loss_named("max_square").make(), logits(images, 3, 8, 16).requires_grad_()
    for _ in range(2):  # the first call reads the logits for a warning
        ours.clear()
        z.grad = None
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            loss(z, size=size).backward()
    roots = [event for event in profile.events() if event.cpu_parent is None]
    assert len(ours) == 2
    assert len(ours) + launches(roots) <= 6


def test_memory_beyond_the_inputs_of_upsampled_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A street scene: what a call allocates, the gradient itself included, is at most 6 MiB."""
    allocated: list[int] = []
    new_empty = Tensor.new_empty

    def noted(z: Tensor, *arguments: Any, **options: Any) -> Tensor:
        result = new_empty(z, *arguments, **options)
        allocated.append(result.numel() * result.element_size())
        return result

    monkeypatch.setattr(Tensor, "new_empty", noted)
    monkeypatch.setattr(cuda, "run", lambda *arguments, **options: None)
    for align_corners in (True, False):
        allocated.clear()
        z = torch.zeros(1, 19, 129, 257, device=DEVICE)
        spec = LogitsSpec((1024, 2048), align_corners)
        ones = torch.ones(1, 1, device=DEVICE)
        cuda.weighted_sum(z, ones, None, None, Tsallis(2, -1), spec, True)
        assert z.numel() * 4 < sum(allocated) <= 6 * 2**20


@needs_cuda
@pytest.mark.parametrize("size", [None, (40, 60)], ids=["as is", "upsampled"])
def test_capture_in_a_graph(size: tuple[int, int] | None) -> None:
    member = next(member for member in LOSSES if member.name == "iw_multi_level")
    inputs = tuple(z.detach().to(DEVICE) for z in inputs_of(member, (2, 5, 8, 9)))
    loss = member.make()

    def run() -> tuple[Tensor, tuple[Tensor, ...]]:
        return value_and_gradient(lambda *heads: loss(*heads, size=size), inputs)

    expected, gradients = run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        value, slopes = run()
    graph.replay()
    assert torch.equal(value, expected)
    assert all(map(torch.equal, slopes, gradients))


@pytest.fixture
def named_target(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter has no driver that could name its target."""
    if DEVICE == "cpu":
        target = SimpleNamespace(backend="cuda")
        driver = SimpleNamespace(get_current_target=lambda: target)
        monkeypatch.setattr(triton.runtime.driver, "_active", driver)


@pytest.mark.usefixtures("named_target")
def test_the_kernels_pass_their_own_check_whatever_the_default_dtype() -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        cuda.check(torch.device(DEVICE))
    finally:
        torch.set_default_dtype(before)


@pytest.mark.usefixtures("named_target")
def test_the_check_names_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    class_sums = cuda.class_sums
    monkeypatch.setattr(cuda, "class_sums", lambda *arguments: class_sums(*arguments) * 1.001)
    with pytest.raises(RuntimeError, match="disagree with the plain formula in the class sums$"):
        cuda.check(torch.device(DEVICE))


def test_a_triton_that_cannot_compile_the_kernels_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "__version__", "3.3.1")
    with pytest.raises(RuntimeError, match=r"Triton 3\.4 or later, not 3\.3\.1"):
        cuda.check(torch.device(DEVICE))
