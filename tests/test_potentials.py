"""The family of potentials: slopes, limits, identities and bounds; mostly through the losses."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import Batch, assert_close, batches, random_labels, random_logits, value_and_gradient

from maxsquare import (
    EntropyLoss,
    IWEntropyLoss,
    IWMaxSquareLoss,
    MaxSquareLoss,
    TsallisEntropyLoss,
)
from maxsquare.potentials import POWER_FROM_Q, CrossEntropy, Potential, Probabilities, Tsallis

RATIOS = st.sampled_from([None, 0.0, 0.3, 1.0])


POTENTIALS = st.builds(
    Tsallis,
    # Forms of their own, either side of where the logarithm changes its form, and any other.
    st.sampled_from([1, 2, 1 + 1e-9, POWER_FROM_Q]) | st.floats(0.05, 8),
    st.sampled_from([0, -1]),
) | st.builds(CrossEntropy)


@given(batches(ranks=(1, 2)), POTENTIALS)
def test_the_value_is_that_of_the_definition(batch: Batch, potential: Potential) -> None:
    z = batch.logits
    y = random_labels(tuple(z.shape)).clamp_min(0)
    p = z.softmax(1)
    if isinstance(potential, CrossEntropy):
        exact = -p.gather(1, y[:, None])[:, 0].log()
    elif potential.q == 1:
        exact = -(p * p.log()).sum(1) + potential.offset
    else:
        exact = (1 - (p**potential.q).sum(1)) / (potential.q - 1) + potential.offset
    # The definition itself loses digits near q = 1.
    lost = (
        0 if isinstance(potential, CrossEntropy) or potential.q == 1 else 1 / abs(potential.q - 1)
    )
    tolerance = 1e-10 + 1e-15 * lost
    probabilities = Probabilities(z)
    if isinstance(potential, CrossEntropy):
        value = potential.value(probabilities, y)
    else:
        value = potential.value(probabilities)
    torch.testing.assert_close(value, exact, rtol=tolerance, atol=tolerance)


@given(batches(), RATIOS)
def test_tsallis_entropy_at_q_1_is_shannon_entropy(batch: Batch, ratio: float | None) -> None:
    shannon = EntropyLoss() if ratio is None else IWEntropyLoss(ratio=ratio)
    assert_close(TsallisEntropyLoss(1, ratio=ratio)(batch.logits), shannon(batch.logits))


@pytest.mark.parametrize("spread", [0.1, 2.0, 20.0])
def test_tsallis_entropy_tends_to_shannon_entropy_as_q_tends_to_1(spread: float) -> None:
    inputs = (random_logits((2, 5, 4, 3), spread=spread),)
    shannon, shannon_gradient = value_and_gradient(EntropyLoss(), inputs)
    distances = []
    for gap in (1e-2, 1e-4, 1e-6):
        for q in (1 - gap, 1 + gap):
            value, gradient = value_and_gradient(TsallisEntropyLoss(q), inputs)
            distances.append((value - shannon).abs() + (gradient[0] - shannon_gradient[0]).norm())
            # The second-order term -1/2 (q-1) sum p log^2 p is below 1/2 (q-1) (log C)^2 + 1.
            assert distances[-1] <= 5 * gap
    assert distances[0] > 10 * distances[2] > 100 * distances[4]


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("gap", [1e-3, 1e-5, 1e-7, 1e-9, 3e-16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tsallis_entropy_in_float32_keeps_its_digits_as_q_tends_to_1(
    gap: float, sign: int, dtype: torch.dtype
) -> None:
    """As float32 the last of these are 1."""
    loss = TsallisEntropyLoss(1 + sign * gap)
    logits = random_logits((2, 5, 4, 3)).to(dtype)
    exact, (exact_gradient,) = value_and_gradient(loss, (logits.double(),))
    value, (gradient,) = value_and_gradient(loss, (logits,))
    assert_close(value, exact, torch.float32)
    assert_close(gradient, exact_gradient, dtype)


@pytest.mark.parametrize("q", [0.01, 0.05, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("size", [None, (2, 2)], ids=["as is", "upsampled"])
def test_small_q_keeps_what_rounds_away_as_a_probability(
    q: float, dtype: torch.dtype, size: tuple[int, int] | None
) -> None:
    # exp(-gap) is 0 in the dtype, but not its power q.
    gap = 120.0 if dtype == torch.float32 else 900.0
    logits = torch.tensor([gap, 0.0, 0.0], dtype=dtype).view(1, 3, 1, 1).requires_grad_()
    value = TsallisEntropyLoss(q)(logits, size=size)
    (slope,) = torch.autograd.grad(value, logits)
    power = math.exp(-q * gap)
    # p^q = 1 for the certain class.
    assert value.item() == pytest.approx(2 * power / (1 - q), rel=1e-5)
    expected = q / (1 - q) * power * torch.tensor([-2.0, 1.0, 1.0], dtype=dtype)
    torch.testing.assert_close(slope.flatten(), expected, rtol=1e-5, atol=0)


@given(batches())
def test_tsallis_entropy_at_q_2_is_an_affine_map_of_maximum_squares(batch: Batch) -> None:
    per_pixel = {"reduction": "none"}
    tsallis, tsallis_gradient = value_and_gradient(
        TsallisEntropyLoss(2, **per_pixel), (batch.logits,)
    )
    squares, squares_gradient = value_and_gradient(MaxSquareLoss(**per_pixel), (batch.logits,))
    assert_close(squares, (tsallis - 1) / 2)
    assert_close(squares_gradient[0], tsallis_gradient[0] / 2)


@given(batches())
def test_image_wise_tsallis_at_q_2_has_twice_the_maximum_squares_gradient(batch: Batch) -> None:
    _, tsallis = value_and_gradient(TsallisEntropyLoss(2, ratio=0.2), (batch.logits,))
    _, squares = value_and_gradient(IWMaxSquareLoss(ratio=0.2), (batch.logits,))
    assert_close(squares[0], tsallis[0] / 2)


@given(batches())
def test_maximum_squares_is_the_negative_chi_squared_divergence_from_uniform(
    batch: Batch,
) -> None:
    p = batch.logits.softmax(1)
    classes = p.shape[1]
    uniform = 1 / classes
    chi_squared = ((p - uniform) ** 2 / uniform).sum(1).mean()
    assert_close(MaxSquareLoss()(batch.logits), -(chi_squared + 1) / (2 * classes))


@given(batches())
def test_maximum_squares_lies_between_certainty_and_uniformity(batch: Batch) -> None:
    terms = MaxSquareLoss(reduction="none")(batch.logits)
    rounding = 1e-15
    assert (terms >= -0.5 - rounding).all()
    assert (terms <= -0.5 / batch.logits.shape[1] + rounding).all()


def test_maximum_squares_reaches_its_bounds() -> None:
    certain = torch.tensor([[1e4, 0.0, 0.0, 0.0]], dtype=torch.float64)
    assert MaxSquareLoss()(certain) == -0.5
    assert MaxSquareLoss()(torch.zeros_like(certain)) == -0.125


@given(batches(), st.sampled_from([0.5, 1.0, 1.5, 2.0, 3.0]))
def test_tsallis_entropy_lies_between_certainty_and_uniformity(batch: Batch, q: float) -> None:
    classes = batch.logits.shape[1]
    highest = math.log(classes) if q == 1 else (1 - classes ** (1 - q)) / (q - 1)
    terms = TsallisEntropyLoss(q, reduction="none")(batch.logits)
    assert (terms >= -1e-14).all()
    assert (terms <= highest * (1 + 1e-14)).all()


@given(batches(ranks=(2,)))
def test_tsallis_entropy_falls_as_q_grows(batch: Batch) -> None:
    values = [TsallisEntropyLoss(q)(batch.logits) for q in (0.5, 1, 1.5, 2, 3)]
    assert all(low <= high + 1e-14 for high, low in zip(values, values[1:], strict=False))


@pytest.mark.parametrize("classes", [2, 19, 150])
def test_paper_and_reference_scale_differ_by_the_class_count(classes: int) -> None:
    logits = random_logits((1, classes, 3, 4))
    for plain in (MaxSquareLoss, EntropyLoss, IWEntropyLoss):
        ratio = plain(scale="reference")(logits) / plain(scale="paper")(logits)
        assert ratio.item() == pytest.approx(1 / classes)
    ratio = IWMaxSquareLoss(scale="reference")(logits) / IWMaxSquareLoss()(logits)
    assert ratio.item() == pytest.approx(2 / classes)
    ratio = TsallisEntropyLoss(2, ratio=0.2, scale="reference")(logits) / TsallisEntropyLoss(
        2, ratio=0.2
    )(logits)
    assert ratio.item() == pytest.approx(1 / classes)
