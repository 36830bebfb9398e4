"""What a loss does to a model: its slope over confidence, its gradient over classes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import (
    ONE_HEAD,
    SMOOTH,
    Batch,
    Member,
    assert_close,
    batches,
    loss_named,
    oracle,
    random_labels,
    random_logits,
    resize,
)
from torch import Tensor, nn

from maxsquare import (
    EntropyLoss,
    IWMaxSquareLoss,
    MaxSquareLoss,
    MultiLevelGuidance,
    PseudoLabelLoss,
    TsallisEntropyLoss,
    class_gradient_share,
    gradient_profile,
)

P = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)


# --------------------------------------------------------------------------------------------
# gradient_profile
# --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [2, 3, 19])
@pytest.mark.parametrize("member", SMOOTH, ids=repr)
def test_the_profile_is_the_formula_over_confidence(member: Member, classes: int) -> None:
    profile = gradient_profile(member.make(), points=P, classes=classes)
    p = P.clone().requires_grad_()
    rest = (1 - p) / (classes - 1)
    # One image for each point, so that every weight is 1.
    z = torch.stack([p.log(), *[rest.log()] * (classes - 1)], 1).unsqueeze(2)
    value = oracle(member, (z,), reduction="none").flatten()
    slope_p, slope_z = torch.autograd.grad(value.sum(), (p, z))
    assert torch.equal(profile.p, P)
    assert_close(profile.value, value.detach())
    assert_close(profile.slope_p, slope_p)
    assert_close(profile.slope_logit, slope_z[:, 0, 0])


def test_slope_with_respect_to_the_logit_is_that_of_p_by_the_chain_rule() -> None:
    for member in SMOOTH:
        profile = gradient_profile(member.make(), points=P, classes=5)
        assert_close(profile.slope_logit, P * (1 - P) * profile.slope_p)


def test_the_slope_of_maximum_squares_grows_linearly_with_p() -> None:
    slope = gradient_profile(MaxSquareLoss(), points=P).slope_p
    assert_close(slope, 1 - 2 * P)
    assert slope.diff().diff().abs().max() < 1e-12


def test_the_slope_of_the_entropy_diverges_where_p_is_certain() -> None:
    gaps = torch.tensor([1e-1, 1e-3, 1e-6, 1e-9], dtype=torch.float64)
    entropy = gradient_profile(EntropyLoss(), points=1 - gaps).slope_p
    p = 1 - gaps
    assert_close(entropy, ((1 - p) / p).log())
    squares = gradient_profile(MaxSquareLoss(), points=1 - gaps).slope_p
    assert (squares.abs() <= 1).all()
    assert ((entropy / squares).diff() > 1).all()


@pytest.mark.parametrize("q", [1.5, 2.0, 3.0])
def test_the_slope_of_tsallis_entropies_above_1_is_bounded(q: float) -> None:
    slope = gradient_profile(TsallisEntropyLoss(q), points=P).slope_p
    assert slope.abs().max() <= q / (q - 1)


def test_points_may_be_a_number_or_values() -> None:
    profile = gradient_profile(MaxSquareLoss(), points=9)
    assert_close(profile.p, torch.arange(1, 10, dtype=torch.float64) / 10)
    values = gradient_profile(MaxSquareLoss(), points=profile.p.tolist())
    for one, other in zip(profile, values, strict=True):
        assert_close(one, other)
    assert profile._fields == ("p", "value", "slope_p", "slope_logit")
    default = gradient_profile(MaxSquareLoss())
    assert 0 < default.p.min() and default.p.max() < 1
    assert (default.p.diff() > 0).all()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_the_profile_does_not_depend_on_the_reduction(reduction: str) -> None:
    loss = IWMaxSquareLoss(ratio=0.7, reduction=reduction)
    expected = gradient_profile(MaxSquareLoss(), points=P)
    for one, other in zip(gradient_profile(loss, points=P), expected, strict=True):
        assert_close(one, other)
    assert loss.reduction == reduction


def test_the_profile_carries_the_scale() -> None:
    paper = gradient_profile(EntropyLoss(), points=P, classes=4)
    published = gradient_profile(EntropyLoss(scale="reference"), points=P, classes=4)
    assert_close(published.value, paper.value / 4)
    assert_close(published.slope_p, paper.slope_p / 4)


def test_the_profile_of_a_sigmoid_channel_is_that_of_two_classes() -> None:
    sigmoid = gradient_profile(EntropyLoss(activation="sigmoid"), points=P)
    softmax = gradient_profile(EntropyLoss(), points=P)
    for one, other in zip(sigmoid, softmax, strict=True):
        assert_close(one, other)


def test_the_profile_of_pseudo_labels_jumps_at_the_threshold() -> None:
    profile = gradient_profile(PseudoLabelLoss(threshold=0.8), points=P)
    accepted = torch.maximum(P, 1 - P) > 0.8
    likely = torch.maximum(P, 1 - P)
    assert_close(profile.value, torch.where(accepted, -likely.log(), 0))
    assert not profile.slope_p[~accepted].any()


def test_the_profile_is_detached_and_works_without_gradients() -> None:
    with torch.no_grad():
        profile = gradient_profile(MaxSquareLoss(), points=P)
    assert not any(x.requires_grad for x in profile)
    assert_close(profile.slope_p, 1 - 2 * P)


@pytest.mark.parametrize(
    ("argument", "call", "error"),
    [
        ("loss", {"loss": "entropy"}, TypeError),
        ("loss", {"loss": nn.CrossEntropyLoss()}, TypeError),
        ("loss", {"loss": MultiLevelGuidance()}, TypeError),
        ("points", {"points": 0}, ValueError),
        ("points", {"points": [0.5, 1.5]}, ValueError),
        ("points", {"points": torch.tensor([0.0, 0.5])}, ValueError),
        ("points", {"points": [0.5, math.nan]}, ValueError),
        ("points", {"points": 0.5}, TypeError),
        ("points", {"points": "many"}, TypeError),
        ("points", {"points": ["a"]}, TypeError),
        ("points", {"points": [[0.5], [0.1, 0.2]]}, TypeError),
        ("points", {"points": torch.tensor([0.5j])}, TypeError),
        ("points", {"points": ()}, ValueError),
        ("points", {"points": torch.full((2, 2), 0.5)}, ValueError),
        ("classes", {"classes": 1}, ValueError),
        ("classes", {"classes": 2.0}, TypeError),
    ],
)
def test_a_bad_argument_of_the_profile_is_told(
    argument: str, call: dict[str, Any], error: type[Exception]
) -> None:
    with pytest.raises(error, match=argument):
        gradient_profile(**{"loss": MaxSquareLoss(), **call})


# --------------------------------------------------------------------------------------------
# class_gradient_share
# --------------------------------------------------------------------------------------------


def shares_of(member: Member, logits: Tensor, labels: Tensor, valid: Tensor | None) -> Tensor:
    z = logits.detach().clone().requires_grad_()
    (gradient,) = torch.autograd.grad(oracle(member, (z,), valid=valid), z)
    strength = gradient.abs().sum(1)
    shares = torch.stack([strength[labels == k].sum() for k in range(logits.shape[1])])
    return shares / shares.sum() if shares.sum() > 0 else shares


@pytest.mark.parametrize("member", ONE_HEAD, ids=repr)
@given(batches())
def test_shares_are_the_gradient_that_each_class_receives(member: Member, batch: Batch) -> None:
    # The low head's logits: nowhere so certain that the shares of all classes are rounding.
    logits = batch.low_logits
    shares = class_gradient_share(member.make(), logits, batch.labels, valid=batch.valid)
    expected = shares_of(member, logits, batch.labels, batch.valid)
    assert shares.shape == (logits.shape[1],)
    assert_close(shares, expected)
    assert expected.sum() == 0 or shares.sum().item() == pytest.approx(1)


@given(batches(), st.sampled_from(["sum", "none"]))
def test_shares_depend_on_neither_scale_nor_reduction(batch: Batch, reduction: str) -> None:
    shares = class_gradient_share(MaxSquareLoss(), batch.logits, batch.labels)
    loss = MaxSquareLoss(scale="reference", reduction=reduction)
    assert_close(class_gradient_share(loss, batch.logits, batch.labels), shares)


@pytest.mark.parametrize("align_corners", [False, True])
def test_shares_are_taken_at_the_size_of_the_result(align_corners: bool) -> None:
    logits, labels = random_logits((2, 4, 5, 6)), random_labels((2, 4, 9, 11))
    call = {"size": (9, 11), "align_corners": align_corners}
    shares = class_gradient_share(IWMaxSquareLoss(), logits, labels, **call)
    expected = class_gradient_share(IWMaxSquareLoss(), resize(logits, **call), labels)
    assert_close(shares, expected)


def test_a_rare_class_gets_a_larger_share_under_image_wise_weights() -> None:
    logits = torch.zeros(1, 2, 10, 10, dtype=torch.float64)
    logits[:, 0] = 1.5
    logits[:, :, 0, :2] = torch.tensor([0.0, 1.5], dtype=torch.float64)[:, None]
    labels = logits.argmax(1)
    plain = class_gradient_share(MaxSquareLoss(), logits, labels)
    balanced = class_gradient_share(IWMaxSquareLoss(ratio=1), logits, labels)
    assert_close(plain, torch.tensor([0.98, 0.02], dtype=torch.float64))
    assert_close(balanced, torch.tensor([0.5, 0.5], dtype=torch.float64))


def test_shares_leave_the_model_alone() -> None:
    logits = random_logits((2, 4, 5, 6)).requires_grad_()
    before = logits.detach().clone()
    with torch.no_grad():
        shares = class_gradient_share(EntropyLoss(), logits, random_labels((2, 4, 5, 6)))
    assert shares.sum().item() == pytest.approx(1)
    assert not shares.requires_grad
    assert logits.grad is None
    assert logits.requires_grad
    assert torch.equal(logits, before)


def test_shares_without_any_gradient_are_zero() -> None:
    logits, labels = random_logits((2, 4, 5, 6)), random_labels((2, 4, 5, 6))
    nothing = torch.zeros(2, 5, 6, dtype=torch.bool)
    for member in ONE_HEAD:
        shares = class_gradient_share(member.make(), logits, labels, valid=nothing)
        assert not shares.any()
    assert not class_gradient_share(EntropyLoss(), logits, torch.full_like(labels, -1)).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_shares_of_lower_precision(dtype: torch.dtype) -> None:
    logits, labels = random_logits((2, 4, 15, 16)).to(dtype), random_labels((2, 4, 15, 16))
    shares = class_gradient_share(EntropyLoss(), logits, labels)
    expected = shares_of(loss_named("entropy"), logits.double(), labels, None)
    assert shares.dtype == torch.float32
    assert_close(shares, expected, torch.float32)


def test_shares_of_many_half_precision_pixels_do_not_underflow() -> None:
    # The mean over 2^18 pixels leaves float16 few digits of most gradients, and none of some.
    logits, labels = random_logits((1, 5, 512, 512)).half(), random_labels((1, 5, 512, 512))
    shares = class_gradient_share(MaxSquareLoss(), logits, labels)
    expected = class_gradient_share(MaxSquareLoss(), logits.double(), labels)
    assert_close(shares, expected, torch.float32)


def test_shares_at_a_larger_size_know_masked_classes() -> None:
    logits, labels = random_logits((1, 4, 5, 6)), random_labels((1, 4, 9, 11))
    logits[:, 3] = -torch.inf
    shares = class_gradient_share(EntropyLoss(), logits, labels, size=(9, 11))
    logits[:, 3] = -1e9
    assert_close(shares, class_gradient_share(EntropyLoss(), logits, labels, size=(9, 11)))


@pytest.mark.parametrize(
    ("argument", "call", "error"),
    [
        ("loss", {"loss": "entropy"}, TypeError),
        ("loss", {"loss": MultiLevelGuidance()}, TypeError),
        ("logits", {"logits": [1.0]}, TypeError),
        ("logits", {"logits": torch.zeros(2, 4, 5, 6).long()}, TypeError),
        ("logits", {"logits": torch.zeros(4)}, ValueError),
        ("labels", {"labels": torch.zeros(2, 5, 6)}, TypeError),
        ("labels", {"labels": torch.zeros(2, 5, 5).long()}, ValueError),
        ("labels", {"labels": None}, TypeError),
        ("size", {"size": (0, 3)}, ValueError),
        ("align_corners", {"align_corners": "yes", "size": (5, 6)}, TypeError),
        ("align_corners", {"align_corners": "yes"}, TypeError),
        ("valid", {"valid": torch.zeros(2, 5, 6)}, TypeError),
        ("valid", {"valid": torch.zeros(2, 5, 5).bool()}, ValueError),
    ],
)
def test_a_bad_argument_of_the_shares_is_told(
    argument: str, call: dict[str, Any], error: type[Exception]
) -> None:
    good: dict[str, Any] = {
        "loss": MaxSquareLoss(),
        "logits": torch.zeros(2, 4, 5, 6),
        "labels": torch.zeros(2, 5, 6).long(),
    }
    with pytest.raises(error, match=argument):
        class_gradient_share(**{**good, **call})
