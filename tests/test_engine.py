"""Every path of the engine computes what the plain formula says, in bounded memory."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from support import (
    LAYOUTS,
    assert_close,
    assert_within_budget,
    largest,
    lay_out,
    random_logits,
)
from torch import Tensor

from maxsquare import MaxSquareLoss
from maxsquare.engine import Problem, bilinear, blocks, memory, paths, pixelwise
from maxsquare.potentials import Label, Tsallis

PROBLEMS = {
    "entropy": Problem(Tsallis(1)),
    "max_square": Problem(Tsallis(2)),
    "tsallis": Problem(Tsallis(1.3)),
    "image_wise": Problem(Tsallis(2), by_class=True),
    "image_wise_entropy": Problem(Tsallis(1), by_class=True),
    "cross_entropy": Problem(Label(), ignore_index=1),
    "pseudo_label": Problem(Label(), threshold=0.5),
    "guidance": Problem(Label(), threshold=0.5),
}
GUIDED, LABELLED = "guidance", "cross_entropy"
each_problem = pytest.mark.parametrize("name", PROBLEMS)


@pytest.fixture(params=[1, 7 * 4 * 19, None], ids=["one pixel", "a few pixels", "as shipped"])
def block_size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of one pixel or row, of a few (so that some are cut short), and the usual ones.

    Of small images a block holds several: of the few pixels some, and as shipped all of them.
    """
    if request.param is not None:
        monkeypatch.setattr(blocks, "CACHE_BYTES_PER_THREAD", 2 * request.param)
        monkeypatch.setattr(blocks, "UPSAMPLED_BYTES_PER_THREAD", 2 * request.param)
        monkeypatch.setattr(blocks, "COLUMNS_PER_BAND", min(request.param, 3))
        monkeypatch.setattr(blocks, "ROWS_PER_STRIP", 2)


def case(
    name: str, shape: tuple[int, ...], size: tuple[int, int] | None, seed: int = 0
) -> tuple[Tensor, Problem, dict[str, Any]]:
    """float64 logits, problem and further tensors, a mask included."""
    z = random_logits(shape, seed=seed)
    pixels = (shape[0], *(shape[2:] if size is None else size))
    generator = torch.Generator().manual_seed(seed)
    arguments: dict[str, Any] = {"valid": torch.rand(pixels, generator=generator) < 0.8}
    if name == GUIDED:
        arguments["guide"] = random_logits(shape, seed=seed + 1)
    if name == LABELLED:
        arguments["labels"] = torch.randint(-1, shape[1], pixels, generator=generator)
    return z, PROBLEMS[name]._replace(size=size), arguments


def both_ways(
    z: Tensor, problem: Problem, arguments: dict[str, Any], pick: Callable[..., Tensor]
) -> list[tuple[Tensor, Tensor]]:
    """Value and gradient under an uneven upstream, by the fast path and by the plain formula."""
    results = []
    for engine in (paths, pixelwise):
        leaf = z.detach().requires_grad_()
        value = pick(engine)(leaf, problem, **arguments)[0]
        upstream = torch.arange(1, value.numel() + 1, dtype=value.dtype).view_as(value)
        (gradient,) = torch.autograd.grad(value, leaf, upstream / upstream.sum())
        results.append((value.detach(), gradient))
    return results


def rare_ones_more(counts: Tensor) -> Tensor:
    return 1 / (1 + counts.double())


def weighted(engine: Any) -> Callable[..., Any]:
    return partial(engine.accumulate, weigh=rare_ones_more)


def assert_both_ways(z: Tensor, problem: Problem, arguments: dict[str, Any]) -> None:
    for pick in (lambda engine: engine.accumulate, weighted, lambda engine: engine.terms):
        (value, gradient), (plain, plain_gradient) = both_ways(z, problem, arguments, pick)
        assert_close(value, plain)
        assert_close(gradient, plain_gradient)


@each_problem
@pytest.mark.parametrize(
    "shape", [(2, 5, 23), (5, 3, 4), (2, 3, 7, 9), (5, 2, 3, 2), (1, 4, 3, 4, 5)], ids=str
)
def test_blocks_equal_the_plain_formula_at_every_block_edge(
    block_size: None, name: str, shape: tuple[int, ...]
) -> None:
    assert_both_ways(*case(name, shape, None))


@each_problem
@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("size", [(17, 23), (3, 4), (6, 31), (1, 1)], ids=str)
def test_fused_upsampling_equals_upsampling_first(
    block_size: None, name: str, size: tuple[int, int], align_corners: bool
) -> None:
    z, problem, arguments = case(name, (2, 4, 6, 7), size)
    assert_both_ways(z, problem._replace(align_corners=align_corners), arguments)


@each_problem
@given(st.data())
def test_any_shape_layout_and_kind_of_input_equals_the_plain_formula(
    name: str, data: st.DataObject
) -> None:
    rank = data.draw(st.integers(1, 3))
    images, classes = data.draw(st.integers(1, 3)), data.draw(st.sampled_from([2, 3, 19]))
    spatial = tuple(data.draw(st.lists(st.integers(1, 9), min_size=rank, max_size=rank)))
    size = data.draw(st.tuples(st.integers(1, 12), st.integers(1, 12))) if rank == 2 else None
    seed = data.draw(st.integers(0, 999))
    z, problem, arguments = case(name, (images, classes, *spatial), size, seed)
    problem = problem._replace(align_corners=data.draw(st.booleans()))
    if data.draw(st.booleans()):
        del arguments["valid"]
    if not data.draw(st.booleans()):
        z = 0.01 + 0.98 * z.softmax(1)
        if "guide" in arguments:
            arguments["guide"] = 0.01 + 0.98 * arguments["guide"].softmax(1)
        if isinstance(problem.potential, Tsallis):
            problem = problem._replace(potential=problem.potential._replace(normalised=False))
        problem = problem._replace(from_logits=False)
    if data.draw(st.booleans()):
        z = z[:, :1].contiguous()
        if "guide" in arguments:
            arguments["guide"] = arguments["guide"][:, :1]
        if "labels" in arguments:
            arguments["labels"] = arguments["labels"].clamp(max=1)
        problem = problem._replace(binary=True)
    assert_both_ways(lay_out(z, data.draw(st.sampled_from(LAYOUTS))), problem, arguments)


TARGETS = ["entropy", "max_square", "tsallis", "image_wise"]


def two_heads(
    name: str, masked: bool = True, size: tuple[int, int] | None = (17, 23)
) -> tuple[Tensor, Tensor, Callable[..., Any]]:
    """Final and low-level logits, and a function that sums the potentials of both at once."""
    z, problem, arguments = case(name, (2, 4, 3, 4), size)
    low = random_logits((2, 4, 3, 4) if size is None else (2, 4, 2, 5), seed=2)
    arguments = {"valid": arguments["valid"] if masked else None, "weigh": rare_ones_more}
    guided = PROBLEMS[GUIDED]._replace(size=problem.size)
    return z, low, lambda z, low: paths.accumulate_both(z, problem, low, guided, **arguments)


@pytest.mark.parametrize("masked", [True, False], ids=["masked", "all count"])
@pytest.mark.parametrize("size", [None, (17, 23)], ids=["as is", "upsampled"])
@pytest.mark.parametrize("name", TARGETS)
def test_two_heads_in_one_pass_equal_one_after_the_other(
    block_size: None,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    size: tuple[int, int] | None,
    masked: bool,
) -> None:
    z, low, both = two_heads(name, masked, size)
    results = []
    for path in (blocks, None):
        monkeypatch.setattr(paths, "choose_path", lambda *tensors, path=path: path)
        leaves = [head.clone().requires_grad_() for head in (z, low)]
        (sums, counts), (low_sums, low_counts) = both(*leaves)
        assert (sums.grad_fn.name() == "_SweepBothBackward") is (path is blocks)
        upstream = [torch.tensor([[1.0], [-3.0]], dtype=z.dtype) * k for k in (1, 2)]
        gradients = torch.autograd.grad((sums, low_sums), leaves, upstream)
        results.append((sums.detach(), low_sums.detach(), *gradients, counts, low_counts))
    for ours, plain in zip(*results, strict=True):
        assert_close(ours, plain)


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("size", [None, (4, 6)], ids=["as is", "upsampled"])
def test_gradcheck_of_two_heads(name: str, size: tuple[int, int] | None) -> None:
    z, low, both = two_heads(name, size=size)

    def sums(z: Tensor, low: Tensor) -> tuple[Tensor, Tensor]:
        return tuple(pair[0] for pair in both(z, low))

    heads = (z.requires_grad_(), low.requires_grad_())
    assert torch.autograd.gradcheck(sums, heads)
    assert torch.autograd.gradgradcheck(sums, heads)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("head", [0, 1], ids=["final", "low-level"])
def test_what_is_not_finite_in_either_head_shows(bad: float, head: int) -> None:
    z, low, both = two_heads("max_square", masked=False)
    (z, low)[head][0, 1, 1, 3] = bad
    leaves = [z.requires_grad_(), low.requires_grad_()]
    (sums, _), (low_sums, _) = both(*leaves)
    # A guide decides labels, so it shows in the guided sum as well.
    assert sums.isnan().any() == (head == 0) and low_sums.isnan().any()
    gradients = torch.autograd.grad(sums.sum() + low_sums.sum(), leaves)
    assert gradients[1].isnan().any() and gradients[0].isnan().any() == (head == 0)


@each_problem
@pytest.mark.parametrize("size", [None, (20, 31)], ids=["as is", "upsampled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_low_precision_stays_within_the_budget_of_the_plain_formula(
    name: str, size: tuple[int, int] | None, dtype: torch.dtype
) -> None:
    z, problem, arguments = case(name, (2, 19, 6, 9), size)
    # A threshold, like a tie, is a step: the index is decided once, for all precisions.
    if name in ("image_wise", "image_wise_entropy", "pseudo_label", "guidance"):
        z, guide = z.to(dtype).double(), arguments.get("guide")
        if guide is not None:
            arguments["guide"] = guide.to(dtype).double()
    z = z.to(dtype).double()

    def run(engine: Any, cast: torch.dtype) -> tuple[Tensor, Tensor]:
        leaf = z.to(cast).requires_grad_()
        given = {k: t.to(cast) if k == "guide" else t for k, t in arguments.items()}
        value = engine.accumulate(leaf, problem, **given)[0]
        (gradient,) = torch.autograd.grad(value.sum(), leaf)
        return value.detach(), gradient

    exact, plain, ours = run(pixelwise, torch.float64), run(pixelwise, dtype), run(paths, dtype)
    assert ours[0].dtype == torch.float32 and ours[1].dtype == dtype
    for a, b, c in zip(ours, plain, exact, strict=True):
        assert_within_budget(a, b, c, dtype)


@pytest.mark.parametrize("size", [None, (20, 31)], ids=["as is", "upsampled"])
def test_where_head_and_guide_tie_the_first_class_wins(size: tuple[int, int] | None) -> None:
    z = random_logits((2, 5, 6, 9)).float()
    z[:, 2:] -= 20
    # Class 0 and 1 change places: their mean probabilities are equal, whatever they are.
    guide = z[:, [1, 0, 2, 3, 4]]
    problem = Problem(Label(), threshold=0.6, size=size)
    y = paths.predict(z, problem, guide=guide)
    assert torch.equal(y, pixelwise.predict(z, problem, guide=guide))
    assert set(y.unique().tolist()) == {-1, 0}


@pytest.mark.parametrize("name", ["image_wise", "pseudo_label"])
@pytest.mark.parametrize("share", [0.01, 1.0], ids=["a few ties", "many ties"])
def test_ties_and_what_is_not_a_number_have_the_index_that_argmax_gives(
    block_size: None, name: str, share: float
) -> None:
    z = random_logits((2, 5, 16, 17)).float()
    chance = torch.rand(2, 1, 16, 17, generator=torch.Generator().manual_seed(0))
    z = torch.where(chance < share, z.sign(), z)
    best = z.topk(2, 1).values
    assert (best[:, 0] == best[:, 1]).any()
    z[0, 3, 2, 2] = torch.nan
    problem = PROBLEMS[name]._replace(potential=None)
    assert torch.equal(paths.predict(z, problem), pixelwise.predict(z, problem))


@each_problem
@pytest.mark.parametrize(
    "hidden",
    [[torch.nan, 0, 0], [0, torch.inf, 0], [-torch.inf] * 3, [0, -torch.inf, 0], [1e30, 0, 0]],
    ids=str,
)
def test_a_pixel_that_does_not_count_may_hold_anything(name: str, hidden: list[float]) -> None:
    z, problem, arguments = case(name, (1, 3, 6, 9), None)
    arguments["valid"][0, 1:4, 2:5] = False

    def results() -> list[Tensor]:
        pairs = both_ways(z, problem, arguments, lambda engine: engine.accumulate)
        return [result for pair in pairs for result in pair]

    clean = results()
    for heads in (z, arguments.get("guide", z)):
        heads[0, :, 1:4, 2:5] = torch.tensor(hidden).view(3, 1, 1)
    for result, expected in zip(results(), clean, strict=True):
        assert torch.equal(result, expected)


def test_a_loss_scale_saves_half_precision_gradients_from_underflow() -> None:
    z = random_logits((1, 19, 128, 128)).half()
    scale = 2.0**16
    gradients = []
    for leaf in (z.requires_grad_(), z.detach().double().requires_grad_()):
        (gradient,) = torch.autograd.grad(MaxSquareLoss()(leaf) * scale, leaf)
        gradients.append(gradient.double())
    ours, exact = gradients
    # Without the scale, the mean over the pixels puts most of them below 6e-5, with fewer digits.
    normal = exact.abs() > torch.finfo(torch.half).tiny
    assert normal.double().mean() > 0.9 and ((exact / scale).abs() < 6e-5).all()
    assert ((ours - exact).abs() <= 2 * torch.finfo(torch.half).eps * exact.abs())[normal].all()


def test_a_weighted_bfloat16_gradient_is_rounded_twice_at_most() -> None:
    z = random_logits((1, 19, 32, 32)).bfloat16()
    gradients = []
    for leaf in (z.requires_grad_(), z.detach().double().requires_grad_()):
        (gradient,) = torch.autograd.grad(0.1 * MaxSquareLoss()(leaf), leaf)
        gradients.append(gradient.double())
    ours, exact = gradients
    # A rounding is half of eps; a little more for float32 arithmetic, where terms cancel.
    near = 1.01 * torch.finfo(torch.bfloat16).eps * exact.abs() + 1e-6 * largest(exact)
    assert ((ours - exact).abs() <= near).all()


@pytest.mark.parametrize("name", [*PROBLEMS])
@pytest.mark.parametrize("size", [None, (9, 13)], ids=["as is", "upsampled"])
def test_gradcheck_with_respect_to_the_logits_that_are_given(
    name: str, size: tuple[int, int] | None
) -> None:
    z, problem, arguments = case(name, (1, 3, 3, 4), size)
    for run in (paths.accumulate, weighted(paths), paths.terms):
        call = lambda z, run=run: run(z, problem, **arguments)[0]  # noqa: E731
        assert torch.autograd.gradcheck(call, z.requires_grad_())
        assert torch.autograd.gradgradcheck(call, z)


@each_problem
@pytest.mark.parametrize("size", [None, (40, 50)], ids=["as is", "upsampled"])
def test_repeats_are_bitwise_equal(name: str, size: tuple[int, int] | None) -> None:
    z, problem, arguments = case(name, (2, 19, 20, 30), size)
    runs = []
    for _ in range(2):
        leaf = z.float().requires_grad_()
        given = {k: t.float() if k == "guide" else t for k, t in arguments.items()}
        sums, _ = paths.accumulate(leaf, problem, **given)
        runs.append((sums, *torch.autograd.grad(sums.sum(), leaf)))
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("size,source", [(7, 3), (3, 7), (1, 5), (5, 1), (512, 65)])
def test_interpolation_matrices_are_those_of_interpolate(
    size: int, source: int, align_corners: bool
) -> None:
    x = torch.eye(source, dtype=torch.float64)[None, :, None]
    expected = F.interpolate(x, (1, size), mode="bilinear", align_corners=align_corners)[0, :, 0].T
    for step in (1, 2, 64):
        matrix = torch.zeros(size, source, dtype=torch.float64)
        for band in bilinear.axis_bands(size, source, align_corners, step, torch.float64):
            matrix[band.out, band.source] = band.weights
        assert_close(matrix, expected)


def test_positions_far_from_the_origin_keep_their_digits() -> None:
    """In float32, position 2000 of 2048 is known to 1e-4 of a pixel, as interpolate has it."""
    (*_, last) = bilinear.axis_bands(2048, 257, True, 1, torch.float32)[:2001]
    exact = 2000 * 256 / 2047 % 1
    assert abs(last.weights[0, 1].item() - exact) < 1e-7


def test_a_class_masked_out_stays_so_when_upsampled() -> None:
    z, problem, arguments = case("max_square", (1, 4, 5, 6), (19, 23))
    z[:, 2] = -torch.inf
    arguments.pop("valid")
    others = z[:, [0, 1, 3]]
    for value, gradient in both_ways(z, problem, arguments, lambda engine: engine.accumulate):
        (expected, expected_gradient), _ = both_ways(
            others, problem, arguments, lambda engine: engine.accumulate
        )
        assert_close(value, expected)
        assert_close(gradient[:, [0, 1, 3]], expected_gradient)
        assert not gradient[:, 2].any()


@each_problem
def test_nan_reaches_the_pixels_it_touches_and_no_other(name: str) -> None:
    z, problem, arguments = case(name, (1, 3, 6, 6), (31, 31))
    problem = problem._replace(align_corners=True)
    z[0, 0, 0, 0] = torch.nan
    touched = torch.zeros(1, 31, 31, dtype=torch.bool)
    touched[:, :6, :6] = True
    labels = arguments.get("labels")
    if labels is not None:
        labels.clamp_(min=0).masked_fill_(labels == 1, 0)
    for engine in (paths, pixelwise):
        leaf = z.clone().requires_grad_()
        sums, _ = engine.accumulate(leaf, problem, **{**arguments, "valid": ~touched})
        (gradient,) = torch.autograd.grad(sums.sum(), leaf)
        assert not sums.isnan().any() and not gradient.isnan().any()
        assert engine.accumulate(z, problem, **{**arguments, "valid": touched})[0].isnan().any()


@pytest.mark.parametrize("name", ["max_square", "image_wise", "cross_entropy"])
@pytest.mark.parametrize("size", [None, (9, 8)], ids=["as is", "upsampled"])
@pytest.mark.parametrize("labels", [[-1, 0, 1, 3], [0, 2, 3]], ids=["some ignored", "all count"])
def test_given_indices_count_for_every_potential(
    name: str, size: tuple[int, int] | None, labels: list[int]
) -> None:
    z, problem, arguments = case(name, (2, 4, 3, 5), size)
    choice = torch.randint(len(labels), arguments["valid"].shape)
    arguments["labels"] = torch.tensor(labels)[choice]
    assert_both_ways(z, problem._replace(ignore_index=1), arguments)


def test_the_default_device_is_not_that_of_the_logits() -> None:
    for name in PROBLEMS:
        for size in (None, (9, 8)):
            z, problem, arguments = case(name, (2, 4, 3, 5), size)
            expected = both_ways(z, problem, arguments, weighted)[0]
            with torch.device("meta"):
                leaf = z.clone().requires_grad_()
                value = weighted(paths)(leaf, problem, **arguments)[0]
                (gradient,) = torch.autograd.grad(value.sum(), leaf)
                assert paths.terms(z, problem, **arguments)[0].device == z.device
            assert torch.equal(value.detach(), expected[0])
            assert gradient.device == z.device


@pytest.mark.parametrize("name", ["image_wise", "pseudo_label"])
@pytest.mark.parametrize("classes", [2, 254, 255, 300])
def test_any_number_of_classes_has_an_index(name: str, classes: int) -> None:
    z, problem, arguments = case(name, (1, classes, 3, 5), None)
    z[0, -1, 0] += 50
    assert_both_ways(z, problem, arguments)


def test_the_plain_formula_is_chosen_where_a_fast_path_would_break() -> None:
    class Subclass(Tensor):
        pass

    z = random_logits((1, 3, 4, 4))
    assert paths.choose_path(z) is blocks
    assert paths.choose_path(z.as_subclass(Subclass)) is None
    assert paths.choose_path(z.to("meta")) is None
    chosen = []

    def record(z: Tensor) -> Tensor:
        chosen.append(paths.choose_path(z))
        return z.sum()

    torch.func.grad(record)(z)
    assert chosen == [None]


@pytest.mark.parametrize("size", [None, (9, 13)], ids=["as is", "upsampled"])
def test_no_slope_is_computed_where_no_gradient_is_wanted(
    monkeypatch: pytest.MonkeyPatch, size: tuple[int, int] | None
) -> None:
    sloped, sweep = [], blocks.sweep

    def record(z: Tensor, problem: Problem, **arguments: Any) -> blocks.Swept:
        sloped.append(arguments.get("weights") is not None)
        return sweep(z, problem, **arguments)

    monkeypatch.setattr(blocks, "sweep", record)
    leaf = random_logits((1, 3, 4, 4)).requires_grad_()
    for name in ("max_square", "image_wise"):
        problem = PROBLEMS[name]._replace(size=size)
        weighted(paths)(leaf.detach(), problem)
        with torch.no_grad():
            weighted(paths)(leaf, problem)
        assert sloped == [False, False]
        sloped.clear()
        weighted(paths)(leaf, problem)
        assert sloped.pop()
        sloped.clear()


def test_where_the_kernels_fail_a_warning_says_so_and_the_plain_formula_computes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(name: str) -> Any:
        raise ImportError(f"no {name}")

    monkeypatch.setattr(paths.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(paths.importlib, "import_module", fail)
    paths._kernels.cache_clear()
    try:
        with pytest.warns(UserWarning, match=r"slow path.*no maxsquare\.engine\.kernels"):
            assert paths._kernels() is None
        # Once is enough.
        assert paths._kernels() is None
    finally:
        paths._kernels.cache_clear()


def test_logits_changed_between_the_passes_are_noticed() -> None:
    z = random_logits((1, 3, 4, 4)).requires_grad_()
    leaf = z * 1
    sums, _ = paths.accumulate(leaf, PROBLEMS["max_square"])
    leaf += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        sums.sum().backward()


@pytest.mark.parametrize("available", [True, False], ids=["kept memory", "elsewhere"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_large_results_have_the_layout_of_the_logits(
    monkeypatch: pytest.MonkeyPatch, layout: str, available: bool
) -> None:
    if not available:
        monkeypatch.setattr(memory, "AVAILABLE", False)
    z = lay_out(torch.zeros(2, 8, 256, 512), layout)
    out, expected = memory.empty_like(z), torch.empty_like(z)
    assert (out.shape, out.dtype, out.stride()) == (z.shape, z.dtype, expected.stride())
    assert not out._is_view()


keeps_memory = pytest.mark.skipif(not memory.AVAILABLE, reason="Linux alone keeps memory")


@keeps_memory
def test_the_memory_of_a_gradient_that_is_gone_serves_the_next_of_its_size() -> None:
    z = torch.zeros(1, 19, 256, 512, requires_grad=True)
    loss = MaxSquareLoss()

    def gradient(z: Tensor) -> Tensor:
        return torch.autograd.grad(loss(z), z)[0]

    first = gradient(z)
    place, values = first.data_ptr(), first.clone()
    assert gradient(z).data_ptr() != place
    row = first[0, 3, 7]
    del first
    # A view is enough, in whatever library.
    assert gradient(z + 1).data_ptr() != place
    array = row.numpy()
    del row
    assert gradient(z + 1).data_ptr() != place
    assert torch.equal(torch.from_numpy(array), values[0, 3, 7])
    del array
    places = [gradient(z).data_ptr() for _ in range(3)]
    assert place in places and torch.equal(gradient(z), values)
    # Sizes may alternate, but not without end.
    for others in (memory.MOST_KEPT - 1, memory.MOST_KEPT):
        for k in range(others):
            gradient(torch.zeros(1, 19, 256, 513 + k, requires_grad=True))
        assert (z.nbytes in map(len, memory._kept)) is (others < memory.MOST_KEPT)
        gradient(z)


@keeps_memory
def test_gradients_in_kept_memory_are_as_any_others() -> None:
    z = random_logits((1, 19, 256, 512)).float().requires_grad_()
    loss = MaxSquareLoss()
    for _ in range(2):  # accumulated
        loss(z).backward()
    assert z.grad is not None
    (single,) = torch.autograd.grad(loss(z), z)
    assert_close(z.grad, 2 * single)
    torch.optim.SGD([z], lr=0.1).zero_grad(set_to_none=False)
    assert not z.grad.any() and single.any()


@keeps_memory
def test_a_system_that_refuses_advice_gives_memory_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(memory.mmap, "MADV_HUGEPAGE", 9999)
    monkeypatch.setattr(memory.mmap, "MADV_FREE", 9999)
    monkeypatch.setattr(memory, "_kept", [])
    out = memory.empty_like(torch.zeros(2**22)).fill_(1)
    assert out.sum() == 2**22
    del out
    assert not memory._kept


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="no huge pages to ask for"
)
@pytest.mark.parametrize(
    "patience,advised", [(torch.inf, True), (-1, False)], ids=["as fast as can be", "slow"]
)
def test_large_results_ask_for_huge_pages_until_they_come_slowly(
    monkeypatch: pytest.MonkeyPatch, patience: float, advised: bool
) -> None:
    monkeypatch.setattr(memory, "PATIENCE_SECONDS", patience)
    monkeypatch.setattr(memory, "_kept", [])
    out = memory.empty_like(torch.empty(2**24))
    middle, start, stop = out.data_ptr() + out.nbytes // 2, 0, 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match("[0-9a-f]+-[0-9a-f]+ ", line):
            start, stop = (int(end, 16) for end in line.split()[0].split("-"))
        elif line.startswith("VmFlags") and start <= middle < stop:
            assert ("hg" in line.split()) is advised
            return
    raise AssertionError("the tensor is nowhere")


MEASURE = """
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
    "shape,size",
    [((512, 1024), "none"), ((65, 129), "512x1024")],
    ids=["as is", "upsampled"],
)
def test_peak_memory_stays_far_below_a_tensor_of_logits(shape: tuple[int, int], size: str) -> None:
    """Beyond logits and gradient: 16 MiB, where one (1, 19, 512, 1024) tensor is 38 MiB."""
    arguments = [*map(str, shape), size, "16"]
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, *arguments], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr
