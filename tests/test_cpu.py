"""The CPU kernels compute what the plain formula says, on any number of threads, within bounds.

How they come to be compiled is in `test_libraries.py`.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import (
    LAYOUTS,
    assert_close,
    assert_within_budget,
    lay_out,
    random_logits,
    random_valid,
)
from torch import Tensor

from maxsquare.checks import INTEGERS
from maxsquare.engine import cpu, libraries, plain
from maxsquare.engine.plain import LogitsSpec
from maxsquare.potentials import POWER_FROM_Q, CrossEntropy, Potential, Tsallis

pytestmark = pytest.mark.skipif(not any(libraries.compilers()), reason="needs a C++ compiler")

POTENTIALS = {
    "square": Tsallis(2, offset=-1),
    "shannon": Tsallis(1),
    "power": Tsallis(POWER_FROM_Q),
    "near one": Tsallis(1.0001),
    "below one": Tsallis(0.5),
    "label": CrossEntropy(),
}
each_potential = pytest.mark.parametrize("potential", POTENTIALS.values(), ids=POTENTIALS)
each_size = pytest.mark.parametrize("size", [None, (20, 31)], ids=["as is", "upsampled"])
KINDS = ("argmax", "threshold", "guide", "labels")


@dataclass
class Case:
    """What the operators are given."""

    z: Tensor
    potential: Potential
    guide: Tensor | None = None
    labels: Tensor | None = None
    valid: Tensor | None = None
    threshold: float | None = None
    size: tuple[int, int] | None = None
    align_corners: bool = False
    binary: bool = False
    by_class: bool = True

    def classify(self, kernels: ModuleType) -> tuple[Tensor, Tensor]:
        tensors = (self.z, self.guide, self.labels, self.valid)
        ignore_index = 1
        return kernels.classify(*tensors, self.spec(), self.threshold, ignore_index)

    def weighted_sum(
        self, kernels: ModuleType, y: Tensor | None, needs_grad: bool = True
    ) -> tuple[Tensor, Tensor]:
        classes = self.spec().classes(self.z)
        weights = random_logits((len(self.z), classes if self.by_class else 1), seed=5)
        weights = weights.to(plain.accumulation_dtype(self.z.dtype))
        tensors = (self.z, weights, y, self.valid)
        return kernels.weighted_sum(*tensors, self.potential, self.spec(), needs_grad)

    def spec(self) -> LogitsSpec:
        return LogitsSpec(self.size, self.align_corners, self.binary)

    def to(self, dtype: torch.dtype) -> Case:
        guide = None if self.guide is None else self.guide.to(dtype)
        return replace(self, z=self.z.to(dtype), guide=guide)


def make_case(
    shape: tuple[int, ...],
    kind: str,
    potential: Potential,
    *,
    seed: int = 0,
    share: float = 0.8,
    **options: Any,
) -> Case:
    """float64 logits with a mask, whose classes come to be in one of the ways."""
    case = Case(random_logits(shape, seed=seed), potential, **options)
    pixels = (shape[0], *(case.size or shape[2:]))
    case.valid = random_valid(pixels, seed=seed, share=share)
    if kind in ("threshold", "guide"):
        case.threshold = 0.6
    if kind == "guide":
        case.guide = random_logits(shape, seed=seed + 1)
    if kind == "labels":
        classes = case.spec().classes(case.z)
        generator = torch.Generator().manual_seed(seed)
        case.labels = torch.randint(-1, classes, pixels, generator=generator)
    return case


def assert_equal_to_plain(case: Case) -> None:
    y, counts = case.classify(cpu)
    expected_y, expected_counts = case.classify(plain)
    assert (y.dtype, counts.dtype) == (expected_y.dtype, expected_counts.dtype)
    assert torch.equal(y, expected_y) and torch.equal(counts, expected_counts)
    indices = [y] if case.by_class or isinstance(case.potential, CrossEntropy) else [y, None]
    for index in indices:
        sums, slope = case.weighted_sum(cpu, index)
        expected_sums, expected_slope = case.weighted_sum(plain, index)
        assert_close(sums, expected_sums)
        assert_close(slope, expected_slope)
        sums_alone, no_slope = case.weighted_sum(cpu, index, needs_grad=False)
        assert no_slope is None
        assert_close(sums_alone, sums)


def in_nan(z: Tensor) -> Tensor:
    """A view of the middle of a larger tensor of NaN: a read out of bounds reaches the result."""
    wide = torch.full([length + 2 for length in z.shape], torch.nan, dtype=z.dtype)
    view = wide[tuple(slice(1, -1) for _ in z.shape)]
    return view.copy_(z)


@st.composite
def cases(draw: st.DrawFn, potential: Potential) -> Case:
    rank = draw(st.integers(1, 3))
    longest = {1: 150, 2: 12, 3: 5}[rank]
    spatial = draw(st.lists(st.integers(1, longest), min_size=rank, max_size=rank))
    binary = draw(st.booleans())
    classes = 1 if binary else draw(st.sampled_from([2, 3, 19, 41, 81]))
    sizes = st.tuples(st.integers(1, 20), st.integers(1, 80))
    kind = draw(st.sampled_from(KINDS))
    case = make_case(
        (draw(st.integers(1, 3)), classes, *spatial),
        kind,
        potential,
        seed=draw(st.integers(0, 999)),
        size=draw(st.none() | sizes) if rank == 2 else None,
        align_corners=draw(st.booleans()),
        binary=binary,
        by_class=draw(st.booleans()),
    )
    layouts = st.sampled_from([*LAYOUTS, "in NaN", "one pixel"])

    def lay(z: Tensor) -> Tensor:
        layout = draw(layouts)
        if layout == "one pixel":
            return z[(..., *[slice(1)] * rank)].expand_as(z)
        return in_nan(z) if layout == "in NaN" else lay_out(z, layout)

    case.z = lay(case.z)
    case.guide = None if case.guide is None else lay(case.guide)
    if case.guide is not None and case.size is not None and draw(st.booleans()):
        case.guide = random_logits((*case.guide.shape[:2], draw(st.integers(1, 9)), 4), seed=3)
    case.valid = case.valid if draw(st.booleans()) else None
    return case


# The arithmetic


@each_potential
@settings(max_examples=40)
@given(data=st.data())
def test_any_shape_layout_and_kind_of_input_equals_the_plain_formula(
    potential: Potential, data: st.DataObject
) -> None:
    case = data.draw(cases(potential))
    # Chunks of one pixel or row of cells, of a few so that some are cut short, and the usual ones.
    pixels = data.draw(st.sampled_from([1, 70, cpu.CHUNK_PIXELS]))
    chunks_of_cells = data.draw(st.sampled_from([1, 3, cpu.CHUNKS_OF_CELLS]))
    with (
        mock.patch.object(cpu, "CHUNK_PIXELS", pixels),
        mock.patch.object(cpu, "CHUNKS_OF_CELLS", chunks_of_cells),
    ):
        assert_equal_to_plain(case)


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize(
    ("source", "size"),
    [
        ((6, 7), (17, 130)),
        ((6, 7), (3, 4)),
        ((6, 7), (6, 7)),
        ((33, 65), (1, 1)),
        ((1, 1), (5, 7)),
        ((1, 9), (4, 70)),
        ((9, 1), (40, 3)),
        ((90, 2), (45, 64)),
        ((5, 6), (200, 1)),
    ],
    ids=str,
)
def test_fused_upsampling_equals_upsampling_first(
    source: tuple[int, int], size: tuple[int, int], align_corners: bool
) -> None:
    options = {"size": size, "align_corners": align_corners}
    for kind, potential in (("argmax", Tsallis(2)), ("guide", CrossEntropy())):
        assert_equal_to_plain(make_case((2, 4, *source), kind, potential, **options))


@each_potential
@each_size
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_low_precision_stays_within_the_budget_of_the_plain_formula(
    potential: Potential, size: tuple[int, int] | None, dtype: torch.dtype
) -> None:
    case = make_case((2, 19, 6, 9), "labels", potential, size=size).to(dtype)
    y, _ = case.classify(plain)
    exact = case.to(torch.float64).weighted_sum(plain, y)
    in_plain, ours = (case.weighted_sum(kernels, y) for kernels in (plain, cpu))
    assert ours[0].dtype == torch.float32
    # What is upsampled sums up in float32 until the upstream gradient has scaled it.
    assert ours[1].dtype == (dtype if size is None else torch.float32)
    for a, b, c in zip(ours, in_plain, exact, strict=True):
        assert_within_budget(a, b, c, dtype)


@each_potential
@pytest.mark.parametrize("spread", [1e-3, 30, 1e4])
def test_flat_and_certain_predictions_stay_within_the_budget(
    potential: Potential, spread: float
) -> None:
    case = make_case((1, 19, 40, 50), "argmax", potential)
    case = replace(case, z=case.z * spread).to(torch.float32)
    y, _ = case.classify(plain)
    exact = case.to(torch.float64).weighted_sum(plain, y)
    in_plain, ours = (case.weighted_sum(kernels, y) for kernels in (plain, cpu))
    for a, b, c in zip(ours, in_plain, exact, strict=True):
        assert_within_budget(a, b, c, torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_read_exactly_and_rounded_to_nearest(dtype: torch.dtype) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).view(1, 1, -1)
    z = torch.cat((every, torch.zeros_like(every)), 1)
    finite = every[:, 0].isfinite()
    results = []
    for logits in (z, z.float()):
        case = Case(logits, CrossEntropy(), valid=finite, by_class=False)
        results.append(case.weighted_sum(cpu, torch.zeros(1, 2**16, dtype=torch.int8))[0])
        # Each of them in a pixel and a sum of its own.
        images = replace(case, z=logits.permute(2, 1, 0), valid=None)
        results.append(images.weighted_sum(cpu, torch.zeros(2**16, 1, dtype=torch.int8))[0])
    for narrow, wide in zip(results[:2], results[2:], strict=True):
        torch.testing.assert_close(narrow, wide, rtol=0, atol=0, equal_nan=True)
    # Weights over all magnitudes: slopes from below the smallest number to beyond the largest.
    z = random_logits((3000, 3, 1)).to(dtype)
    weights = torch.logspace(-46, 38, 3000)[:, None]
    slopes = [
        cpu.weighted_sum(x, weights, None, None, Tsallis(2), LogitsSpec(), True)[1]
        for x in (z, z.float())
    ]
    expected = slopes[1].to(dtype)
    assert (expected == 0).any() and (dtype == torch.bfloat16 or expected.isinf().any())
    assert torch.equal(slopes[0], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_positions_far_from_the_origin_keep_their_digits(dtype: torch.dtype) -> None:
    """In float32, position 2000 of 2048 is known to 1e-4 of a pixel, as interpolate has it."""
    z = torch.zeros(1, 2, 1, 257, dtype=dtype)
    position = 2000 * 256 / 2047
    z[0, 0, 0, int(position) + 1] = 1
    valid = torch.zeros(1, 1, 2048, dtype=torch.bool)
    valid[..., 2000] = True
    case = Case(z, CrossEntropy(), valid=valid, size=(1, 2048), align_corners=True, by_class=False)
    weight = random_logits((1, 1), seed=5)
    sums, _ = case.weighted_sum(cpu, torch.ones(1, 1, 2048, dtype=torch.int8))
    # -log p_1 = log(1 + exp(z_0)), and z_0 is the share of the next source pixel.
    share = torch.tensor(position % 1, dtype=torch.float64)
    torch.testing.assert_close(
        (sums / weight[0]).double(), torch.nn.functional.softplus(share)[None], rtol=5e-7, atol=0
    )


@each_size
def test_where_head_and_guide_tie_the_first_class_wins(size: tuple[int, int] | None) -> None:
    z = random_logits((2, 5, 6, 9)).float()
    z[:, 2:] -= 20
    # Class 0 and 1 change places: their mean probabilities are equal, whatever they are.
    case = Case(z, CrossEntropy(), guide=z[:, [1, 0, 2, 3, 4]], threshold=0.6, size=size)
    y, _ = case.classify(cpu)
    assert torch.equal(y, case.classify(plain)[0])
    assert set(y.unique().tolist()) == {-1, 0}


@pytest.mark.parametrize("threshold", [None, 0.5], ids=["argmax", "threshold"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("share", [0.01, 1.0], ids=["a few ties", "many ties"])
def test_ties_and_what_is_not_finite_have_the_class_that_the_plain_formula_gives(
    threshold: float | None, bad: float, share: float
) -> None:
    z = random_logits((2, 5, 16, 17)).float()
    chance = torch.rand(2, 1, 16, 17, generator=torch.Generator().manual_seed(0))
    z = torch.where(chance < share, z.sign(), z)
    best = z.topk(2, 1).values
    assert (best[:, 0] == best[:, 1]).any()
    z[0, 3, 2, 2] = z[1, 0, 3, :4] = bad
    z[1, :, 5, 6] = bad
    case = Case(z, CrossEntropy(), threshold=threshold)
    y, counts = case.classify(cpu)
    expected_y, expected_counts = case.classify(plain)
    assert torch.equal(y, expected_y) and torch.equal(counts, expected_counts)
    assert y[1, 5, 6] == 5


def test_a_threshold_accepts_what_is_strictly_above_it() -> None:
    z = torch.zeros(1, 2, 3)
    z[0, 0] = torch.tensor([-1e-3, 0, 1e-3])
    y, counts = Case(z, CrossEntropy(), threshold=0.5).classify(cpu)
    assert y.tolist() == [[1, -1, 0]] and counts.tolist() == [[1, 1, 0]]


@each_size
@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_labels_of_every_integer_dtype_are_read(
    dtype: torch.dtype, size: tuple[int, int] | None
) -> None:
    case = make_case((2, 200, 5, 7), "labels", CrossEntropy(), size=size)
    assert case.labels is not None
    case.labels = case.labels.to(dtype)
    # Beyond the classes, not counted, and where the dtype has it negative.
    case.labels[0, 0, :5] = torch.tensor([0, 100, 127, 200, 255]).to(dtype)
    y, counts = case.classify(cpu)
    expected_y, expected_counts = case.classify(plain)
    assert torch.equal(y, expected_y) and torch.equal(counts, expected_counts)
    strided = replace(case, labels=torch.stack([case.labels] * 2, -1)[..., 0])
    assert torch.equal(strided.classify(cpu)[0], y)


@pytest.mark.parametrize("classes", [2, 126, 127, 128, 300])
@pytest.mark.parametrize("kind", KINDS)
def test_any_number_of_classes_has_an_index(kind: str, classes: int) -> None:
    case = make_case((1, classes, 3, 5), kind, CrossEntropy())
    case.valid = None
    case.z[0, -1, 0] += 50
    case.z[0, 0, 2, 4] = torch.nan
    y, _ = case.classify(cpu)
    if kind != "labels":
        assert (y[0, 0] == classes - 1).all() and y[0, 2, 4] == classes
    case.z[0, 0, 2, 4] = 0
    assert_equal_to_plain(case)


@each_potential
@each_size
def test_a_pixel_whose_class_is_undefined_makes_the_sum_of_its_image_nan(
    potential: Potential, size: tuple[int, int] | None
) -> None:
    case = make_case((2, 3, 5, 6), "labels", potential, size=size, share=1)
    assert case.labels is not None
    case.labels[1, 0, 0] = 77
    y, _ = case.classify(cpu)
    sums, slope = case.weighted_sum(cpu, y)
    assert sums.isnan().tolist() == [False, True]
    assert not slope[0].isnan().any() and slope[1].isnan().any()
    assert torch.equal(slope.isnan(), case.weighted_sum(plain, y)[1].isnan())


@each_potential
@pytest.mark.parametrize(
    "hidden",
    [[torch.nan, 0, 0], [0, torch.inf, 0], [-torch.inf] * 3, [0, -torch.inf, 0], [1e30, 0, 0]],
    ids=str,
)
def test_a_pixel_that_does_not_count_may_hold_anything(
    potential: Potential, hidden: list[float]
) -> None:
    case = make_case((1, 3, 6, 9), "guide", potential)
    assert case.valid is not None and case.guide is not None
    case.valid[0, 1:4, 2:5] = False

    def results() -> list[Tensor]:
        y, counts = case.classify(cpu)
        return [y, counts, *case.weighted_sum(cpu, y)]

    clean = results()
    for head in (case.z, case.guide):
        head[0, :, 1:4, 2:5] = torch.tensor(hidden).view(3, 1, 1)
    for result, expected in zip(results(), clean, strict=True):
        assert torch.equal(result, expected)


@each_potential
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_reaches_the_pixels_it_touches_and_no_other(
    potential: Potential, bad: float
) -> None:
    case = make_case((1, 3, 6, 6), "argmax", potential, size=(31, 31), align_corners=True)
    case.z[0, 0, 0, 0] = bad
    # Where the share of the bad corner is exactly 0 the product is NaN all the same.
    touched = torch.zeros(1, 31, 31, dtype=torch.bool)
    touched[:, :6, :6] = True
    y = torch.ones(1, 31, 31, dtype=torch.int8)
    sums, slope = replace(case, valid=~touched).weighted_sum(cpu, y)
    assert sums.isfinite() and slope.isfinite().all()
    assert replace(case, valid=touched).weighted_sum(cpu, y)[0].isnan().all()


@each_potential
@each_size
@pytest.mark.parametrize(
    ("dtype", "bits"), [(torch.float32, torch.int32), (torch.float64, torch.int64)], ids=str
)
def test_a_nan_with_digits_of_its_own_is_not_hidden(
    potential: Potential,
    size: tuple[int, int] | None,
    dtype: torch.dtype,
    bits: torch.dtype,
) -> None:
    """Any bits behind the exponent make a NaN; R marks what is missing by 1954."""
    y = torch.zeros(5, *(size or (5, 6)), dtype=torch.int8)
    z = random_logits((5, 3, 5, 6)).to(dtype)
    exponent = torch.tensor(torch.inf, dtype=dtype).view(bits)
    z[:, 1, 2, 3] = (
        (exponent + torch.tensor([1, 2, 1954, 2**20 + 1, 2**22 + 5])).to(bits).view(dtype)
    )
    case = Case(z, potential, threshold=0.1, size=size, by_class=False)
    sums, slope = case.weighted_sum(cpu, y)
    assert sums.isnan().all() and slope.flatten(1).isnan().any(1).all()
    assert (case.classify(cpu)[1][:, 3] > 0).all()


@each_potential
def test_a_class_masked_out_stays_so_when_upsampled(potential: Potential) -> None:
    # Every second pixel of another class; none of the class that is masked out.
    y = (torch.arange(19 * 23).view(1, 19, 23) % 2 * 3).to(torch.int8)
    z = random_logits((1, 4, 5, 6))
    z[:, 2] = -torch.inf
    case = Case(z, potential, size=(19, 23))
    sums, slope = case.weighted_sum(cpu, y)
    expected_sums, expected_slope = case.weighted_sum(plain, y)
    assert_close(sums, expected_sums)
    assert_close(slope, expected_slope)
    assert not slope[:, 2].any() and slope[:, [0, 1, 3]].any() and sums.isfinite()


@pytest.mark.parametrize("layout", LAYOUTS)
@each_size
def test_the_slope_has_the_layout_of_the_logits(layout: str, size: tuple[int, int] | None) -> None:
    z = lay_out(random_logits((2, 8, 6, 9)), layout)
    _, slope = Case(z, Tsallis(2), size=size, by_class=False).weighted_sum(cpu, None)
    expected = torch.empty_like(z) if size is None else torch.empty(z.shape)
    assert slope.stride() == expected.stride() and not slope._is_view()


@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 3, 0, 5)], ids=str)
def test_no_pixel_is_a_sum_of_zero(shape: tuple[int, ...]) -> None:
    for kind in KINDS:
        y, counts = (case := make_case(shape, kind, CrossEntropy())).classify(cpu)
        sums, slope = case.weighted_sum(cpu, y)
        assert y.shape == (shape[0], *shape[2:]) and counts.shape == (shape[0], 4)
        assert not counts.any() and not sums.any() and slope.shape == shape


# Threads and processes


def large_cases(dtype: torch.dtype) -> list[Case]:
    """Of more chunks than threads, and work enough for each."""
    shapes = {None: (2, 19, 128, 192), (200, 301): (2, 19, 23, 33)}
    return [
        make_case(shape, kind, potential, size=size).to(dtype)
        for size, shape in shapes.items()
        for kind, potential in (
            ("argmax", Tsallis(2)),
            ("guide", CrossEntropy()),
            ("labels", Tsallis(1)),
        )
    ]


def bits(case: Case) -> list[Tensor]:
    y, counts = case.classify(cpu)
    return [y, counts, *case.weighted_sum(cpu, y)]


def assert_same_bits(results: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(results, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_number_of_threads_and_every_repeat_gives_the_same_bits(
    set_threads: Callable[[int], None], dtype: torch.dtype
) -> None:
    all_cases = large_cases(dtype)
    set_threads(1)
    expected = [bits(case) for case in all_cases]
    for count in (2, 3, 8, 8, 1):
        set_threads(count)
        cpu.start_anew()
        for case, values in zip(all_cases, expected, strict=True):
            assert_same_bits(bits(case), values)
        # The caller is one of them.
        assert bool(cpu.HELPERS.threads) is (count > 1)


def test_every_place_in_a_batch_gives_the_same_bits() -> None:
    for case in large_cases(torch.float32):
        batch = bits(replace(case, by_class=False))
        for n in range(2):
            alone = {
                name: None if (tensor := getattr(case, name)) is None else tensor[n : n + 1]
                for name in ("z", "guide", "labels", "valid")
            }
            one = replace(case, **alone, by_class=False)
            assert_same_bits(bits(one)[:2], [result[n : n + 1] for result in batch[:2]])
            weights = torch.ones(2, 1)
            together, single = (
                cpu.weighted_sum(
                    *(each.z, weights[: len(each.z)], each.classify(cpu)[0], None),
                    *(each.potential, each.spec(), True),
                )
                for each in (case, one)
            )
            assert_same_bits(list(single), [result[n : n + 1] for result in together])


def test_several_callers_at_once_get_the_bits_of_one(set_threads: Callable[[int], None]) -> None:
    set_threads(3)
    all_cases = large_cases(torch.float32) * 2
    expected = [bits(case) for case in all_cases]
    start = threading.Barrier(6)

    def call(case: Case) -> list[Tensor]:
        start.wait(60)
        torch.set_num_threads(3)
        return bits(case)

    with ThreadPoolExecutor(6) as callers:
        for results, values in zip(callers.map(call, all_cases), expected, strict=True):
            assert_same_bits(results, values)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("before", [True, False], ids=["threads started", "no thread yet"])
def test_a_forked_process_computes_the_same_bits(
    set_threads: Callable[[int], None], before: bool
) -> None:
    set_threads(3)
    case = large_cases(torch.float32)[0]
    cpu.start_anew()
    expected = bits(case) if before else None
    receiver, sender = os.pipe()
    child = os.fork()
    if not child:
        # One that hangs is ended by the alarm, with nothing sent.
        signal.alarm(60)
        try:
            for result in bits(case)[1:3]:
                os.write(sender, result.numpy().tobytes())
        finally:
            os._exit(0)
    os.close(sender)
    with os.fdopen(receiver, "rb") as stream:
        received = stream.read()
    os.waitpid(child, 0)
    _, *numbers, _ = expected or bits(case)
    assert received == b"".join(result.numpy().tobytes() for result in numbers)


# Memory

PEAK = """
import resource, sys, torch
import maxsquare
torch.set_num_threads(1)
shape, size, limit = (1, 19, *map(int, sys.argv[1:3])), sys.argv[3], float(sys.argv[4])
size = None if size == "none" else tuple(map(int, size.split("x")))
loss = maxsquare.IWMaxSquareLoss()
def run(z):
    loss(z, size=size, align_corners=size is not None).backward()
run(torch.randn(1, 19, 5, 7).requires_grad_())
z = torch.randn(shape).requires_grad_()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
run(z)
extra = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
extra -= 0 if size else z.numel() * 4 / 2**20
print(extra)
sys.exit(extra > limit)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux")
@pytest.mark.parametrize(
    ("shape", "size", "limit"),
    [((1024, 1024), "none", 8), ((129, 257), "1024x2048", 7)],
    ids=["as is", "upsampled"],
)
def test_peak_memory_stays_far_below_a_tensor_of_logits(
    shape: tuple[int, int], size: str, limit: int
) -> None:
    """In MiB beyond logits and gradient, where full-resolution logits are 76 and 152."""
    arguments = [*map(str, shape), size, str(limit)]
    run = subprocess.run(
        [sys.executable, "-c", PEAK, *arguments], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr


# Sanitizers


@pytest.mark.skipif(sys.platform != "linux", reason="the sanitizer is preloaded as on Linux")
def test_the_kernels_stay_in_bounds_and_defined(tmp_path: Path) -> None:
    """The tests above, with kernels and tensors that AddressSanitizer and UBSan watch."""
    compiler = next(libraries.compilers())
    sanitizers = [
        subprocess.run(
            [*compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        # PyTorch throws exceptions, which the sanitizer follows if it finds their library.
        for name in ("libasan.so", "libstdc++.so")
    ]
    if not Path(sanitizers[0]).is_absolute():
        pytest.skip(f"{shlex.join(compiler)} has no libasan.so")
    wrapper = tmp_path / "compiler"
    # Options at the end, as the last level of optimisation counts: a higher one takes a minute.
    wrapper.write_text(
        f'#!/bin/sh\nunset LD_PRELOAD\nexec {shlex.join(compiler)} "$@" -O1 -g '
        "-fsanitize=address,undefined -fno-sanitize-recover=all\n"
    )
    wrapper.chmod(0o755)
    run = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-qs", "-p", "no:cacheprovider", "-o", "addopts="),
            *(__file__, "-k", "not same_bits and not peak_memory and not in_bounds"),
        ],
        env={
            **os.environ,
            "CXX": str(wrapper),
            "XDG_CACHE_HOME": str(tmp_path),
            "LD_PRELOAD": " ".join(sanitizers),
            # What Python does not free at its end is not ours to judge.
            "ASAN_OPTIONS": "detect_leaks=0",
        },
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[:8000]
    # Single and double precision were made by the wrapper.
    assert len(list(tmp_path.glob("maxsquare/*.so"))) == 2
