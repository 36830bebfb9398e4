"""The functional twins, the maps they share with the losses, and every promised error."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
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
    LAYOUTS,
    LOSSES,
    TOLERANCE,
    Batch,
    Member,
    as_images,
    assert_close,
    assert_within_budget,
    batches,
    class_counts,
    first_largest,
    guidance_labels_of,
    image_weight,
    inputs_of,
    lay_out,
    loss_named,
    map_as_images,
    options,
    random_labels,
    random_logits,
    resize,
    value_and_gradient,
)
from torch import Tensor

import maxsquare
from maxsquare import (
    EntropyLoss,
    IWEntropyLoss,
    IWMaxSquareLoss,
    MaxSquareLoss,
    MultiLevelGuidance,
    MultiLevelLoss,
    PseudoLabelLoss,
    TsallisEntropyLoss,
    functional,
)

# --------------------------------------------------------------------------------------------
# Twins
# --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("member", LOSSES, ids=repr)
@given(st.data())
def test_module_and_function_are_twins(member: Member, data: st.DataObject) -> None:
    batch = data.draw(batches())
    chosen = data.draw(options(member))
    call: dict[str, Any] = {"valid": batch.valid}
    if member.image_wise:
        call["labels"] = batch.labels
        chosen["ignore_index"] = 0
    inputs = batch.inputs(member)
    if not chosen["from_logits"]:
        inputs = tuple(x.softmax(1) for x in inputs)
    value = member.function(*inputs, **chosen, **call)
    assert torch.equal(value, member.make(**chosen)(*inputs, **call))


@pytest.mark.parametrize("member", LOSSES, ids=repr)
@pytest.mark.parametrize("align_corners", [False, True])
def test_module_and_function_upsample_alike(member: Member, align_corners: bool) -> None:
    inputs = inputs_of(member)
    call = {"size": (9, 11), "align_corners": align_corners}
    assert torch.equal(member.function(*inputs, **call), member.make()(*inputs, **call))


# --------------------------------------------------------------------------------------------
# image_weights
# --------------------------------------------------------------------------------------------


def expected_weights(batch: Batch, ratio: float, labels: Tensor | None) -> Tensor:
    logits = as_images(batch.logits)
    predicted = first_largest(logits)
    counted_as = predicted if labels is None else map_as_images(labels)
    valid = torch.ones_like(predicted, dtype=torch.bool)
    if batch.valid is not None:
        valid = map_as_images(batch.valid)
    weights = [
        image_weight(class_counts(counted_as[n], valid[n], logits.shape[1]).double(), ratio)
        for n in range(len(logits))
    ]
    looked_up = torch.stack([w[y] for w, y in zip(weights, predicted, strict=True)])
    return looked_up.where(valid, 0).reshape(batch.labels.shape)


@given(batches(), st.sampled_from([0.0, 0.2, 0.7, 1.0]), st.booleans())
def test_image_weights_follow_the_class_counts(
    batch: Batch, ratio: float, from_labels: bool
) -> None:
    labels = batch.labels if from_labels else None
    weights = functional.image_weights(batch.logits, ratio=ratio, valid=batch.valid, labels=labels)
    assert weights.shape == batch.labels.shape
    expected = expected_weights(batch, ratio, labels)
    counted = torch.ones_like(expected) if batch.valid is None else batch.valid
    assert_close(weights * counted, expected)


@given(batches(), st.sampled_from([0.0, 0.2, 1.0]))
def test_image_wise_terms_are_the_plain_terms_times_the_image_weights(
    batch: Batch, ratio: float
) -> None:
    weights = functional.image_weights(batch.logits, ratio=ratio, valid=batch.valid)
    call = {"valid": batch.valid, "reduction": "none"}
    plain = functional.max_square(batch.logits, **call)
    assert_close(functional.max_square(batch.logits, ratio=ratio, **call), weights * plain)


def test_image_weights_of_an_image_have_the_same_bits_in_every_place_of_a_batch() -> None:
    logits = random_logits((38, 3, 9)).float()
    together = functional.image_weights(logits, ratio=0.7)
    alone = [functional.image_weights(one, ratio=0.7) for one in logits.split(1)]
    assert torch.equal(together, torch.cat(alone))


def test_image_weights_are_constants_for_the_gradient() -> None:
    logits = random_logits((2, 4, 5, 6)).requires_grad_()
    assert not functional.image_weights(logits).requires_grad


def test_image_weights_of_one_class_over_a_whole_image() -> None:
    logits = torch.zeros(1, 3, 4, 5)
    for ratio in (0.0, 0.2, 1.0):
        torch.testing.assert_close(
            functional.image_weights(logits, ratio=ratio), torch.full((1, 4, 5), 1 / 20)
        )


def test_image_weights_are_taken_at_the_size_of_the_result() -> None:
    logits = random_logits((2, 4, 5, 6))
    weights = functional.image_weights(logits, size=(9, 11), align_corners=True)
    assert_close(weights, functional.image_weights(resize(logits, (9, 11), True)))
    assert weights.shape == (2, 9, 11)


# --------------------------------------------------------------------------------------------
# guidance_labels
# --------------------------------------------------------------------------------------------


@given(batches(), st.sampled_from([0.0, 0.5, 0.95]))
def test_guidance_labels_are_the_sure_part_of_the_averaged_prediction(
    batch: Batch, threshold: float
) -> None:
    labels = functional.guidance_labels(
        batch.logits, batch.low_logits, threshold=threshold, valid=batch.valid
    )
    valid = torch.ones_like(batch.labels) == 1 if batch.valid is None else batch.valid
    expected = guidance_labels_of(
        as_images(batch.logits), as_images(batch.low_logits), map_as_images(valid), threshold, True
    )
    assert labels.dtype == torch.int64
    assert torch.equal(labels, expected.reshape(batch.labels.shape))


@pytest.mark.parametrize("ignore_index", [-1, -100, 255])
def test_guidance_labels_mark_the_rest_with_the_ignored_index(ignore_index: int) -> None:
    heads = inputs_of(loss_named("guidance"))
    marked = functional.guidance_labels(*heads, threshold=0.8, ignore_index=ignore_index)
    default = functional.guidance_labels(*heads, threshold=0.8)
    assert (default == -1).any()
    assert torch.equal(marked, default.where(default >= 0, ignore_index))


def test_guidance_labels_are_those_of_the_guidance_loss() -> None:
    logits, low_logits = inputs_of(loss_named("guidance"))
    call = {"size": (9, 11), "align_corners": True}
    labels = functional.guidance_labels(logits, low_logits, threshold=0.8, **call)
    expected = F.cross_entropy(resize(low_logits, **call), labels, ignore_index=-1)
    assert_close(functional.guidance_loss(logits, low_logits, threshold=0.8, **call), expected)


# --------------------------------------------------------------------------------------------
# cross_entropy
# --------------------------------------------------------------------------------------------


@given(
    batches(),
    st.sampled_from(["mean", "sum", "none"]),
    st.sampled_from([-1, 0, 255]),
    st.booleans(),
)
def test_cross_entropy_equals_that_of_torch(
    batch: Batch, reduction: str, ignore_index: int, weighted: bool
) -> None:
    """With weights of classes too, one of them 0: the mean divides by the weights of the pixels."""
    labels, classes = batch.labels, batch.logits.shape[1]
    kept = (labels >= 0) & (labels != ignore_index)
    if batch.valid is not None:
        kept = kept & batch.valid
    weight = torch.linspace(0, 2, classes, dtype=batch.logits.dtype) if weighted else None
    upstream = torch.linspace(0.5, 2, labels.numel()).view_as(labels)
    upstream = upstream if reduction == "none" else torch.tensor(2.0)
    value, (gradient,) = value_and_gradient(
        lambda z: functional.cross_entropy(
            *(z, labels),
            valid=batch.valid,
            weight=weight,
            ignore_index=ignore_index,
            reduction=reduction,
        ),
        (batch.logits,),
        upstream,
    )
    if reduction == "mean" and not (kept if weight is None else weight[labels[kept].long()]).any():
        assert value == 0
        assert not gradient.any()
        return
    reference = labels.where(kept, -100).long()
    expected, (expected_gradient,) = value_and_gradient(
        lambda z: F.cross_entropy(z, reference, weight, reduction=reduction),
        (batch.logits,),
        upstream,
    )
    assert_close(value, expected)
    assert_close(gradient, expected_gradient)


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("size", [(17, 23), (3, 5), (1, 1), (5, 6)])
def test_cross_entropy_at_size_is_upsampling_and_then_cross_entropy(
    align_corners: bool, size: tuple[int, int]
) -> None:
    inputs = (random_logits((2, 4, 5, 6)),)
    labels = random_labels((2, 4, *size))
    call = {"size": size, "align_corners": align_corners}
    value, gradients = value_and_gradient(
        lambda z: functional.cross_entropy(z, labels, **call), inputs
    )
    expected, expected_gradients = value_and_gradient(
        lambda z: F.cross_entropy(resize(z, **call), labels, ignore_index=-1), inputs
    )
    assert_close(value, expected)
    assert_close(gradients[0], expected_gradients[0])


def test_cross_entropy_with_weights_upsamples_compiles_and_differentiates_twice() -> None:
    inputs, labels = (random_logits((2, 4, 5, 6)).double(),), random_labels((2, 4, 17, 23))
    weight = torch.tensor([0.5, 1, 2, 0], dtype=torch.float64)

    def loss(z: Tensor) -> Tensor:
        return functional.cross_entropy(z, labels, size=(17, 23), weight=weight)

    expected, expected_gradients = value_and_gradient(
        lambda z: F.cross_entropy(resize(z, (17, 23), False), labels, weight, ignore_index=-1),
        inputs,
    )
    compiled = torch.compile(loss, backend="eager", fullgraph=True)
    for call in (loss, compiled):
        value, gradients = value_and_gradient(call, inputs)
        assert_close(value, expected)
        assert_close(gradients[0], expected_gradients[0])
    assert torch.autograd.gradgradcheck(loss, (inputs[0].requires_grad_(),))


@pytest.mark.parametrize(
    ("weight", "error", "said"),
    [
        ([1.0, 1, 1, 1], TypeError, "weight must be a tensor, not list"),
        (torch.ones(4, dtype=torch.int64), TypeError, "floating point, not torch.int64"),
        (torch.ones(3), ValueError, r"\(4,\), not \(3,\)"),
        (torch.ones(4, 1), ValueError, r"\(4,\), not \(4, 1\)"),
        (torch.ones(4, device="meta"), ValueError, "on cpu like logits, not on meta"),
    ],
)
def test_cross_entropy_names_a_weight_that_is_none(weight: Any, error: Any, said: str) -> None:
    logits, labels = random_logits((2, 4, 5, 6)), random_labels((2, 4, 5, 6))
    with pytest.raises(error, match=said):
        functional.cross_entropy(logits, labels, weight=weight)
    with pytest.raises(ValueError, match="weight must be None with activation='sigmoid'"):
        functional.cross_entropy(logits, labels, weight=torch.ones(4), activation="sigmoid")


@pytest.mark.parametrize("outside", [-2, 4, 255])
def test_cross_entropy_names_a_label_that_is_no_class(outside: int) -> None:
    logits, labels = random_logits((2, 4, 5, 6)), random_labels((2, 4, 5, 6))
    labels[1, 2, 3] = outside
    for reduction in ("mean", "sum", "none"):
        with pytest.raises(ValueError, match=rf"not {outside}: .* ignore_index"):
            functional.cross_entropy(logits, labels, reduction=reduction)
    assert not functional.cross_entropy(logits, labels, ignore_index=outside).isnan()
    valid = torch.ones_like(labels, dtype=torch.bool)
    valid[1, 2, 3] = False
    assert not functional.cross_entropy(logits, labels, valid=valid).isnan()


def test_cross_entropy_is_not_a_number_where_it_cannot_look_at_labels() -> None:
    logits, labels = random_logits((2, 4, 5, 6)), random_labels((2, 4, 5, 6))
    labels[1, 2, 3] = 4
    (gradient, value) = torch.func.grad_and_value(functional.cross_entropy)(logits, labels)
    assert value.isnan() and gradient[1, :, 2, 3].isnan().all()
    compiled = torch.compile(functional.cross_entropy, backend="eager", fullgraph=True)
    assert compiled(logits, labels).isnan()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [None, (9, 11)], ids=["as is", "upsampled"])
def test_cross_entropy_of_sigmoids_equals_that_of_torch(
    channels: int, size: tuple[int, int] | None
) -> None:
    logits = random_logits((2, channels, 5, 6))
    labels = random_labels((2, max(channels, 2), *(size or (5, 6)))).clamp(min=0)

    def ours(z: Tensor) -> Tensor:
        return functional.cross_entropy(z, labels, size=size, activation="sigmoid")

    def theirs(z: Tensor) -> Tensor:
        z = z if size is None else F.interpolate(z, size, mode="bilinear")
        target = F.one_hot(labels, channels).movedim(-1, 1) if channels > 1 else labels[:, None]
        return F.binary_cross_entropy_with_logits(z, target.to(z.dtype))

    value, (gradient,) = value_and_gradient(ours, (logits,))
    expected, (slope,) = value_and_gradient(theirs, (logits,))
    assert_close(value, expected)
    assert_close(gradient, slope)


def test_cross_entropy_does_not_hide_what_is_not_a_number() -> None:
    logits, labels = random_logits((2, 4, 5, 6)), random_labels((2, 4, 5, 6)).clamp(min=0)
    for bad in (math.nan, math.inf):
        broken = logits.clone()
        broken[1, 2, 3, 3] = bad
        assert functional.cross_entropy(broken, labels).isnan()
        assert functional.cross_entropy(broken, labels, size=(5, 6)).isnan()


def test_a_pixel_that_is_not_a_number_leaves_the_terms_of_others_alone() -> None:
    # The probability of the other pixel's label is 0, its logarithm is not.
    logits = torch.tensor([[[0.0, math.nan], [1e4, 0.0]]])
    terms = functional.cross_entropy(logits, torch.zeros(1, 2).long(), reduction="none")
    assert terms[0, 0].item() == 1e4
    assert terms[0, 1].isnan()


def test_a_masked_class_has_no_gradient_even_as_a_label() -> None:
    logits = random_logits((1, 3, 2, 3)).requires_grad_()
    with torch.no_grad():
        logits[:, 1, :, 2] = -math.inf
    labels = torch.ones(1, 5, 7).long()
    loss = partial(functional.cross_entropy, labels=labels, size=(5, 7))
    (gradient,) = torch.autograd.grad(loss(logits), logits)
    assert not gradient[:, 1, :, 2].any()
    assert_close(gradient, torch.func.grad(loss)(logits))


def test_cross_entropy_of_huge_and_of_masked_logits() -> None:
    logits = random_logits((2, 4, 5, 6)).sign() * 1e4
    labels = random_labels(logits.shape).clamp(min=0)
    assert_close(functional.cross_entropy(logits, labels), F.cross_entropy(logits, labels))
    masked = random_logits((2, 4, 5, 6))
    masked[:, 3] = -math.inf
    labels = labels.clamp(max=2)
    value, (gradient,) = value_and_gradient(
        lambda z: functional.cross_entropy(z, labels), (masked,)
    )
    assert_close(value, F.cross_entropy(masked[:, :3], labels))
    assert gradient.isfinite().all()
    assert not gradient[:, 3].any()


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_cross_entropy_in_low_precision_and_any_layout(dtype: torch.dtype, layout: str) -> None:
    logits = lay_out(random_logits((2, 4, 5, 6)).to(dtype), layout)
    labels = random_labels((2, 4, 5, 6))
    plain = [
        value_and_gradient(lambda z: F.cross_entropy(z, labels, ignore_index=-1), (logits.to(t),))
        for t in (dtype, torch.float64)
    ]
    value, (gradient,) = value_and_gradient(
        lambda z: functional.cross_entropy(z, labels), (logits,)
    )
    assert value.dtype == torch.float32
    assert gradient.dtype == dtype
    assert_close(value, plain[1][0], torch.float32)
    assert_within_budget(gradient, plain[0][1][0], plain[1][1][0], dtype)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_class_255_of_narrow_labels_is_not_the_ignored_minus_1(reduction: str) -> None:
    logits = random_logits((1, 256, 3, 4))
    labels = torch.full((1, 3, 4), 255, dtype=torch.uint8)
    ours, expected = (
        value_and_gradient(lambda z, f=f: f(z), (logits,))
        for f in (
            lambda z: functional.cross_entropy(z, labels, ignore_index=-1, reduction=reduction),
            lambda z: F.cross_entropy(z, labels.long(), reduction=reduction),
        )
    )
    assert_close(ours[0], expected[0])
    assert_close(ours[1][0], expected[1][0])


def test_cross_entropy_backward_twice_equals_once() -> None:
    logits = random_logits((2, 4, 5, 6)).requires_grad_()
    loss = functional.cross_entropy(logits, random_labels((2, 4, 9, 11)), size=(9, 11))
    once, twice = (torch.autograd.grad(loss, logits, retain_graph=True)[0] for _ in "ab")
    assert torch.equal(once, twice)


@pytest.mark.parametrize("shape", [(0, 4, 5, 6), (2, 4, 0, 6)])
def test_cross_entropy_of_an_empty_batch_is_zero(shape: tuple[int, ...]) -> None:
    logits = random_logits(shape).requires_grad_()
    loss = functional.cross_entropy(logits, random_labels(shape))
    loss.backward()
    assert loss.item() == 0
    assert logits.grad is not None


def test_cross_entropy_without_a_label_is_zero_with_a_graph() -> None:
    logits = random_logits((2, 4, 5, 6)).requires_grad_()
    loss = functional.cross_entropy(logits, torch.full((2, 5, 6), -1))
    loss.backward()
    assert loss.item() == 0
    assert not logits.grad.any()


# --------------------------------------------------------------------------------------------
# Errors
# --------------------------------------------------------------------------------------------

MAKERS: dict[str, Callable[..., Any]] = {
    "MaxSquareLoss": MaxSquareLoss,
    "IWMaxSquareLoss": IWMaxSquareLoss,
    "EntropyLoss": EntropyLoss,
    "IWEntropyLoss": IWEntropyLoss,
    "TsallisEntropyLoss": lambda **options: TsallisEntropyLoss(options.pop("q", 1.5), **options),
    "PseudoLabelLoss": PseudoLabelLoss,
    "MultiLevelGuidance": MultiLevelGuidance,
    "MultiLevelLoss": lambda **options: MultiLevelLoss(
        options.pop("target_loss", MaxSquareLoss()), **options
    ),
}
COMMON_BAD_OPTIONS = [
    ("reduction", "avg", ValueError, "'mean' or 'sum' or 'none'"),
    ("reduction", None, (TypeError, ValueError), "'mean'"),
    ("reduction", np.array(["mean", "sum"]), (TypeError, ValueError), "'mean'"),
    ("activation", "relu", ValueError, "'softmax' or 'sigmoid'"),
    ("from_logits", "yes", TypeError, "True or False"),
]
BAD_RATIO = [
    ("ratio", -1.1, ValueError, "-1 to 1"),
    ("ratio", 1.5, ValueError, "-1 to 1"),
    ("ratio", math.nan, ValueError, "-1 to 1"),
    ("ratio", "0.2", TypeError, "number"),
    ("ignore_index", 0.5, TypeError, "int"),
    ("ignore_index", 2**63, ValueError, "64 bits"),
]
BAD_THRESHOLD = [
    ("threshold", -0.1, ValueError, "0 to 1"),
    ("threshold", 1.5, ValueError, "0 to 1"),
    ("threshold", math.nan, ValueError, "0 to 1"),
    ("threshold", "high", TypeError, "number"),
]
BAD_OPTIONS = [
    *((name, *bad) for name in MAKERS if name != "MultiLevelLoss" for bad in COMMON_BAD_OPTIONS),
    *(
        (name, "scale", "published", ValueError, "'paper' or 'reference'")
        for name in ("MaxSquareLoss", "IWMaxSquareLoss", "EntropyLoss", "TsallisEntropyLoss")
    ),
    *(
        (name, *bad)
        for name in ("IWMaxSquareLoss", "IWEntropyLoss", "TsallisEntropyLoss")
        for bad in BAD_RATIO
    ),
    *(
        (name, *bad)
        for name in ("PseudoLabelLoss", "MultiLevelGuidance", "MultiLevelLoss")
        for bad in BAD_THRESHOLD
    ),
    ("TsallisEntropyLoss", "q", 0, ValueError, "above 0"),
    ("TsallisEntropyLoss", "q", -1.0, ValueError, "above 0"),
    ("TsallisEntropyLoss", "q", math.nan, ValueError, "above 0"),
    ("TsallisEntropyLoss", "q", math.inf, ValueError, "above 0"),
    ("TsallisEntropyLoss", "q", 1e39, ValueError, "finite"),
    ("TsallisEntropyLoss", "q", "2", TypeError, "number"),
    ("TsallisEntropyLoss", "q", None, TypeError, "number"),
    ("IWMaxSquareLoss", "ratio", None, TypeError, "number"),
    ("PseudoLabelLoss", "threshold", None, TypeError, "number"),
    ("MultiLevelLoss", "weight", None, TypeError, "number"),
    ("MultiLevelLoss", "weight", -0.1, ValueError, "at least 0"),
    ("MultiLevelLoss", "weight", math.nan, ValueError, "at least 0"),
    ("MultiLevelLoss", "weight", "0.1", TypeError, "number"),
    ("MultiLevelLoss", "target_loss", "entropy", TypeError, "loss"),
    ("MultiLevelLoss", "target_loss", torch.nn.CrossEntropyLoss(), TypeError, "loss"),
    ("MultiLevelLoss", "target_loss", MultiLevelGuidance(), TypeError, "loss"),
]


@pytest.mark.parametrize(("name", "option", "given_value", "error", "wanted"), BAD_OPTIONS)
def test_a_bad_constructor_option_is_told_what_is_wanted(
    name: str, option: str, given_value: Any, error: type[Exception], wanted: str
) -> None:
    with pytest.raises(error) as caught:
        MAKERS[name](**{option: given_value})
    message = str(caught.value)
    assert option in message
    is_module = isinstance(given_value, torch.nn.Module)
    assert (type(given_value).__name__ if is_module else repr(given_value)) in message
    assert wanted in message


@pytest.mark.parametrize("name", [name for name in MAKERS if name != "MultiLevelLoss"])
def test_constructor_options_are_keyword_only(name: str) -> None:
    with pytest.raises(TypeError):
        getattr(maxsquare, name)(0.5, 0.5, "mean")


LOGITS = torch.zeros(2, 3, 4, 5)
TRUE = torch.ones(2, 4, 5, dtype=torch.bool)
BAD_CALLS: list[tuple[str, Any, dict[str, Any], type[Exception], list[str]]] = [
    ("logits", [[1.0, 2.0]], {}, TypeError, ["list", "tensor"]),
    ("logits", LOGITS.long(), {}, TypeError, ["int64", "float"]),
    ("logits", LOGITS.bool(), {}, TypeError, ["bool", "float"]),
    ("logits", LOGITS.to(torch.complex64), {}, TypeError, ["complex64", "float"]),
    ("logits", LOGITS.to_sparse(), {}, TypeError, ["sparse", "dense"]),
    ("logits", torch.zeros(3), {}, ValueError, ["(3,)", "(N, C"]),
    ("logits", torch.zeros(()), {}, ValueError, ["()", "(N, C"]),
    ("logits", torch.zeros(1, 2, 3, 4, 5, 6), {}, ValueError, ["(1, 2, 3, 4, 5, 6)", "(N, C"]),
    ("logits", torch.zeros(2, 0, 4, 5), {}, ValueError, ["(2, 0, 4, 5)", "class"]),
    ("valid", LOGITS, {"valid": TRUE.float()}, TypeError, ["float32", "bool"]),
    ("valid", LOGITS, {"valid": [True]}, TypeError, ["list", "tensor"]),
    ("valid", LOGITS, {"valid": TRUE[:1]}, ValueError, ["(1, 4, 5)", "(2, 4, 5)"]),
    ("valid", LOGITS, {"valid": TRUE[:, None]}, ValueError, ["(2, 1, 4, 5)", "(2, 4, 5)"]),
    ("valid", LOGITS, {"valid": TRUE, "size": (8, 9)}, ValueError, ["(2, 4, 5)", "(2, 8, 9)"]),
    ("valid", LOGITS, {"valid": TRUE.to("meta")}, ValueError, ["meta", "cpu"]),
    ("size", LOGITS, {"size": (8,)}, ValueError, ["(8,)"]),
    ("size", LOGITS, {"size": (8, 9, 10)}, ValueError, ["(8, 9, 10)"]),
    ("size", LOGITS, {"size": (0, 9)}, ValueError, ["(0, 9)", "positive"]),
    ("size", LOGITS, {"size": (8, -9)}, ValueError, ["(8, -9)", "positive"]),
    ("size", LOGITS, {"size": (8.5, 9)}, (TypeError, ValueError), ["8.5", "int"]),
    ("size", LOGITS, {"size": "big"}, (TypeError, ValueError), ["big", "int"]),
    ("size", LOGITS, {"size": b"ab"}, (TypeError, ValueError), ["ab", "int"]),
    ("size", LOGITS, {"size": 8.5}, (TypeError, ValueError), ["8.5", "int"]),
    ("size", torch.zeros(2, 3), {"size": (8, 9)}, ValueError, ["(2, 3)"]),
    ("size", torch.zeros(2, 3, 4), {"size": (8, 9)}, ValueError, ["(2, 3, 4)"]),
    ("align_corners", LOGITS, {"align_corners": "yes"}, TypeError, ["yes", "True or False"]),
]
LABELS = torch.zeros(2, 4, 5, dtype=torch.int64)
BAD_LABELS: list[tuple[Any, type[Exception], list[str]]] = [
    (LABELS.float(), TypeError, ["float32", "int"]),
    (LABELS.bool(), TypeError, ["bool", "int"]),
    ([1], TypeError, ["list", "tensor"]),
    (LABELS[:, None], ValueError, ["(2, 1, 4, 5)", "(2, 4, 5)"]),
    (LABELS[:, :3], ValueError, ["(2, 3, 5)", "(2, 4, 5)"]),
    (LABELS.to("meta"), ValueError, ["meta", "cpu"]),
]
BAD_LOW_LOGITS: list[tuple[Any, dict[str, Any], type[Exception], list[str]]] = [
    ("low", {}, TypeError, ["tensor"]),
    (None, {}, TypeError, ["NoneType", "tensor"]),
    (np.zeros((2, 3, 4, 5)), {}, TypeError, ["ndarray", "tensor"]),
    (LOGITS[..., :0], {"size": (8, 9)}, ValueError, ["(2, 3, 4, 0)", "(2, 3, 4, 5)"]),
    ([], {}, (TypeError, ValueError), ["[]"]),
    ([LOGITS, "low"], {}, TypeError, ["str", "tensor"]),
    (LOGITS.double(), {}, TypeError, ["float64", "float32"]),
    (LOGITS[:1], {}, ValueError, ["(1, 3, 4, 5)", "(2, 3, 4, 5)"]),
    (LOGITS[:, :2], {}, ValueError, ["(2, 2, 4, 5)", "(2, 3, 4, 5)"]),
    (LOGITS[:, :2], {"size": (8, 9)}, ValueError, ["(2, 2, 4, 5)", "(2, 3, 4, 5)"]),
    (LOGITS[:, :, :2], {}, ValueError, ["(2, 3, 2, 5)", "(2, 3, 4, 5)"]),
    (LOGITS[..., 0], {}, ValueError, ["(2, 3, 4)", "(2, 3, 4, 5)"]),
    (LOGITS.to("meta"), {}, ValueError, ["meta", "cpu"]),
    ([LOGITS, LOGITS[:1]], {}, ValueError, ["(1, 3, 4, 5)", "(2, 3, 4, 5)"]),
]


def assert_tells(
    error: type[Exception], argument: str, told: list[str], call: Callable[[], Any]
) -> None:
    with pytest.raises(error) as caught:
        call()
    message = str(caught.value)
    assert re.search(rf"\b{argument}\b", message)
    for part in told:
        assert part in message, f"{part!r} not in {message!r}"


@pytest.mark.parametrize("member", LOSSES, ids=repr)
@pytest.mark.parametrize(("argument", "logits", "call", "error", "told"), BAD_CALLS)
def test_a_bad_argument_is_told_what_is_wanted(
    member: Member,
    argument: str,
    logits: Any,
    call: dict[str, Any],
    error: type[Exception],
    told: list[str],
) -> None:
    inputs = (logits,) * member.heads
    assert_tells(error, argument, told, lambda: member.make()(*inputs, **call))
    assert_tells(error, argument, told, lambda: member.function(*inputs, **call))


@pytest.mark.parametrize(("argument", "logits", "call", "error", "told"), BAD_CALLS)
def test_cross_entropy_and_the_maps_tell_what_is_wanted(
    argument: str, logits: Any, call: dict[str, Any], error: type[Exception], told: list[str]
) -> None:
    labels = LABELS.new_zeros((2, 8, 9)) if call.get("size") == (8, 9) else LABELS
    for function in (
        lambda: functional.cross_entropy(logits, labels, **call),
        lambda: functional.image_weights(logits, **call),
        lambda: functional.guidance_labels(logits, logits, **call),
    ):
        assert_tells(error, argument, told, function)


@pytest.mark.parametrize(("labels", "error", "told"), BAD_LABELS)
def test_bad_labels_are_told_what_is_wanted(
    labels: Any, error: type[Exception], told: list[str]
) -> None:
    for member in LOSSES:
        if member.image_wise:
            inputs = (LOGITS,) * member.heads
            assert_tells(
                error, "labels", told, lambda m=member, x=inputs: m.make()(*x, labels=labels)
            )
    assert_tells(error, "labels", told, lambda: functional.cross_entropy(LOGITS, labels))
    assert_tells(error, "labels", told, lambda: functional.image_weights(LOGITS, labels=labels))


def test_cross_entropy_needs_labels() -> None:
    with pytest.raises(TypeError, match=r"\blabels\b.* tensor"):
        functional.cross_entropy(LOGITS, None)


@pytest.mark.parametrize("member", [member for member in LOSSES if not member.image_wise], ids=repr)
def test_labels_are_refused_where_no_image_weight_uses_them(member: Member) -> None:
    inputs = (LOGITS,) * member.heads
    with pytest.raises((TypeError, ValueError), match=r"\blabels\b"):
        member.make()(*inputs, labels=LABELS)
    with pytest.raises((TypeError, ValueError), match=r"\blabels\b"):
        member.function(*inputs, labels=LABELS)


@pytest.mark.parametrize(("low_logits", "call", "error", "told"), BAD_LOW_LOGITS)
def test_bad_low_logits_are_told_what_is_wanted(
    low_logits: Any, call: dict[str, Any], error: type[Exception], told: list[str]
) -> None:
    for loss in (MultiLevelGuidance(), MultiLevelLoss(MaxSquareLoss()), functional.guidance_loss):
        assert_tells(error, "low_logits", told, lambda f=loss: f(LOGITS, low_logits, **call))
    if not isinstance(low_logits, list):
        assert_tells(
            error,
            "low_logits",
            told,
            lambda: functional.guidance_labels(LOGITS, low_logits, **call),
        )


def test_softmax_over_a_single_class_is_refused_and_sigmoid_is_not() -> None:
    logits = torch.zeros(2, 1, 4, 5)
    for member in LOSSES:
        inputs = (logits,) * member.heads
        assert_tells(
            ValueError, "logits", ["(2, 1, 4, 5)"], lambda m=member, x=inputs: m.make()(*x)
        )
        assert member.make(activation="sigmoid")(*inputs).isfinite()


@pytest.mark.parametrize("member", LOSSES, ids=repr)
def test_functions_check_their_options_too(member: Member) -> None:
    function = member.function
    assert function is not None
    for option, given_value, error, wanted in COMMON_BAD_OPTIONS:
        bad = {option: given_value}
        assert_tells(error, option, [wanted], lambda b=bad: function(*[LOGITS] * member.heads, **b))


def test_the_own_options_of_the_functions_are_checked() -> None:
    z = LOGITS
    calls: list[tuple[str, type[Exception], Callable[[], Any]]] = [
        ("ratio", ValueError, lambda: functional.max_square(z, ratio=2)),
        ("ratio", ValueError, lambda: functional.entropy(z, ratio=-2)),
        ("ratio", ValueError, lambda: functional.image_weights(z, ratio=2)),
        ("q", ValueError, lambda: functional.tsallis_entropy(z, 0)),
        ("q", TypeError, lambda: functional.tsallis_entropy(z, "2")),
        ("threshold", ValueError, lambda: functional.pseudo_label_loss(z, threshold=2)),
        ("threshold", ValueError, lambda: functional.guidance_loss(z, z, threshold=2)),
        ("threshold", ValueError, lambda: functional.guidance_labels(z, z, threshold=2)),
        ("ignore_index", TypeError, lambda: functional.guidance_labels(z, z, ignore_index=0.5)),
        ("ignore_index", TypeError, lambda: functional.image_weights(z, ignore_index="-1")),
        ("ignore_index", TypeError, lambda: functional.cross_entropy(z, LABELS, ignore_index=0.5)),
        ("reduction", ValueError, lambda: functional.cross_entropy(z, LABELS, reduction="avg")),
        ("scale", ValueError, lambda: functional.max_square(z, scale="published")),
    ]
    for argument, error, call in calls:
        assert_tells(error, argument, [], call)


def test_the_public_names_are_exactly_the_promised_ones() -> None:
    modules = {type(member.make()).__name__ for member in LOSSES}
    assert modules | {"functional", "gradient_profile", "class_gradient_share"} <= set(
        maxsquare.__all__
    )
    assert all(hasattr(maxsquare, name) for name in maxsquare.__all__)


def test_every_float_dtype_is_taken() -> None:
    for dtype in TOLERANCE:
        assert MaxSquareLoss()(LOGITS.to(dtype)).isfinite()
