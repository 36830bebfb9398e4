"""The Triton kernels against the plain formula: on a GPU, else by Triton's interpreter.

The interpreter is slow: a program takes it a hundredth of a second, and there is one for every
cell of an upsampling. Hence the small shapes.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
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
quiet = pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")
each_size = pytest.mark.parametrize(
    ("size", "align_corners"),
    [(None, False), ((5, 3), False), ((3, 4), True), ((1, 2), False), ((1, 1), True)],
    ids=str,
)
each_resolution = pytest.mark.parametrize("size", [None, (3, 4)], ids=["as is", "upsampled"])
# Either side of the q where the logarithm changes its form, and the q with a form of their own.
POTENTIALS = [*(Tsallis(q) for q in (0.5, 1, 1.0001, POWER_FROM_Q)), Tsallis(2, -1), CrossEntropy()]


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
    assert torch.equal(alone, sums) and none is None


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
def test_sums_and_slopes(potential: Potential, size: Any, align_corners: bool) -> None:
    assert_sums_equal(logits(1, 3, 2, 3), potential, LogitsSpec(size, align_corners))


@each_size
def test_classes(size: Any, align_corners: bool) -> None:
    z = logits(1, 3, 2, 3)
    guide = z.roll(1, 1) if size is None else logits(1, 3, 3, 2, seed=1)
    valid = random_valid((1, *(size or z.shape[2:])), share=0.8).to(DEVICE)
    spec = LogitsSpec(size, align_corners)
    assert_classes_equal(z, spec)
    assert_classes_equal(z, spec, threshold=0.6, valid=valid)
    assert_classes_equal(z, spec, threshold=0.6, guide=guide)


@each_resolution
@pytest.mark.parametrize("weighted_by", ["class", "image"])
def test_masks_and_weights(size: Any, weighted_by: str) -> None:
    z = logits(2, 3, 2, 2)
    valid = random_valid((2, *(size or z.shape[2:]))).to(DEVICE)
    assert_sums_equal(
        z, Tsallis(2, -1), LogitsSpec(size), valid=valid, by_class=weighted_by == "class"
    )


@each_resolution
def test_a_single_channel_is_a_problem_of_two_classes(size: Any) -> None:
    z = logits(2, 1, 2, 2)
    assert_sums_equal(z, Tsallis(1), LogitsSpec(size, binary=True))
    assert_classes_equal(z, LogitsSpec(size, binary=True), threshold=0.7)


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
        # A compiler that fuses the plain formula rounds otherwise.
        assert_close(result[0], value)
        assert_close(result[1][0], gradients[0])


def lay_out_map(y: Tensor, order: tuple[int, int, int]) -> Tensor:
    """The same map, whose dimensions are stored in this order."""
    back = tuple(order.index(dim) for dim in range(3))
    return y.permute(order).contiguous().permute(back)


@pytest.mark.parametrize("classes", [2, 33])
def test_pixels_beyond_one_tile(classes: int) -> None:
    z = logits(1, classes, 5, 131)
    assert_sums_equal(z, Tsallis(2, -1))
    assert_classes_equal(z)


def test_pixels_beyond_one_tile_of_a_cell() -> None:
    z = logits(1, 40, 1, 1)
    assert_sums_equal(z, Tsallis(1.2), LogitsSpec((11, 13)))
    assert_classes_equal(z, LogitsSpec((11, 13)))


def test_pixels_beyond_one_program_that_counts() -> None:
    assert_classes_equal(logits(1, 2, 1, cuda.COUNTED_PIXELS + 3))


@each_resolution
def test_classes_beyond_one_chunk(size: Any) -> None:
    z = logits(1, cuda.MAX_CLASSES + 2, 2, 1)
    assert_sums_equal(z, Tsallis(1.2), LogitsSpec(size))
    assert_sums_equal(z, CrossEntropy(), LogitsSpec(size))
    assert_classes_equal(z, LogitsSpec(size), threshold=0.01, guide=z.roll(1, 1))
    z[:, :] = 0
    assert_classes_equal(z, LogitsSpec(size))


@pytest.mark.parametrize("layout", ["channels_last", "reversed", "strided", "expanded"])
@pytest.mark.parametrize("shape", [(1, 3, 2, 3), (1, 3, 2, 1, 3), (1, 2, 5)], ids=str)
def test_layouts(shape: tuple[int, ...], layout: str) -> None:
    z = lay_out(logits(*shape), layout)
    assert_sums_equal(z, Tsallis(2, -1))
    assert_classes_equal(z, threshold=0.5, guide=logits(*shape, seed=1))


def test_layouts_of_upsampled_logits() -> None:
    z = lay_out(logits(1, 3, 2, 3), "channels_last")
    assert_sums_equal(z, Tsallis(2, -1), LogitsSpec((3, 4)))
    assert_classes_equal(z, LogitsSpec((3, 4)))


@each_resolution
def test_nothing_beside_the_tensors_is_read_or_written(size: Any) -> None:
    z, guide = surrounded(logits(2, 3, 2, 3)), surrounded(logits(2, 3, 2, 3, seed=1))
    weights = surrounded(torch.ones(2, 3, dtype=z.dtype, device=DEVICE))
    y, counts = cuda.classify(z, guide, None, None, LogitsSpec(size, True), 0.5)
    expected = plain.classify(z, guide, None, None, LogitsSpec(size, True), 0.5)
    assert torch.equal(y, expected[0]) and torch.equal(counts, expected[1])
    arguments = (z, weights, y, None, Tsallis(1), LogitsSpec(size, True), True)
    for result, reference in zip(
        cuda.weighted_sum(*arguments),
        plain.weighted_sum(*arguments),
        strict=True,
    ):
        assert_close(result, reference)
    # The gradient of logits inside a buffer lies inside one too.
    buffer = torch.full((4, 5, 4, 5), 7.0, dtype=z.dtype, device=DEVICE)
    inner = buffer[1:-1, 1:-1, 1:-1, 1:-1]
    launch = cuda.Launch([z, inner], LogitsSpec(), kind=Tsallis(2).kind(), q=2.0)
    slope_strides = launch.heads[5]
    del launch.heads[4:]
    sums = z.new_empty((2, launch.tiles))
    ones = torch.ones(2, 1, dtype=z.dtype, device=DEVICE)
    launch(
        cuda._weighted_sum,
        *(ones, None, None, sums, inner, slope_strides),
        *(launch.length, launch.shape, launch.tiles, z.numel()),
        chunks=launch.chunks,
    )
    assert buffer.sum() == inner.sum() + 7.0 * (buffer.numel() - inner.numel())


@pytest.mark.skipif(sys.platform != "linux", reason="needs memory that is not there until used")
def test_the_slope_of_many_logits_leaves_to_far_places() -> None:
    """As if there were so many that three times their number takes more than 32 bits."""
    z, far = logits(1, 2, 2, 2), 2**31 // 3 + 1
    ones = torch.full((1, 1), 400.0, dtype=z.dtype, device=DEVICE)
    launch = cuda.Launch([z], LogitsSpec((3, 3), True), kind=Tsallis(2).kind(), q=2.0)
    corners = []
    for distance in (z.numel(), far):
        slope = torch.empty(3 * distance + z.numel(), dtype=torch.int8, device=DEVICE)
        maps = [slope[start : start + z.numel()] for start in range(0, len(slope), distance)]
        for each in maps:
            each.zero_()
        launch(
            cuda._weighted_sum,
            *(ones, None, None, z.new_empty((1, launch.tiles)), slope, (0,) * 5),
            *(launch.length, launch.shape, launch.tiles, distance),
        )
        corners.append(torch.stack(maps))
    assert corners[0].any(1).all() and torch.equal(*corners)


@each_resolution
def test_no_images(size: Any) -> None:
    assert_sums_equal(logits(0, 3, 2, 2), Tsallis(2, -1), LogitsSpec(size))
    assert_classes_equal(logits(0, 3, 2, 2), LogitsSpec(size))


@each_resolution
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_low_precision_accumulates_in_float32(size: Any, dtype: torch.dtype) -> None:
    z = logits(1, 5, 2, 3).to(dtype)
    weights = torch.ones(1, 1, device=DEVICE)
    arguments = (None, None, Tsallis(1), LogitsSpec(size, True), True)
    found = cuda.weighted_sum(z, weights, *arguments)
    as_plain = plain.weighted_sum(z, weights, *arguments)
    exact = plain.weighted_sum(z.double(), weights.double(), *arguments)
    assert found[0].dtype == torch.float32
    for result, reference, truth in zip(found, as_plain, exact, strict=True):
        assert_within_budget(result, reference, truth, dtype)


@each_resolution
def test_repeats_are_equal_and_inputs_unchanged(size: Any) -> None:
    z = logits(1, 3, 2, 3)
    before, weights = z.clone(), torch.ones(1, 1, dtype=z.dtype, device=DEVICE)
    arguments = (z, weights, None, None, Tsallis(1), LogitsSpec(size, True), True)
    first, second = (cuda.weighted_sum(*arguments) for _ in range(2))
    assert all(map(torch.equal, first, second))
    assert torch.equal(z, before)


@quiet
@pytest.mark.parametrize("potential", POTENTIALS, ids=str)
def test_a_pixel_that_does_not_count_may_hold_anything(potential: Potential) -> None:
    z = logits(1, 3, 2, 3)
    valid = torch.ones(1, 2, 3, dtype=torch.bool, device=DEVICE)
    valid[0, 0, 1] = valid[0, 1, 2] = False
    z[0, :, 0, 1], z[0, 1, 1, 2] = torch.nan, torch.inf
    assert_sums_equal(z, potential, valid=valid, y=torch.zeros(1, 2, 3, device=DEVICE))
    assert_classes_equal(z, threshold=0.5, valid=valid)


@quiet
@each_resolution
@pytest.mark.parametrize("potential", POTENTIALS, ids=str)
def test_masked_classes_and_huge_logits(potential: Potential, size: Any) -> None:
    z = logits(1, 3, 2, 2, spread=1e4)
    z[:, 2] = -torch.inf
    y = torch.zeros((1, *(size or (2, 2))), device=DEVICE)
    assert_sums_equal(z, potential, LogitsSpec(size), y=y)
    assert_classes_equal(z, LogitsSpec(size))


@quiet
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@each_resolution
def test_what_is_not_finite_shows(bad: float, size: Any) -> None:
    z = logits(2, 3, 2, 2)
    z[0, 1, 0, 0] = bad
    weights = torch.ones(2, 3, dtype=z.dtype, device=DEVICE)
    for threshold, guide in ((None, None), (0.5, None), (0.5, z.roll(1, 1))):
        assert_classes_equal(z, LogitsSpec(size), threshold=threshold, guide=guide)
        y, _ = cuda.classify(z, guide, None, None, LogitsSpec(size), threshold)
        assert (y[0] == 3).any() and not (y[1] == 3).any()
        for potential in (Tsallis(2, -1), CrossEntropy()):
            sums, slope = cuda.weighted_sum(z, weights, y, None, potential, LogitsSpec(size), True)
            assert sums.isnan().tolist() == [True, False]
            assert slope[0].isnan().any() and not slope[1].isnan().any()


def test_no_kernel_spills_its_registers() -> None:
    """Compiled for A100, H100 and B200, as losses of street scenes launch them."""
    script = Path(__file__).with_name("compile_kernels.py")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(script), "80", "90", "100"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert len(report) >= 3 * 16
    assert {name: found for name, found in report.items() if found["spills"]} == {}


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


@pytest.mark.parametrize("default_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_kernels_pass_their_own_check(
    default_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    if DEVICE == "cpu":  # the interpreter has no driver that could name its target
        target = SimpleNamespace(backend="cuda")
        driver = SimpleNamespace(get_current_target=lambda: target)
        monkeypatch.setattr(triton.runtime.driver, "_active", driver)
    before = torch.get_default_dtype()
    torch.set_default_dtype(default_dtype)
    try:
        cuda.check(torch.device(DEVICE))
    finally:
        torch.set_default_dtype(before)


def test_a_triton_that_cannot_compile_the_kernels_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "__version__", "3.3.1")
    with pytest.raises(RuntimeError, match=r"Triton 3\.4 or later, not 3\.3\.1"):
        cuda.check(torch.device(DEVICE))
