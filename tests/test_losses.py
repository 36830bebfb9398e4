"""LOSSES x promises: what every public loss owes its caller."""

from __future__ import annotations

import math
import re
import warnings
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from support import (
    HALF,
    IMAGE_WISE,
    LAYOUTS,
    LOSSES,
    ONE_HEAD,
    SHAPES_BY_RANK,
    SMOOTH,
    TOLERANCE,
    TWO_HEADS,
    Batch,
    Member,
    accumulation_dtype,
    activate,
    assert_close,
    assert_within_budget,
    batches,
    inputs_of,
    lay_out,
    loss_named,
    map_as_images,
    options,
    oracle,
    random_labels,
    random_logits,
    random_valid,
    resize,
    value_and_gradient,
)
from torch import Tensor, nn

from maxsquare import (
    EntropyLoss,
    IWEntropyLoss,
    IWMaxSquareLoss,
    MaxSquareLoss,
    MultiLevelGuidance,
    MultiLevelLoss,
    PredictionStatistics,
    PseudoLabelLoss,
    TsallisEntropyLoss,
    class_gradient_share,
    functional,
)

each_loss = pytest.mark.parametrize("member", LOSSES, ids=repr)
each_smooth_member = pytest.mark.parametrize("member", SMOOTH, ids=repr)
each_image_wise_member = pytest.mark.parametrize("member", IMAGE_WISE, ids=repr)


# --------------------------------------------------------------------------------------------
# The formula
# --------------------------------------------------------------------------------------------


@each_loss
@given(st.data())
def test_value_and_gradient_equal_float64_autograd_of_the_formula(
    member: Member, data: st.DataObject
) -> None:
    batch = data.draw(batches(largest_size=(9, 9)))
    chosen, call = data.draw(options(member)), batch.call()
    loss = member.make(**chosen)

    def ours(*inputs: Tensor) -> Tensor:
        if not chosen["from_logits"]:
            inputs = tuple(activate(x, chosen["activation"]) for x in inputs)
        return loss(*inputs, **call)

    def formula(*inputs: Tensor) -> Tensor:
        if not chosen["from_logits"]:
            inputs = tuple(activate(x, chosen["activation"]) for x in inputs)
        return oracle(member, inputs, **chosen, **call)

    inputs = batch.inputs(member)
    expected = formula(*inputs)
    upstream = torch.linspace(0.5, 2.0, expected.numel()).view(expected.shape)
    value, gradients = value_and_gradient(ours, inputs, upstream)
    expected, expected_gradients = value_and_gradient(formula, inputs, upstream)
    assert value.shape == expected.shape
    assert_close(value, expected)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        assert_close(gradient, expected_gradient)


@each_image_wise_member
@given(
    batches(),
    st.sampled_from(["mean", "sum", "none"]),
    st.sampled_from(["softmax", "sigmoid"]),
)
def test_counts_from_labels_equal_float64_autograd_of_the_formula(
    member: Member, batch: Batch, reduction: str, activation: str
) -> None:
    chosen = {"reduction": reduction, "activation": activation}
    call = {"valid": batch.valid, "labels": batch.labels}
    inputs = batch.inputs(member)
    value, gradients = value_and_gradient(partial(member.make(**chosen), **call), inputs)
    expected, expected_gradients = value_and_gradient(
        lambda *x: oracle(member, x, **chosen, **call), inputs
    )
    assert_close(value, expected)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        assert_close(gradient, expected_gradient)


@each_loss
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("size", [None, (9, 11)], ids=["as is", "upsampled"])
def test_low_precision_is_no_worse_than_the_plain_formula_in_it(
    member: Member, dtype: torch.dtype, size: tuple[int, int] | None
) -> None:
    inputs = tuple(x.detach() for x in inputs_of(member, (2, 5, 6, 7), dtype=dtype))
    call = {"size": size, "align_corners": True}

    def formula(*x: Tensor) -> Tensor:
        return oracle(member, x, **call)

    exact, exact_gradients = value_and_gradient(formula, tuple(x.double() for x in inputs))
    plain, plain_gradients = value_and_gradient(formula, inputs)
    value, gradients = value_and_gradient(partial(member.make(), **call), inputs)
    assert value.dtype == accumulation_dtype(dtype)
    # Accumulated in float32, so a half-precision input is allowed no half-precision error.
    assert_within_budget(value, exact, exact, value.dtype)
    for gradient, plain_gradient, exact_gradient in zip(
        gradients, plain_gradients, exact_gradients, strict=True
    ):
        assert gradient.dtype == dtype
        assert_within_budget(gradient, plain_gradient, exact_gradient, dtype)


@each_loss
def test_many_classes_and_a_flat_prediction_keep_their_digits_in_float32(member: Member) -> None:
    # 1 - sum p^2 would lose as many digits as sum p^2 has zeros after the point.
    inputs = tuple(
        x.detach() for x in inputs_of(member, (1, 256, 6, 7), dtype=torch.float32, spread=0.3)
    )

    def formula(*x: Tensor) -> Tensor:
        return oracle(member, x, reduction="none")

    exact, exact_gradients = value_and_gradient(formula, tuple(x.double() for x in inputs))
    plain, plain_gradients = value_and_gradient(formula, inputs)
    value, gradients = value_and_gradient(member.make(reduction="none"), inputs)
    assert_within_budget(value, plain, exact, torch.float32)
    for gradient, plain_gradient, exact_gradient in zip(
        gradients, plain_gradients, exact_gradients, strict=True
    ):
        assert_within_budget(gradient, plain_gradient, exact_gradient, torch.float32)


@each_loss
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_half_precision_logits_accumulate_in_float32_over_many_pixels(
    member: Member, dtype: torch.dtype
) -> None:
    # In half precision a running sum of 70,000 terms would stop growing or overflow.
    # Equal heads: the rounded logits of two different ones would tie here and there.
    (logits,) = inputs_of(loss_named("max_square"), (1, 2, 250, 280), dtype=dtype)
    inputs = (logits.detach(),) * member.heads
    value = member.make(reduction="sum")(*inputs)
    exact = oracle(member, tuple(x.double() for x in inputs), reduction="sum")
    assert_close(value, exact, torch.float32)


@each_loss
@pytest.mark.parametrize(
    "shape", [(1, 2, 1, 1), (1, 3), (3, 2, 1), (1, 19, 1, 1, 1), (1, 150, 3, 5), (2, 7, 31, 37)]
)
def test_one_pixel_and_odd_shapes_equal_the_formula(member: Member, shape: tuple[int, ...]) -> None:
    inputs = inputs_of(member, shape)
    value, gradients = value_and_gradient(member.make(), inputs)
    expected, expected_gradients = value_and_gradient(lambda *x: oracle(member, x), inputs)
    assert_close(value, expected)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        assert_close(gradient, expected_gradient)


def test_gradient_of_maximum_squares_with_respect_to_probabilities_is_minus_p() -> None:
    p = random_logits((1, 3, 4, 5)).softmax(1)
    _, (gradient,) = value_and_gradient(MaxSquareLoss(from_logits=False, reduction="sum"), (p,))
    assert_close(gradient, -p)


def test_unnormalised_scores_are_squared_as_they_are_given() -> None:
    scores = torch.tensor([[0.5, 0.25, 0.5]], dtype=torch.float64)
    assert MaxSquareLoss(from_logits=False)(scores).item() == -0.5 * (0.25 + 0.0625 + 0.25)


# --------------------------------------------------------------------------------------------
# Reductions, images, weights
# --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("member", ONE_HEAD, ids=repr)
@pytest.mark.parametrize("rank", SHAPES_BY_RANK)
def test_mean_and_sum_are_taken_from_the_per_pixel_terms(member: Member, rank: int) -> None:
    shape = SHAPES_BY_RANK[rank]
    (logits,) = inputs_of(member, shape)
    terms = member.make(reduction="none")(logits)
    assert terms.shape == (shape[0], *shape[2:])
    assert_close(member.make(reduction="sum")(logits), terms.sum())
    if member.image_wise:
        divisor = shape[0] if rank else 1
    else:
        divisor = terms.numel() if member.smooth else int((terms > 0).sum())
    assert_close(member.make(reduction="mean")(logits), terms.sum() / divisor)


@each_image_wise_member
def test_a_batch_of_images_gives_the_mean_of_single_images(member: Member) -> None:
    # Batch and class counts are equal: weights must not broadcast against the classes.
    inputs = inputs_of(member, (4, 4, 4, 4))
    if member.heads == 1:
        singles = [member.make()(*(x[n : n + 1] for x in inputs)) for n in range(4)]
        assert_close(member.make()(*inputs), torch.stack(singles).mean())
    weights = member.make(reduction="none")(*inputs)
    singles = [member.make(reduction="none")(*(x[n : n + 1] for x in inputs)) for n in range(4)]
    assert_close(weights, torch.cat(singles))


@pytest.mark.parametrize(
    ("image_wise", "plain"),
    [
        (IWMaxSquareLoss(ratio=0), MaxSquareLoss()),
        (IWEntropyLoss(ratio=0), EntropyLoss()),
        (TsallisEntropyLoss(1.5, ratio=0), TsallisEntropyLoss(1.5)),
    ],
)
def test_ratio_0_is_the_plain_loss(image_wise: nn.Module, plain: nn.Module) -> None:
    inputs = (random_logits((3, 5, 4, 6)),)
    value, gradients = value_and_gradient(image_wise, inputs)
    expected, expected_gradients = value_and_gradient(plain, inputs)
    assert_close(value, expected)
    assert_close(gradients[0], expected_gradients[0])


@each_image_wise_member
def test_labels_equal_to_the_prediction_change_nothing(member: Member) -> None:
    inputs = inputs_of(member)
    loss = member.make()
    assert_close(loss(*inputs, labels=inputs[0].argmax(1)), loss(*inputs))


@each_image_wise_member
@pytest.mark.parametrize("outside", [-1, -7, 4, 255])
def test_labels_outside_the_classes_are_not_counted(member: Member, outside: int) -> None:
    inputs = inputs_of(member)
    labels = random_labels(inputs[0].shape)
    assert (labels == -1).any()
    loss = member.make()
    moved = labels.where(labels >= 0, outside)
    assert torch.equal(loss(*inputs, labels=moved), loss(*inputs, labels=labels))


@each_image_wise_member
def test_the_ignored_label_is_not_counted(member: Member) -> None:
    inputs = inputs_of(member)
    labels = random_labels(inputs[0].shape)
    ignoring = member.make(ignore_index=2)(*inputs, labels=labels)
    without = member.make()(*inputs, labels=labels.where(labels != 2, -1))
    assert torch.equal(ignoring, without)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64], ids=str)
def test_labels_of_any_integer_dtype_count_alike(dtype: torch.dtype) -> None:
    logits = random_logits((2, 4, 5, 6))
    labels = random_labels(logits.shape).clamp(min=0)
    loss = IWMaxSquareLoss()
    assert torch.equal(loss(logits, labels=labels.to(dtype)), loss(logits, labels=labels))


def test_the_first_of_equally_likely_classes_is_the_predicted_one() -> None:
    logits = torch.zeros(1, 3, 4, dtype=torch.float64)
    logits[0, 1:, 3] = 1.0
    # Three pixels tie over all classes and count as class 0, one over 1 and 2, counted as 1.
    p_tied = math.e / (1 + 2 * math.e)
    squares = 3 * 3 / 9 / 3 + 2 * p_tied**2 + (1 - 2 * p_tied) ** 2
    value = IWMaxSquareLoss(ratio=1)(logits)
    assert value.item() == pytest.approx(-squares / 2, rel=1e-12)


def test_pseudo_labels_are_accepted_strictly_above_the_threshold() -> None:
    p = torch.tensor([[0.75, 0.25], [0.5, 0.5]], dtype=torch.float64)
    accepted = [
        PseudoLabelLoss(threshold=t, from_logits=False, reduction="none")(p).count_nonzero()
        for t in (0.25, 0.5, 0.75)
    ]
    assert accepted == [2, 1, 0]


def test_each_sigmoid_channel_is_a_two_class_image() -> None:
    logits = random_logits((2, 3, 4, 5))
    channels = logits.flatten(0, 1)
    two_class = torch.stack([channels, torch.zeros_like(channels)], 1)
    for member in ONE_HEAD:
        for reduction in ("mean", "sum"):
            sigmoid = member.make(activation="sigmoid", reduction=reduction)(logits)
            assert_close(sigmoid, member.make(reduction=reduction)(two_class))
        terms = member.make(activation="sigmoid", reduction="none")(logits)
        assert terms.shape == logits.shape
        assert_close(terms.flatten(0, 1), member.make(reduction="none")(two_class))


@each_loss
def test_probabilities_instead_of_logits_give_the_same_value(member: Member) -> None:
    inputs = inputs_of(member)
    probabilities = tuple(x.softmax(1) for x in inputs)
    assert_close(member.make(from_logits=False)(*probabilities), member.make()(*inputs))
    probabilities = tuple(x.sigmoid() for x in inputs)
    assert_close(
        member.make(from_logits=False, activation="sigmoid")(*probabilities),
        member.make(activation="sigmoid")(*inputs),
    )


# --------------------------------------------------------------------------------------------
# Two heads
# --------------------------------------------------------------------------------------------


def test_guidance_gives_no_gradient_to_the_final_head() -> None:
    logits, low_logits = inputs_of(loss_named("guidance"))
    loss = MultiLevelGuidance(threshold=0.6)(logits, low_logits)
    gradient, low_gradient = torch.autograd.grad(loss, (logits, low_logits), allow_unused=True)
    assert gradient is None or not gradient.any()
    assert low_gradient.any()


def test_guidance_of_several_low_heads_is_the_sum_over_them() -> None:
    logits, *low = (random_logits((2, 4, 5, 6), seed=seed) for seed in range(4))
    guidance = MultiLevelGuidance(threshold=0.6)
    assert_close(guidance(logits, low), sum(guidance(logits, x) for x in low))
    assert torch.equal(guidance(logits, tuple(low)), guidance(logits, low))
    target = EntropyLoss()
    both = MultiLevelLoss(target, threshold=0.6, weight=0.3)(logits, low)
    assert_close(both, target(logits) + 0.3 * guidance(logits, low))


@pytest.mark.parametrize("align_corners", [False, True])
def test_heads_of_different_resolution_meet_at_size(align_corners: bool) -> None:
    logits, low_logits = random_logits((2, 4, 5, 6)), random_logits((2, 4, 3, 4), seed=1)
    size = (9, 11)
    full, low_full = (resize(x, size, align_corners) for x in (logits, low_logits))
    loss = MultiLevelLoss(IWMaxSquareLoss(), threshold=0.6)
    value = loss(logits, low_logits, size=size, align_corners=align_corners)
    assert_close(value, loss(full, low_full))


def test_guidance_learns_the_class_of_the_averaged_prediction() -> None:
    p = torch.tensor([[0.9, 0.1, 0.0]], dtype=torch.float64)
    p_low = torch.tensor([[0.2, 0.7, 0.1]], dtype=torch.float64)
    guidance = partial(MultiLevelGuidance, from_logits=False)
    assert guidance(threshold=0.8)(p, p_low).item() == pytest.approx(-math.log(0.2))
    assert guidance(threshold=0.95)(p, p_low).item() == 0
    # The low-level head alone may be the sure one.
    assert guidance(threshold=0.8)(p_low, p).item() == pytest.approx(-math.log(0.9))


def test_multi_level_loss_takes_the_options_of_its_target_loss() -> None:
    logits, low_logits = inputs_of(loss_named("guidance"), (2, 4, 5, 6))
    for reduction in ("mean", "sum", "none"):
        for activation in ("softmax", "sigmoid"):
            chosen = {"reduction": reduction, "activation": activation}
            target = MaxSquareLoss(scale="reference", **chosen)
            guidance = MultiLevelGuidance(threshold=0.8, **chosen)
            both = MultiLevelLoss(target, threshold=0.8, weight=0.5)(logits, low_logits)
            assert_close(both, target(logits) + 0.5 * guidance(logits, low_logits))


# --------------------------------------------------------------------------------------------
# Invariance
# --------------------------------------------------------------------------------------------


@each_loss
@given(batches(), st.randoms(use_true_random=False))
def test_permuting_the_pixels_changes_nothing(member: Member, batch: Batch, random: Any) -> None:
    inputs = tuple(x.flatten(2) if x.dim() > 2 else x.t()[None] for x in batch.inputs(member))
    valid = None if batch.valid is None else map_as_images(batch.valid)
    order = list(range(inputs[0].shape[2]))
    random.shuffle(order)
    loss = member.make()
    permuted = loss(
        *(x[:, :, order] for x in inputs), valid=None if valid is None else valid[:, order]
    )
    assert_close(permuted, loss(*batch.inputs(member), valid=batch.valid))


@each_loss
@given(batches(), st.randoms(use_true_random=False))
def test_permuting_the_classes_changes_nothing(member: Member, batch: Batch, random: Any) -> None:
    order = list(range(batch.logits.shape[1]))
    random.shuffle(order)
    inputs = batch.inputs(member)
    loss = member.make()
    permuted = loss(*(x[:, order] for x in inputs), valid=batch.valid)
    assert_close(permuted, loss(*inputs, valid=batch.valid))


@each_loss
@given(batches())
def test_shifting_all_logits_of_a_pixel_changes_nothing(member: Member, batch: Batch) -> None:
    inputs = batch.inputs(member)
    shift = random_logits((1, 1, *inputs[0].shape[2:]), spread=5.0)
    shift = shift[0] if inputs[0].dim() == 2 else shift
    loss = member.make()
    shifted = loss(*(x + shift for x in inputs), valid=batch.valid)
    torch.testing.assert_close(shifted, loss(*inputs, valid=batch.valid), rtol=1e-11, atol=1e-12)


@each_loss
@given(batches())
def test_the_gradient_sums_to_zero_over_the_classes(member: Member, batch: Batch) -> None:
    _, gradients = value_and_gradient(
        partial(member.make(reduction="sum"), valid=batch.valid), batch.inputs(member)
    )
    for gradient in gradients:
        assert gradient.sum(1).abs().max() <= 1e-13 * max(1.0, gradient.abs().max().item())


@each_loss
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rank", SHAPES_BY_RANK)
def test_the_memory_layout_changes_nothing(member: Member, layout: str, rank: int) -> None:
    inputs = tuple(lay_out(x.detach(), layout) for x in inputs_of(member, SHAPES_BY_RANK[rank]))
    call: dict[str, Any] = {"size": (7, 4)} if rank == 2 else {}
    loss = partial(member.make(), **call)
    value, gradients = value_and_gradient(loss, inputs)
    expected, expected_gradients = value_and_gradient(
        loss, tuple(x.contiguous().clone() for x in inputs)
    )
    assert_close(value, expected)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        assert_close(gradient, expected_gradient)


@each_loss
def test_the_layout_of_the_mask_changes_nothing(member: Member) -> None:
    inputs = inputs_of(member, (2, 4, 5, 6))
    row = torch.tensor([True, False, True, True, False, True])
    loss = member.make()
    dense = row.expand(2, 5, 6).contiguous()
    assert torch.equal(loss(*inputs, valid=row.expand(2, 5, 6)), loss(*inputs, valid=dense))


# --------------------------------------------------------------------------------------------
# size=
# --------------------------------------------------------------------------------------------


@each_loss
@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize(
    "size",
    [(17, 23), (16, 24), (3, 5), (1, 1), (5, 6), (12, 4), (40, 1)],
    ids=["odd up", "even up", "down", "one pixel", "same", "up and down", "one column"],
)
def test_size_is_bilinear_upsampling_and_then_the_loss(
    member: Member, align_corners: bool, size: tuple[int, int]
) -> None:
    inputs = inputs_of(member, (2, 4, 5, 6))
    valid = random_valid((2, *size), share=0.8)
    call = {"size": size, "align_corners": align_corners, "valid": valid}
    value, gradients = value_and_gradient(partial(member.make(), **call), inputs)
    expected, expected_gradients = value_and_gradient(lambda *x: oracle(member, x, **call), inputs)
    assert_close(value, expected)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        assert_close(gradient, expected_gradient)


@each_loss
@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("low_size", [(1, 1), (1, 7), (6, 1)])
def test_size_from_a_single_row_or_column(
    member: Member, align_corners: bool, low_size: tuple[int, int]
) -> None:
    inputs = inputs_of(member, (2, 3, *low_size))
    call = {"size": (5, 9), "align_corners": align_corners}
    value, gradients = value_and_gradient(partial(member.make(), **call), inputs)
    expected, expected_gradients = value_and_gradient(lambda *x: oracle(member, x, **call), inputs)
    assert_close(value, expected)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        assert_close(gradient, expected_gradient)


OTHER_DIMENSIONS = pytest.mark.parametrize(
    ("shape", "size"),
    [((2, 4, 5), (12,)), ((2, 4, 5), 9), ((2, 4, 2, 3, 4), (5, 6, 9)), ((1, 3, 2, 2, 2), 4)],
    ids=["linear", "linear, one int", "trilinear", "trilinear, one int"],
)


@each_loss
@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
@OTHER_DIMENSIONS
def test_size_of_one_and_three_dimensions_is_upsampling_and_then_the_loss(
    member: Member, align_corners: bool, activation: str, shape: tuple[int, ...], size: Any
) -> None:
    inputs = inputs_of(member, shape)
    spatial = (size,) * (len(shape) - 2) if isinstance(size, int) else size
    call = {"align_corners": align_corners, "valid": random_valid((shape[0], *spatial), share=0.8)}
    options = {"activation": activation}
    loss = member.make(**options)
    value, gradients = value_and_gradient(partial(loss, size=size, **call), inputs)
    expected, expected_gradients = value_and_gradient(
        lambda *x: oracle(member, x, size=spatial, **options, **call), inputs
    )
    assert_close(value, expected)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        assert_close(gradient, expected_gradient)
    terms = member.make(**options, reduction="none")(*inputs, size=size, **call)
    assert terms.shape == (shape[0], *([shape[1]] if activation == "sigmoid" else []), *spatial)


@OTHER_DIMENSIONS
def test_size_of_other_dimensions_of_the_functions_alone(shape: tuple[int, ...], size: Any) -> None:
    (logits,) = inputs_of(loss_named("max_square"), shape)
    full = resize(logits, (size,) * (len(shape) - 2) if isinstance(size, int) else size, False)
    labels = random_labels(full.shape)
    ours, expected = (
        value_and_gradient(call, (logits,))
        for call in (
            lambda z: functional.cross_entropy(z, labels, size=size),
            lambda z: F.cross_entropy(resize(z, full.shape[2:], False), labels, ignore_index=-1),
        )
    )
    assert_close(ours[0], expected[0])
    assert_close(ours[1][0], expected[1][0])
    for function in (functional.class_proportions, functional.image_weights):
        assert_close(function(logits, size=size), function(full))
    share = partial(class_gradient_share, MaxSquareLoss(), labels=labels)
    assert_close(share(logits, size=size), share(full))
    statistics = PredictionStatistics(), PredictionStatistics()
    statistics[0].update(logits, size=size)
    statistics[1].update(full)
    for found, wanted in zip(*(s.compute() for s in statistics), strict=True):
        assert_close(found, wanted)


@pytest.mark.parametrize("shape", [(2, 3, 4), (1, 2, 2, 2, 2)], ids=["linear", "trilinear"])
def test_size_of_other_dimensions_has_second_derivatives_and_compiles(
    shape: tuple[int, ...],
) -> None:
    (logits,) = inputs_of(loss_named("iw_max_square"), shape)
    loss = partial(IWMaxSquareLoss(), size=5)
    assert torch.autograd.gradcheck(loss, (logits,))
    assert torch.autograd.gradgradcheck(loss, (logits,))
    compiled = torch.compile(IWMaxSquareLoss(), backend="aot_eager", fullgraph=True)
    assert_close(compiled(logits, size=5), loss(logits))
    masked = logits.detach().clone()
    masked[:, 0] = -torch.inf  # a class that is masked out
    assert loss(masked).isfinite()


@each_image_wise_member
def test_labels_have_the_size_of_the_result(member: Member) -> None:
    inputs = inputs_of(member, (2, 4, 5, 6))
    call = {"size": (9, 11), "align_corners": True}
    labels = random_labels((2, 4, 9, 11))
    full = tuple(resize(x, *call.values()) for x in inputs)
    loss = member.make()
    assert_close(loss(*inputs, labels=labels, **call), loss(*full, labels=labels))


# --------------------------------------------------------------------------------------------
# Nothing valid, and values that are not numbers
# --------------------------------------------------------------------------------------------


@each_loss
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
@pytest.mark.parametrize("size", [None, (7, 8)], ids=["as is", "upsampled"])
def test_nothing_valid_is_zero_with_a_zero_gradient_and_a_graph(
    member: Member, reduction: str, activation: str, size: tuple[int, int] | None
) -> None:
    inputs = inputs_of(member)
    valid = torch.zeros(2, *(size or (5, 6)), dtype=torch.bool)
    loss = member.make(reduction=reduction, activation=activation)(*inputs, size=size, valid=valid)
    assert loss.requires_grad
    assert not loss.any()
    loss.sum().backward()
    assert not inputs[-1].grad.any()


@pytest.mark.parametrize(
    "loss", [PseudoLabelLoss(threshold=1.0), PseudoLabelLoss(threshold=1.0, activation="sigmoid")]
)
def test_no_accepted_pixel_is_zero_with_a_zero_gradient_and_a_graph(loss: nn.Module) -> None:
    (logits,) = inputs_of(loss_named("pseudo_label"))
    value = loss(logits)
    assert value.requires_grad
    assert value.item() == 0
    value.backward()
    assert not logits.grad.any()


@each_image_wise_member
def test_no_counted_label_leaves_every_weight_at_one(member: Member) -> None:
    inputs = inputs_of(member)
    labels = torch.full((2, 5, 6), -1)
    terms = member.make(reduction="none")(*inputs, labels=labels)
    assert torch.isfinite(terms).all()
    assert_close(terms, oracle(member, inputs, reduction="none", labels=labels))


@each_loss
@pytest.mark.parametrize("shape", [(0, 4, 5, 6), (0, 4), (2, 4, 0, 6), (2, 4, 0)])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_an_empty_batch_is_zero_with_an_empty_gradient(
    member: Member, shape: tuple[int, ...], reduction: str
) -> None:
    inputs = inputs_of(member, shape)
    loss = member.make(reduction=reduction)(*inputs)
    assert loss.shape == ((shape[0], *shape[2:]) if reduction == "none" else ())
    assert loss.sum().item() == 0
    loss.sum().backward()
    assert inputs[-1].grad.shape == shape


@each_loss
def test_an_empty_batch_can_be_upsampled(member: Member) -> None:
    inputs = inputs_of(member, (0, 4, 5, 6))
    loss = member.make()(*inputs, size=(9, 11))
    loss.backward()
    assert loss.item() == 0
    assert inputs[-1].grad.shape == (0, 4, 5, 6)


@each_loss
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
@pytest.mark.parametrize("head", [0, -1], ids=["first head", "last head"])
@pytest.mark.parametrize("size", [None, (9, 11)], ids=["as is", "upsampled"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_a_number_is_not_hidden(
    member: Member, activation: str, head: int, size: tuple[int, int] | None, bad: float
) -> None:
    inputs = tuple(x.detach() for x in inputs_of(member))
    inputs[head][1, 2, 3, 3] = bad
    for reduction in ("mean", "sum"):
        loss = member.make(reduction=reduction, activation=activation)
        assert loss(*inputs, size=size).isnan()


@pytest.mark.parametrize("member", ONE_HEAD, ids=repr)
def test_a_pixel_that_is_not_a_number_shows_in_its_own_term(member: Member) -> None:
    (logits,) = inputs_of(member)
    with torch.no_grad():
        logits[1, 2, 3, 4] = math.nan
    terms = member.make(reduction="none")(logits)
    expected = torch.zeros(2, 5, 6, dtype=torch.bool)
    expected[1, 3, 4] = True
    assert terms.isnan()[1, 3, 4]
    if not member.image_wise:
        assert torch.equal(terms.isnan(), expected)


@each_loss
def test_an_invalid_pixel_may_hold_anything(member: Member) -> None:
    inputs = inputs_of(member)
    valid = torch.ones(2, 5, 6, dtype=torch.bool)
    valid[1, 3, 4] = valid[0, 0, 0] = False
    clean, clean_gradients = value_and_gradient(partial(member.make(), valid=valid), inputs)
    with torch.no_grad():
        for x in inputs:
            x[1, :, 3, 4] = math.nan
            x[0, 2, 0, 0] = math.inf
    value, gradients = value_and_gradient(partial(member.make(), valid=valid), inputs)
    assert torch.equal(value, clean)
    for gradient, clean_gradient in zip(gradients, clean_gradients, strict=True):
        assert torch.equal(gradient, clean_gradient)


@each_loss
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_huge_logits_give_finite_values_and_gradients(
    member: Member, dtype: torch.dtype, activation: str
) -> None:
    inputs = tuple(x.detach().sign().mul(1e4).to(dtype) for x in inputs_of(member))
    value, gradients = value_and_gradient(member.make(activation=activation), inputs)
    exact, exact_gradients = value_and_gradient(
        lambda *x: oracle(member, x, activation=activation), tuple(x.double() for x in inputs)
    )
    assert_close(value, exact, value.dtype)
    for gradient, exact_gradient in zip(gradients, exact_gradients, strict=True):
        assert_close(gradient, exact_gradient, dtype)


@each_loss
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_certain_pixels_in_every_dtype_stay_finite(member: Member, activation: str) -> None:
    for dtype in TOLERANCE:
        for spread in (20, 100, 1000, 1e4):
            inputs = tuple(
                x.detach().to(dtype) for x in inputs_of(member, (1, 3, 4, 4), spread=spread)
            )
            value, gradients = value_and_gradient(member.make(activation=activation), inputs)
            assert value.isfinite()
            assert all(gradient.isfinite().all() for gradient in gradients)


@each_loss
def test_masked_classes_count_as_if_they_were_not_there(member: Member) -> None:
    inputs = tuple(x.detach() for x in inputs_of(member, (2, 5, 4, 6)))
    masked = tuple(x.clone() for x in inputs)
    for x in masked:
        x[:, 3] = -math.inf
    kept = [0, 1, 2, 4]
    value, gradients = value_and_gradient(member.make(), masked)
    expected, expected_gradients = value_and_gradient(
        member.make(), tuple(x[:, kept] for x in inputs)
    )
    assert_close(value, expected)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        assert_close(gradient[:, kept], expected_gradient)
        assert not gradient[:, 3].any()


@each_loss
def test_masked_sigmoid_channels_are_certain_of_their_absence(member: Member) -> None:
    inputs = tuple(x.detach() for x in inputs_of(member))
    absent, certain = (tuple(x.clone() for x in inputs) for _ in range(2))
    for x, y in zip(absent, certain, strict=True):
        x[:, 1] = -math.inf
        y[:, 1] = -1e4
    loss = member.make(activation="sigmoid")
    value, gradients = value_and_gradient(loss, absent)
    expected, expected_gradients = value_and_gradient(loss, certain)
    assert_close(value, expected)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        assert_close(gradient, expected_gradient)


@each_smooth_member
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_probabilities_of_exactly_zero_and_one_are_fine(member: Member, activation: str) -> None:
    p = torch.eye(3, dtype=torch.float64)[None]
    value, (gradient,) = value_and_gradient(
        member.make(from_logits=False, activation=activation), (p,)
    )
    certain = value_and_gradient(member.make(activation=activation), (2e4 * p - 1e4,))[0]
    assert_close(value, certain)
    assert not gradient.isnan().any()


# --------------------------------------------------------------------------------------------
# Side effects
# --------------------------------------------------------------------------------------------


@each_loss
@pytest.mark.parametrize("size", [None, (9, 11)], ids=["as is", "upsampled"])
def test_backward_twice_equals_once(member: Member, size: tuple[int, int] | None) -> None:
    inputs = inputs_of(member)
    loss = 0.1 * member.make()(*inputs, size=size)
    gradient = partial(torch.autograd.grad, loss, inputs[-1], retain_graph=True)
    (once,) = gradient()
    kept = once.clone()
    # Gradients are the caller's: an optimiser may write over them.
    once.zero_()
    assert torch.equal(gradient()[0], kept)


@each_loss
@pytest.mark.parametrize("size", [None, (9, 11)], ids=["as is", "upsampled"])
def test_repeats_are_bitwise_equal(member: Member, size: tuple[int, int] | None) -> None:
    inputs = inputs_of(member, (2, 5, 31, 33), dtype=torch.float32)
    first, second = (value_and_gradient(partial(member.make(), size=size), inputs) for _ in "ab")
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(x, y) for x, y in zip(first[1], second[1], strict=True))


@each_loss
@pytest.mark.parametrize("size", [None, (9, 11)], ids=["as is", "upsampled"])
def test_inputs_stay_bitwise_unchanged(member: Member, size: tuple[int, int] | None) -> None:
    inputs = inputs_of(member)
    valid = random_valid((2, *(size or (5, 6))))
    call: dict[str, Any] = {"valid": valid}
    if member.image_wise:
        call["labels"] = random_labels((2, 4, *(size or (5, 6))))
    before = [x.detach().clone() for x in (*inputs, *call.values())]
    member.make()(*inputs, size=size, **call).backward()
    after = [x.detach() for x in (*inputs, *call.values())]
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))


@each_loss
def test_a_result_without_gradient_needs_no_graph(member: Member) -> None:
    inputs = inputs_of(member)
    with torch.no_grad():
        quiet = member.make()(*inputs)
    assert not quiet.requires_grad
    assert_close(quiet, member.make()(*inputs))


@each_loss
def test_the_gradient_scales_with_the_upstream_gradient(member: Member) -> None:
    inputs = inputs_of(member)
    _, once = value_and_gradient(member.make(), inputs)
    _, thrice = value_and_gradient(member.make(), inputs, torch.tensor(3.0))
    assert_close(thrice[-1], 3 * once[-1])


# --------------------------------------------------------------------------------------------
# Options
# --------------------------------------------------------------------------------------------

LOGITS = random_logits((2, 3, 4, 5))
LOW_LOGITS = random_logits((2, 3, 4, 5), seed=1)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        *(
            (member.make(), member.make(**changed))
            for member in LOSSES
            for changed in (
                {"reduction": "sum"},
                {"reduction": "none"},
                {"activation": "sigmoid"},
                *([{"scale": "reference"}] if member.has_scale else []),
            )
        ),
        (IWMaxSquareLoss(ratio=0.2), IWMaxSquareLoss(ratio=0.3)),
        (IWEntropyLoss(ratio=0.2), IWEntropyLoss(ratio=0.3)),
        (TsallisEntropyLoss(1.5), TsallisEntropyLoss(1.6)),
        (TsallisEntropyLoss(1.5), TsallisEntropyLoss(1.5, ratio=0.2)),
        (TsallisEntropyLoss(1.5, ratio=0.2), TsallisEntropyLoss(1.5, ratio=0.3)),
        (PseudoLabelLoss(threshold=0.5), PseudoLabelLoss(threshold=0.8)),
        (MultiLevelGuidance(threshold=0.5), MultiLevelGuidance(threshold=0.8)),
        (
            MultiLevelLoss(MaxSquareLoss(), threshold=0.5),
            MultiLevelLoss(MaxSquareLoss(), threshold=0.8),
        ),
        (
            MultiLevelLoss(MaxSquareLoss(), threshold=0.5, weight=0.1),
            MultiLevelLoss(MaxSquareLoss(), threshold=0.5, weight=0.2),
        ),
        (MultiLevelLoss(MaxSquareLoss()), MultiLevelLoss(EntropyLoss())),
    ],
)
def test_every_constructor_option_changes_the_result(one: nn.Module, other: nn.Module) -> None:
    two_heads = isinstance(one, MultiLevelGuidance | MultiLevelLoss)
    inputs = (LOGITS, LOW_LOGITS) if two_heads else (LOGITS,)
    first, second = one(*inputs), other(*inputs)
    assert first.shape != second.shape or (first - second).abs().max() > 1e-6


@each_loss
@pytest.mark.filterwarnings("ignore:.*what looks like probabilities:UserWarning")
def test_from_logits_changes_the_result(member: Member) -> None:
    inputs = tuple(x.softmax(1) for x in (LOGITS, LOW_LOGITS)[: member.heads])
    difference = member.function(*inputs) - member.function(*inputs, from_logits=False)
    assert difference.abs() > 1e-6


@each_loss
def test_every_call_option_changes_the_result(member: Member) -> None:
    inputs = inputs_of(member)
    loss = member.make()
    results = [loss(*inputs), loss(*inputs, size=(9, 11))]
    results.append(loss(*inputs, size=(9, 11), align_corners=True))
    results.append(loss(*inputs, valid=random_valid((2, 5, 6))))
    if member.image_wise:
        labels = random_labels(inputs[0].shape)
        results.append(loss(*inputs, labels=labels))
        results.append(member.make(ignore_index=2)(*inputs, labels=labels))
    values = [result.item() for result in results]
    distances = [abs(a - b) for i, a in enumerate(values) for b in values[:i]]
    assert min(distances) > 1e-6


def test_the_defaults_are_the_documented_ones() -> None:
    logits, low_logits = random_logits((2, 3, 4, 5), spread=5), random_logits((2, 3, 4, 5), seed=1)
    same = {
        MaxSquareLoss: {"scale": "paper"},
        IWMaxSquareLoss: {"ratio": 0.2, "ignore_index": -1, "scale": "paper"},
        EntropyLoss: {"scale": "paper"},
        IWEntropyLoss: {"ratio": 0.2, "ignore_index": -1, "scale": "paper"},
        partial(TsallisEntropyLoss, 1.5): {"ratio": None, "ignore_index": -1, "scale": "paper"},
        PseudoLabelLoss: {"threshold": 0.95},
    }
    common = {"reduction": "mean", "activation": "softmax", "from_logits": True}
    for make, defaults in same.items():
        assert torch.equal(make()(logits), make(**defaults, **common)(logits))
    guidance = MultiLevelGuidance()(logits, low_logits)
    assert torch.equal(guidance, MultiLevelGuidance(threshold=0.95)(logits, low_logits))
    assert guidance > 0
    both = MultiLevelLoss(MaxSquareLoss())(logits, low_logits)
    assert_close(both, MaxSquareLoss()(logits) + 0.1 * guidance)


@pytest.mark.parametrize("member", TWO_HEADS, ids=repr)
def test_two_headed_losses_take_a_list_of_one(member: Member) -> None:
    logits, low_logits = inputs_of(member)
    assert torch.equal(member.make()(logits, [low_logits]), member.make()(logits, low_logits))


def test_modules_hold_no_state() -> None:
    for member in LOSSES:
        assert not member.make().state_dict()


def test_the_loss_is_that_of_ordinary_torch_code() -> None:
    """Not the oracle: the shortest code that a user would write."""
    logits = LOGITS.float()
    p = logits.softmax(1)
    torch.testing.assert_close(MaxSquareLoss()(logits), -(p**2).sum(1).mean() / 2)
    torch.testing.assert_close(EntropyLoss()(logits), -(p * p.log()).sum(1).mean())
    labels = p.argmax(1).where(p.amax(1) > 0.6, -100)
    torch.testing.assert_close(
        PseudoLabelLoss(threshold=0.6)(logits), F.cross_entropy(logits, labels)
    )


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_frozen_low_level_head_costs_the_final_head_no_second_derivative(reduction: str) -> None:
    logits, low_logits = random_logits((1, 3, 4, 5)).requires_grad_(), random_logits((1, 3, 4, 5))
    guidance = MultiLevelGuidance(0.3, reduction=reduction)(logits, low_logits)
    assert not guidance.requires_grad
    loss = MultiLevelLoss(MaxSquareLoss(reduction=reduction), threshold=0.3)
    first, alone = (
        torch.autograd.grad(value.sum(), logits, create_graph=True)[0]
        for value in (
            loss(logits, low_logits),
            MaxSquareLoss(reduction=reduction)(logits),
        )
    )
    for ours, expected in zip(
        torch.autograd.grad(first.square().sum(), logits),
        torch.autograd.grad(alone.square().sum(), logits),
        strict=True,
    ):
        assert_close(ours, expected)


@pytest.mark.parametrize("size", [None, (7, 9)], ids=["as is", "upsampled"])
@pytest.mark.parametrize("member", LOSSES, ids=repr)
def test_a_batch_of_upstream_gradients_gives_the_gradients_of_each(
    member: Member, size: tuple[int, int] | None
) -> None:
    for reduction in ("mean", "none"):
        heads = [random_logits((2, 3, 4, 5), seed=i).requires_grad_() for i in range(2)]
        heads = heads[: member.heads]
        value = member.make(reduction=reduction)(*heads, size=size)
        upstream = random_logits((3, *value.shape))
        learning = heads[-1:]
        (batched,) = torch.autograd.grad(
            value, learning, upstream, is_grads_batched=True, retain_graph=True
        )
        for one, expected in zip(batched, upstream, strict=True):
            (gradient,) = torch.autograd.grad(value, learning, expected, retain_graph=True)
            assert_close(one, gradient)


def test_hooks_on_the_target_loss_of_a_multi_level_loss_are_called() -> None:
    logits, low_logits = random_logits((1, 3, 4, 5)), random_logits((1, 3, 4, 5), seed=1)
    loss, seen = MultiLevelLoss(IWMaxSquareLoss(), threshold=0.4), []
    expected = loss(logits, low_logits)
    loss.target_loss.register_forward_hook(lambda module, inputs, result: seen.append(result))
    assert_close(loss(logits, low_logits), expected)
    assert len(seen) == 1


def test_a_target_loss_with_a_forward_of_its_own_is_heard_within_the_multi_level_loss() -> None:
    class Doubled(EntropyLoss):
        def forward(self, logits: Tensor, **call: Any) -> Tensor:
            return 2 * super().forward(logits, **call)

    logits, low_logits = random_logits((1, 3, 4, 5)), random_logits((1, 3, 4, 5), seed=1)
    guidance = MultiLevelGuidance()(logits, low_logits, size=(9, 11))
    own = MultiLevelLoss(Doubled())(logits, low_logits, size=(9, 11))
    entropy = EntropyLoss()(logits, size=(9, 11))
    assert_close(own, 2 * entropy + 0.1 * guidance)


# --------------------------------------------------------------------------------------------
# Mistakes that are easy to make
# --------------------------------------------------------------------------------------------

each_activation = pytest.mark.parametrize("activation", ["softmax", "sigmoid"])


def probabilities(activation: str, dtype: torch.dtype = torch.float32) -> Tensor:
    return activate(random_logits((1, 150, 6, 7)), activation).to(dtype)


@each_loss
@each_activation
def test_probabilities_given_as_logits_are_noticed_once(member: Member, activation: str) -> None:
    inputs = (probabilities(activation),) * member.heads
    loss = member.make(activation=activation)
    with pytest.warns(UserWarning, match="what looks like probabilities"):
        loss(*inputs)
    loss(*inputs)


def test_the_notice_points_at_the_call_and_says_how_to_silence_it() -> None:
    loss = MaxSquareLoss()
    with pytest.warns(UserWarning, match="silences this") as noticed:
        loss(probabilities("softmax"))
    assert noticed[0].filename == __file__
    (silence,) = re.findall(r"\((warnings\..*\)) silences", str(noticed[0].message))
    with warnings.catch_warnings():
        exec(silence)
        MaxSquareLoss()(probabilities("softmax"))


@each_activation
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_probabilities_of_half_precision_are_noticed(activation: str, dtype: torch.dtype) -> None:
    with pytest.warns(UserWarning, match="say from_logits=False"):
        MaxSquareLoss(activation=activation)(probabilities(activation, dtype))
    MaxSquareLoss(activation=activation, from_logits=False)(probabilities(activation, dtype))


@each_loss
@each_activation
def test_logits_given_as_probabilities_are_noticed(member: Member, activation: str) -> None:
    loss = member.make(activation=activation, from_logits=False)
    with pytest.warns(UserWarning, match="leave from_logits=True for logits"):
        loss(*[random_logits((1, 4, 5, 6))] * member.heads)


def test_what_is_given_is_looked_at_in_eager_calls_only() -> None:
    p = probabilities("softmax")
    torch.func.grad(MaxSquareLoss())(p)
    torch.compile(MaxSquareLoss(), backend="eager", fullgraph=True)(p)
    torch.func.vmap(MaxSquareLoss())(p.unsqueeze(0))
    MaxSquareLoss()(p.to("meta"))


@each_loss
def test_what_users_of_the_published_code_write_is_explained(member: Member) -> None:
    logits = LOGITS.double()
    loss, heads = member.make(), [logits] * member.heads
    if member.heads == 1:
        with pytest.raises(TypeError, match="positional arguments"):
            loss(logits, logits.softmax(1))
        with pytest.raises(TypeError, match="target"):
            loss(logits, target=logits)
    for wrong, told in (
        ({"out": logits, "aux": logits}, "out, aux"),
        ([logits], "give one head's"),
    ):
        with pytest.raises(TypeError, match=told):
            loss(wrong, *heads[1:])


def test_an_option_that_a_loss_does_not_have_is_named() -> None:
    with pytest.raises(TypeError, match="num_class"):
        MaxSquareLoss(num_class=19)
    with pytest.raises(TypeError, match="scale"):
        PseudoLabelLoss(scale="reference")


def test_maps_of_another_form_are_told_how_to_write_them() -> None:
    logits, mask = random_logits((2, 4, 5, 6)), torch.ones(2, 1, 5, 6)
    with pytest.raises(TypeError, match="write valid != 0"):
        MaxSquareLoss()(logits, valid=mask)
    with pytest.raises(ValueError, match=r"write valid\.squeeze\(1\)"):
        MaxSquareLoss()(logits, valid=mask.bool())
    with pytest.raises(TypeError, match=r"write labels\.long\(\)"):
        IWMaxSquareLoss()(logits, labels=mask[:, 0])
    with pytest.raises(ValueError, match=r"write labels\.squeeze\(1\)"):
        IWMaxSquareLoss()(logits, labels=mask.long())


def test_numbers_of_numpy_are_numbers() -> None:
    logits = random_logits((1, 4, 3, 5))
    size = (np.int64(6), np.int32(7))
    found = PseudoLabelLoss(np.float32(0.5))(logits, size=size, align_corners=np.bool_(True))
    assert torch.equal(found, PseudoLabelLoss(0.5)(logits, size=(6, 7), align_corners=True))


@pytest.mark.parametrize(
    ("shape", "size", "wanted"),
    [
        ((1, 4, 3, 5), (8,), "(height, width)"),
        ((1, 4, 3, 5), (8, 9, 10), "(height, width)"),
        ((1, 4, 3), (8, 9), "(width,)"),
        ((1, 4, 3, 5, 2), (8, 9), "(depth, height, width)"),
    ],
    ids=str,
)
def test_a_wrong_number_of_sizes_is_told_what_to_write(
    shape: tuple[int, ...], size: tuple[int, ...], wanted: str
) -> None:
    logits = random_logits(shape)
    dims = len(shape) - 2
    for call in (MaxSquareLoss(), functional.max_square, PredictionStatistics().update):
        with pytest.raises(ValueError) as caught:
            call(logits, size=size)
        assert f"size must be {wanted}" in str(caught.value)
        assert f"write size=images.shape[-{dims}:]" in str(caught.value)
    with pytest.raises(ValueError, match="write size=None"):
        MaxSquareLoss()(random_logits((5, 4)), size=size)


def test_a_single_channel_counts_its_foreground_from_label_1() -> None:
    logits, labels = random_logits((2, 1, 5, 6)), torch.zeros(2, 5, 6, dtype=torch.long)
    labels[:, 0] = 1
    found = functional.image_weights(logits, ratio=1.0, labels=labels, activation="sigmoid")
    on, off = 1 / 6, 1 / 24
    assert_close(found, off + (on - off) * (logits >= 0).double())


def test_a_tensor_that_carries_more_is_computed_as_any_other() -> None:
    class Tagged(Tensor):
        """As an image library's tensor with metadata."""

    logits = random_logits((2, 4, 5, 6))
    tagged = logits.clone().as_subclass(Tagged).requires_grad_()
    loss = MaxSquareLoss()(
        tagged, size=(9, 11), valid=torch.ones(2, 9, 11).bool().as_subclass(Tagged)
    )
    assert type(loss) is Tensor
    loss.backward()
    value, (gradient,) = value_and_gradient(lambda z: MaxSquareLoss()(z, size=(9, 11)), (logits,))
    assert torch.equal(loss.detach(), value)
    assert torch.equal(torch.as_tensor(tagged.grad).as_subclass(Tensor), gradient)
