"""The kernels compute what the specification says: one list of cases for every implementation.

The specification is the plain formula in float64. The plain formula itself is judged in float32.
Without a GPU Triton's interpreter runs the Triton kernels, and takes seconds for what takes the
others a millisecond: it gets the tiny cases of the list alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import KINDS, POTENTIALS, Case, make_case
from support import (
    LAYOUTS,
    TOLERANCE,
    assert_close,
    assert_within_budget,
    largest,
    lay_out,
    random_logits,
    triton_kernels,
)
from torch import Tensor

from maxsquare.checks import INTEGERS
from maxsquare.engine import LogitsSpec, cpu, libraries, plain
from maxsquare.potentials import CrossEntropy, Linear, Potential, Tsallis

BACKENDS: dict[str, ModuleType | None] = {
    "plain": plain,
    "C++": cpu if any(libraries.compilers()) else None,
    "Triton": triton_kernels(),
}
each_potential = pytest.mark.parametrize("potential", POTENTIALS.values(), ids=POTENTIALS)
each_size = pytest.mark.parametrize("size", [None, (20, 31)], ids=["as is", "upsampled"])


def backend(name: str) -> ModuleType:
    kernels = BACKENDS[name]
    if kernels is None:
        pytest.skip(f"needs what the {name} kernels need")
    return kernels


@pytest.fixture(params=BACKENDS)
def kernels(request: pytest.FixtureRequest) -> ModuleType:
    """Each implementation of the operators."""
    return backend(request.param)


@pytest.fixture(params=["plain", "C++"])
def fast_kernels(request: pytest.FixtureRequest) -> ModuleType:
    """Each that takes no seconds for a call."""
    return backend(request.param)


@pytest.fixture
def compiled() -> ModuleType:
    """The C++ kernels."""
    return backend("C++")


def indices_of(case: Case, y: Tensor) -> list[Tensor | None]:
    """The classes by which pixels may be weighted."""
    if isinstance(case.potential, Linear):
        return [None]
    return [y] if case.by_class or isinstance(case.potential, CrossEntropy) else [y, None]


def assert_equal_to_specification(case: Case, kernels: ModuleType) -> None:
    """All operators give what the plain formula gives in float64; NaN where it gives NaN."""
    dtype = torch.float32 if kernels is plain else torch.float64
    on_gpu = kernels is BACKENDS["Triton"] and torch.cuda.is_available()
    given = case.to(dtype, torch.device("cuda" if on_gpu else "cpu"))
    exact = case.to(dtype).to(torch.float64)

    def assert_equal(actual: Tensor, expected: Tensor) -> None:
        finite = expected[expected.isfinite()]
        tolerance = TOLERANCE[dtype] * max(largest(finite), 1e-3)
        assert actual.shape == expected.shape
        torch.testing.assert_close(
            actual.cpu().double(), expected, rtol=0, atol=tolerance, equal_nan=True
        )

    y, counts = given.classify(kernels)
    expected_y, expected_counts = exact.classify(plain)
    assert torch.equal(y.cpu(), expected_y) and torch.equal(counts.cpu(), expected_counts)
    for index, expected_index in zip(
        indices_of(given, y), indices_of(exact, expected_y), strict=True
    ):
        sums, grad = given.weighted_sum(kernels, index)
        expected_sums, expected_grad = exact.weighted_sum(plain, expected_index)
        assert_equal(sums, expected_sums)
        assert_equal(grad, expected_grad)
        sums_alone, no_grad = given.weighted_sum(kernels, index, needs_grad=False)
        assert no_grad is None
        assert_equal(sums_alone, expected_sums)
    class_sums = given.class_sums(kernels)
    assert class_sums.dtype == dtype
    assert_equal(class_sums, exact.class_sums(plain))


# One list of cases --------------------------------------------------------------------------------


def laid_out(layout: str, shape: tuple[int, ...] = (1, 3, 2, 3)) -> Case:
    case = make_case(shape, "guide", Tsallis(2, -1))
    return replace(case, z=lay_out(case.z, layout))


def hidden(potential: Potential) -> Case:
    """What is no number stands at pixels that do not count."""
    case = make_case((1, 3, 2, 3), "argmax", potential, share=1)
    assert case.valid is not None
    case.valid[0, 0, 1] = case.valid[0, 1, 2] = False
    case.z[0, :, 0, 1], case.z[0, 1, 1, 2] = torch.nan, torch.inf
    return case


def shown(bad: float, spec: LogitsSpec = LogitsSpec()) -> Case:  # noqa: B008
    """What is no number stands at a pixel that counts; the other image has none."""
    shape = (2, 3, 2, 2) if spec.size is None else (2, 2, 1, 2)
    case = make_case(shape, "threshold", Tsallis(1), spec, share=1)
    case.z[0, 1, 0, 0] = bad
    return case


def masked_class(potential: Potential, spec: LogitsSpec = LogitsSpec()) -> Case:  # noqa: B008
    """A class of which there is none, and huge logits."""
    case = make_case((1, 3, 2, 2), "argmax", potential, spec)
    return replace(case, z=(case.z * 5e3).index_fill(1, torch.tensor([2]), -torch.inf))


def labelled(labels: Tensor) -> Case:
    case = make_case((len(labels), 3, *labels.shape[1:]), "labels", Tsallis(2, -1))
    return replace(case, labels=labels)


UP, CORNERS = LogitsSpec((3, 4)), LogitsSpec((3, 2), align_corners=True)
CASES: dict[str, Callable[[], Case]] = {
    **{
        name: lambda potential=potential: make_case((1, 3, 2, 3), "argmax", potential)
        for name, potential in POTENTIALS.items()
    },
    "by image": lambda: make_case((2, 3, 2, 2), "guide", Tsallis(2, -1), by_class=False),
    "threshold": lambda: make_case((1, 3, 2, 3), "threshold", CrossEntropy()),
    "guide": lambda: make_case((1, 3, 2, 3), "guide", CrossEntropy()),
    "labels": lambda: labelled(torch.tensor([[[0, 1, 2, -1], [1, -7, 255, 2**33]]])),
    "binary": lambda: make_case((2, 1, 2, 2), "threshold", Tsallis(1), LogitsSpec(binary=True)),
    "one spatial dimension": lambda: laid_out("strided", (1, 2, 5)),
    "three spatial dimensions": lambda: laid_out("reversed", (1, 3, 2, 1, 3)),
    "channels last": lambda: laid_out("channels_last"),
    "expanded": lambda: laid_out("expanded"),
    "no images": lambda: make_case((0, 3, 2, 2), "guide", Tsallis(2, -1)),
    "no pixel counts": lambda: make_case((2, 3, 2, 2), "argmax", Tsallis(2, -1), share=0),
    "NaN that does not count": lambda: hidden(Tsallis(2, -1)),
    "NaN that does not count, linear": lambda: hidden(Linear()),
    "NaN": lambda: shown(torch.nan),
    "infinity": lambda: shown(torch.inf),
    "a class masked out": lambda: masked_class(Tsallis(1)),
    "a class masked out, linear": lambda: masked_class(Linear()),
    "many classes": lambda: make_case((1, 33, 1, 2), "guide", Tsallis(1.2)),
    "upsampled": lambda: make_case((1, 2, 1, 2), "guide", Tsallis(2, -1), UP),
    "upsampled, corners aligned": lambda: make_case((1, 2, 2, 1), "argmax", Tsallis(1.2), CORNERS),
    "upsampled, linear": lambda: make_case((1, 2, 1, 2), "argmax", Linear(), UP),
    "upsampled, cross entropy": lambda: make_case((1, 2, 2, 1), "argmax", CrossEntropy(), UP),
    "upsampled, binary": lambda: make_case(
        (1, 1, 1, 2), "threshold", Tsallis(1), replace(UP, binary=True)
    ),
    "upsampled, a class masked out": lambda: masked_class(Linear(), CORNERS),
}


# What numpy says of NaN and of infinities when it plays the GPU.
@pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")
@pytest.mark.parametrize("make", CASES.values(), ids=CASES)
def test_every_operator_equals_the_specification(
    make: Callable[[], Case], kernels: ModuleType
) -> None:
    assert_equal_to_specification(make(), kernels)


@pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_an_upsampled_logit_that_is_no_number_reaches_its_image_and_no_other(
    bad: float, kernels: ModuleType
) -> None:
    case = shown(bad, UP)
    y, counts = case.classify(kernels)
    sums, grad = case.weighted_sum(kernels, y)
    class_sums = case.class_sums(kernels)
    assert (counts[:, 2] > 0).tolist() == sums.isnan().tolist() == [True, False]
    assert class_sums.isnan().any(1).tolist() == [True, False]
    assert grad.flatten(1).isnan().any(1).tolist() == [True, False]


def test_inputs_stay_as_they_are_and_repeats_are_equal(kernels: ModuleType) -> None:
    case = make_case((1, 3, 2, 3), "guide", Tsallis(1))
    before = [tensor.clone() for tensor in (case.z, case.guide, case.valid)]
    y, _ = case.classify(kernels)
    first, second = (
        (*case.classify(kernels), *case.weighted_sum(kernels, y), case.class_sums(kernels))
        for _ in range(2)
    )
    assert all(map(torch.equal, first, second))
    assert all(map(torch.equal, before, (case.z, case.guide, case.valid)))


# Of any shape -------------------------------------------------------------------------------------


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
        LogitsSpec(draw(st.none() | sizes) if rank == 2 else None, draw(st.booleans()), binary),
        seed=draw(st.integers(0, 999)),
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
    if case.guide is not None and case.spec.size is not None and draw(st.booleans()):
        case.guide = random_logits((*case.guide.shape[:2], draw(st.integers(1, 9)), 4), seed=3)
    case.valid = case.valid if draw(st.booleans()) else None
    return case


@each_potential
@settings(max_examples=40)
@given(data=st.data())
def test_any_shape_layout_and_kind_of_input_equals_the_specification(
    potential: Potential, data: st.DataObject
) -> None:
    case, kernels = data.draw(cases(potential)), backend("C++")
    # Chunks of one pixel or row of cells, of a few so that some are cut short, and the usual ones.
    pixels = data.draw(st.sampled_from([1, 70, cpu.CHUNK_PIXELS]))
    chunks_of_cells = data.draw(st.sampled_from([1, 3, cpu.CHUNKS_OF_CELLS]))
    with (
        mock.patch.object(cpu, "CHUNK_PIXELS", pixels),
        mock.patch.object(cpu, "CHUNKS_OF_CELLS", chunks_of_cells),
    ):
        assert_equal_to_specification(case, kernels)


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
    source: tuple[int, int], size: tuple[int, int], align_corners: bool, compiled: ModuleType
) -> None:
    spec = LogitsSpec(size, align_corners)
    for kind, potential in (
        ("argmax", Tsallis(2)),
        ("guide", CrossEntropy()),
        ("argmax", Linear()),
    ):
        case = make_case((2, 4, *source), kind, potential, spec)
        assert_equal_to_specification(case, compiled)


def results(case: Case, kernels: ModuleType, y: Tensor) -> tuple[Tensor, ...]:
    return *case.weighted_sum(kernels, y), case.class_sums(kernels)


@each_potential
@each_size
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_low_precision_stays_within_the_budget_of_the_plain_formula(
    potential: Potential, size: tuple[int, int] | None, dtype: torch.dtype, compiled: ModuleType
) -> None:
    case = make_case((2, 19, 6, 9), "labels", potential, LogitsSpec(size)).to(dtype)
    y, _ = case.classify(plain)
    exact = results(case.to(torch.float64), plain, y)
    in_plain, ours = (results(case, kernels, y) for kernels in (plain, compiled))
    assert ours[0].dtype == ours[2].dtype == torch.float32
    # What is upsampled sums up in float32 until the upstream gradient has scaled it.
    assert ours[1].dtype == (dtype if size is None else torch.float32)
    for a, b, c in zip(ours, in_plain, exact, strict=True):
        assert_within_budget(a, b, c, dtype)


@each_potential
@pytest.mark.parametrize("spread", [1e-3, 30, 1e4])
def test_flat_and_certain_predictions_stay_within_the_budget(
    potential: Potential, spread: float, compiled: ModuleType
) -> None:
    case = make_case((1, 19, 40, 50), "argmax", potential)
    case = replace(case, z=case.z * spread).to(torch.float32)
    y, _ = case.classify(plain)
    exact = results(case.to(torch.float64), plain, y)
    in_plain, ours = (results(case, kernels, y) for kernels in (plain, compiled))
    for a, b, c in zip(ours, in_plain, exact, strict=True):
        assert_within_budget(a, b, c, torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_read_exactly_and_rounded_to_nearest(
    dtype: torch.dtype, compiled: ModuleType
) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).view(1, 1, -1)
    z = torch.cat((every, torch.zeros_like(every)), 1)
    finite = every[:, 0].isfinite()
    sums = []
    for logits in (z, z.float()):
        case = Case(logits, CrossEntropy(), valid=finite, by_class=False)
        sums.append(case.weighted_sum(compiled, torch.zeros(1, 2**16, dtype=torch.int8))[0])
        # Each of them in a pixel and a sum of its own.
        images = replace(case, z=logits.permute(2, 1, 0), valid=None)
        sums.append(images.weighted_sum(compiled, torch.zeros(2**16, 1, dtype=torch.int8))[0])
    for narrow, wide in zip(sums[:2], sums[2:], strict=True):
        torch.testing.assert_close(narrow, wide, rtol=0, atol=0, equal_nan=True)
    # Weights over all magnitudes: grads from below the smallest number to beyond the largest.
    z = random_logits((3000, 3, 1)).to(dtype)
    weights = torch.logspace(-46, 38, 3000)[:, None]
    grads = [
        compiled.weighted_sum(x, weights, None, None, Tsallis(2), LogitsSpec(), True)[1]
        for x in (z, z.float())
    ]
    expected = grads[1].to(dtype)
    assert (expected == 0).any() and (dtype == torch.bfloat16 or expected.isinf().any())
    assert torch.equal(grads[0], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_positions_far_from_the_origin_keep_their_digits(
    dtype: torch.dtype, compiled: ModuleType
) -> None:
    """In float32, position 2000 of 2048 is known to 1e-4 of a pixel, as interpolate has it."""
    z = torch.zeros(1, 2, 1, 257, dtype=dtype)
    position = 2000 * 256 / 2047
    z[0, 0, 0, int(position) + 1] = 1
    valid = torch.zeros(1, 1, 2048, dtype=torch.bool)
    valid[..., 2000] = True
    spec = LogitsSpec((1, 2048), align_corners=True)
    case = Case(z, CrossEntropy(), valid=valid, spec=spec, by_class=False)
    weight = random_logits((1, 1), seed=5)
    sums, _ = case.weighted_sum(compiled, torch.ones(1, 1, 2048, dtype=torch.int8))
    # -log p_1 = log(1 + exp(z_0)), and z_0 is the weight of the next source pixel.
    lerp_weight = torch.tensor([position % 1], dtype=torch.float64)
    expected = torch.nn.functional.softplus(lerp_weight)
    torch.testing.assert_close((sums / weight[0]).double(), expected, rtol=5e-7, atol=0)


# Special values -----------------------------------------------------------------------------------


@each_size
def test_where_head_and_guide_tie_the_first_class_wins(
    size: tuple[int, int] | None, fast_kernels: ModuleType
) -> None:
    z = random_logits((2, 5, 6, 9)).float()
    z[:, 2:] -= 20
    # Class 0 and 1 change places: their mean probabilities are equal, whatever they are.
    guide = z[:, [1, 0, 2, 3, 4]]
    case = Case(z, CrossEntropy(), guide=guide, threshold=0.6, spec=LogitsSpec(size))
    y, _ = case.classify(fast_kernels)
    assert set(y.unique().tolist()) == {-1, 0}


@pytest.mark.parametrize("threshold", [None, 0.5], ids=["argmax", "threshold"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("share", [0.01, 1.0], ids=["a few ties", "many ties"])
def test_ties_and_what_is_not_finite_have_the_class_that_the_plain_formula_gives(
    threshold: float | None, bad: float, share: float, compiled: ModuleType
) -> None:
    z = random_logits((2, 5, 16, 17)).float()
    chance = torch.rand(2, 1, 16, 17, generator=torch.Generator().manual_seed(0))
    z = torch.where(chance < share, z.sign(), z)
    best = z.topk(2, 1).values
    assert (best[:, 0] == best[:, 1]).any()
    z[0, 3, 2, 2] = z[1, 0, 3, :4] = bad
    z[1, :, 5, 6] = bad
    case = Case(z, CrossEntropy(), threshold=threshold)
    y, counts = case.classify(compiled)
    expected_y, expected_counts = case.classify(plain)
    assert torch.equal(y, expected_y) and torch.equal(counts, expected_counts)
    assert y[1, 5, 6] == 5


def test_a_threshold_accepts_what_is_strictly_above_it(kernels: ModuleType) -> None:
    z = torch.zeros(1, 2, 3)
    z[0, 0] = torch.tensor([-1e-3, 0, 1e-3])
    y, counts = Case(z, CrossEntropy(), threshold=0.5).classify(kernels)
    assert y.tolist() == [[1, -1, 0]] and counts.tolist() == [[1, 1, 0]]


@each_size
@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_labels_of_every_integer_dtype_are_read(
    dtype: torch.dtype, size: tuple[int, int] | None, compiled: ModuleType
) -> None:
    case = make_case((2, 200, 5, 7), "labels", CrossEntropy(), LogitsSpec(size))
    assert case.labels is not None
    case.labels = case.labels.to(dtype)
    # Beyond the classes, not counted, and where the dtype has it negative.
    case.labels[0, 0, :5] = torch.tensor([0, 100, 127, 200, 255]).to(dtype)
    y, counts = case.classify(compiled)
    expected_y, expected_counts = case.classify(plain)
    assert torch.equal(y, expected_y) and torch.equal(counts, expected_counts)
    strided = replace(case, labels=torch.stack([case.labels] * 2, -1)[..., 0])
    assert torch.equal(strided.classify(compiled)[0], y)


@pytest.mark.parametrize("classes", [2, 126, 127, 128, 300])
@pytest.mark.parametrize("kind", KINDS)
def test_any_number_of_classes_has_an_index(
    kind: str, classes: int, fast_kernels: ModuleType
) -> None:
    case = make_case((1, classes, 3, 5), kind, CrossEntropy())
    case.valid = None
    case.z[0, -1, 0] += 50
    case.z[0, 0, 2, 4] = torch.nan
    y, _ = case.classify(fast_kernels)
    if kind != "labels":
        assert (y[0, 0] == classes - 1).all() and y[0, 2, 4] == classes
    case.z[0, 0, 2, 4] = 0
    assert_equal_to_specification(case, fast_kernels)


@each_potential
@each_size
def test_a_pixel_whose_class_is_undefined_makes_the_sum_of_its_image_nan(
    potential: Potential, size: tuple[int, int] | None, fast_kernels: ModuleType
) -> None:
    if isinstance(potential, Linear):
        pytest.skip("weights no classes of pixels")
    case = make_case((2, 3, 5, 6), "labels", potential, LogitsSpec(size), share=1)
    assert case.labels is not None
    case.labels[1, 0, 0] = 77
    y, _ = case.classify(fast_kernels)
    sums, grad = case.weighted_sum(fast_kernels, y)
    assert sums.isnan().tolist() == [False, True]
    assert not grad[0].isnan().any() and grad[1].isnan().any()
    assert torch.equal(grad.isnan(), case.weighted_sum(plain, y)[1].isnan())


@each_potential
@pytest.mark.parametrize(
    "hidden",
    [[torch.nan, 0, 0], [0, torch.inf, 0], [-torch.inf] * 3, [0, -torch.inf, 0], [1e30, 0, 0]],
    ids=str,
)
def test_a_pixel_that_does_not_count_may_hold_anything(
    potential: Potential, hidden: list[float], fast_kernels: ModuleType
) -> None:
    case = make_case((1, 3, 6, 9), "guide", potential)
    assert case.valid is not None and case.guide is not None
    case.valid[0, 1:4, 2:5] = False

    def run() -> list[Tensor]:
        y, counts = case.classify(fast_kernels)
        return [y, counts, *results(case, fast_kernels, y)]

    clean = run()
    for head in (case.z, case.guide):
        head[0, :, 1:4, 2:5] = torch.tensor(hidden).view(3, 1, 1)
    for result, expected in zip(run(), clean, strict=True):
        assert torch.equal(result, expected)


@each_potential
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_reaches_the_pixels_it_touches_and_no_other(
    potential: Potential, bad: float, compiled: ModuleType
) -> None:
    spec = LogitsSpec((31, 31), align_corners=True)
    case = make_case((1, 3, 6, 6), "argmax", potential, spec)
    case.z[0, 0, 0, 0] = bad
    # Where the weight of the bad corner is exactly 0 the product is NaN all the same.
    touched = torch.zeros(1, 31, 31, dtype=torch.bool)
    touched[:, :6, :6] = True
    y = torch.ones(1, 31, 31, dtype=torch.int8)
    untouched = results(replace(case, valid=~touched), compiled, y)
    assert all(result.isfinite().all() for result in untouched)
    sums, _, class_sums = results(replace(case, valid=touched), compiled, y)
    assert sums.isnan().all() and class_sums.isnan().all()


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
    fast_kernels: ModuleType,
) -> None:
    """Any bits behind the exponent make a NaN; R marks what is missing by 1954."""
    y = torch.zeros(5, *(size or (5, 6)), dtype=torch.int8)
    z = random_logits((5, 3, 5, 6)).to(dtype)
    exponent = torch.tensor(torch.inf, dtype=dtype).view(bits)
    z[:, 1, 2, 3] = (
        (exponent + torch.tensor([1, 2, 1954, 2**20 + 1, 2**22 + 5])).to(bits).view(dtype)
    )
    case = Case(z, potential, threshold=0.1, spec=LogitsSpec(size), by_class=False)
    sums, grad, class_sums = results(case, fast_kernels, y)
    assert sums.isnan().all() and grad.flatten(1).isnan().any(1).all()
    assert class_sums.isnan().all()
    assert (case.classify(fast_kernels)[1][:, 3] > 0).all()


@each_potential
def test_a_class_masked_out_stays_so_when_upsampled(
    potential: Potential, fast_kernels: ModuleType
) -> None:
    # Every second pixel of another class; none of the class that is masked out.
    y = (torch.arange(19 * 23).view(1, 19, 23) % 2 * 3).to(torch.int8)
    z = random_logits((1, 4, 5, 6))
    z[:, 2] = -torch.inf
    case = Case(z, potential, spec=LogitsSpec((19, 23)))
    sums, grad, class_sums = results(case, fast_kernels, y)
    for result, expected in zip((sums, grad, class_sums), results(case, plain, y), strict=True):
        assert_close(result, expected)
    assert not grad[:, 2].any() and grad[:, [0, 1, 3]].any() and sums.isfinite()
    assert class_sums[0, 2] == 0 and class_sums.sum() == pytest.approx(19 * 23)


@pytest.mark.parametrize("layout", LAYOUTS)
@each_size
def test_the_gradient_has_the_layout_of_the_logits(
    layout: str, size: tuple[int, int] | None, compiled: ModuleType
) -> None:
    z = lay_out(random_logits((2, 8, 6, 9)), layout)
    case = Case(z, Tsallis(2), spec=LogitsSpec(size), by_class=False)
    _, grad = case.weighted_sum(compiled, None)
    expected = torch.empty_like(z) if size is None else torch.empty(z.shape)
    assert grad.stride() == expected.stride() and not grad._is_view()


@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 3, 0, 5)], ids=str)
def test_no_pixel_is_a_sum_of_zero(shape: tuple[int, ...], fast_kernels: ModuleType) -> None:
    for kind in KINDS:
        y, counts = (case := make_case(shape, kind, CrossEntropy())).classify(fast_kernels)
        sums, grad, class_sums = results(case, fast_kernels, y)
        assert y.shape == (shape[0], *shape[2:]) and counts.shape == (shape[0], 4)
        assert not counts.any() and not sums.any() and grad.shape == shape
        assert class_sums.shape == (shape[0], 3) and not class_sums.any()
