"""Mean predictions: class proportions, information maximisation, and the teacher's loss."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from support import assert_close, batches, random_logits, random_valid, value_and_gradient
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

from maxsquare import (
    EntropyLoss,
    InformationMaximizationLoss,
    IWMaxSquareLoss,
    MaxSquareLoss,
    MultiLevelLoss,
    PredictionStatistics,
    PseudoLabelLoss,
    TeacherLoss,
    TsallisEntropyLoss,
    functional,
)

each_size = pytest.mark.parametrize("size", [None, (7, 9)], ids=["as is", "upsampled"])
TARGETS = {
    "max_square": MaxSquareLoss(),
    "iw_max_square": IWMaxSquareLoss(),
    "entropy": EntropyLoss(),
    "near_1": TsallisEntropyLoss(1 + 1e-7),
    "iw_tsallis": TsallisEntropyLoss(1.5, ratio=0.4),
    "pseudo_label": PseudoLabelLoss(0.4),
    "sigmoid": MaxSquareLoss(activation="sigmoid"),
    "sum": EntropyLoss(reduction="sum"),
    "reference": IWMaxSquareLoss(scale="reference"),
}
each_target = pytest.mark.parametrize("target", TARGETS)
# What PyTorch says of itself.
forward_mode = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:FutureWarning")
batched = pytest.mark.filterwarnings("ignore:Please use .torch.vmap. instead:FutureWarning")


def upsample(z: Tensor, size: tuple[int, int] | None) -> Tensor:
    return z if size is None else F.interpolate(z, size, mode="bilinear")


def masked_mean(p: Tensor, valid: Tensor | None) -> Tensor:
    """Of (N, C, *) over all pixels that count, (C,)."""
    pixels = p.movedim(1, -1)
    return pixels.flatten(0, -2).mean(0) if valid is None else pixels[valid].mean(0)


@given(batches(largest_size=(8, 9)))
def test_class_proportions_are_the_mean_of_p_over_every_image(batch) -> None:
    found = functional.class_proportions(batch.logits, **batch.call())
    z, valid = batch.logits, batch.valid
    if batch.size is not None:
        z = F.interpolate(z, batch.size, mode="bilinear", align_corners=batch.align_corners)
    p = z.softmax(1)
    if z.dim() == 2:
        p = p.t().unsqueeze(0)
        valid = None if valid is None else valid.unsqueeze(0)
    kept = torch.ones_like(p[:, 0]) if valid is None else valid.to(p)
    exact = (p * kept.unsqueeze(1)).flatten(2).sum(2) / kept.flatten(1).sum(1, True).clamp_min(1)
    assert_close(found, exact)


@forward_mode
@batched
@each_size
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_class_proportions_have_all_derivatives(size, activation: str) -> None:
    z = random_logits((2, 3, 3, 4)).requires_grad_()
    valid = random_valid((2, *(size or (3, 4))))

    def proportions(z: Tensor) -> Tensor:
        return functional.class_proportions(z, size=size, valid=valid, activation=activation)

    assert gradcheck(proportions, z, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(proportions, z)
    images = torch.stack([z.detach(), 2 * z.detach()])
    mapped = torch.func.vmap(proportions)(images)
    assert_close(mapped, torch.stack([proportions(image) for image in images]))


@each_size
def test_masked_pixels_reach_nothing_and_others_hide_no_nan(size) -> None:
    z = random_logits((2, 3, 4, 5)).float()
    z[0, 1, 0, 0] = torch.nan
    full = torch.isnan(upsample(z, size)).any(1)
    hidden, gradient = value_and_gradient(
        lambda z: functional.class_proportions(z, size=size, valid=~full).square().sum(), (z,)
    )
    assert hidden.isfinite() and gradient[0][1].isfinite().all()
    seen = functional.class_proportions(z, size=size)
    assert seen[0].isnan().all() and seen[1].isfinite().all()
    nothing = functional.class_proportions(z, size=size, valid=torch.zeros_like(full))
    assert torch.equal(nothing, torch.zeros(2, 3))


@each_size
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("images", [1, 3])
def test_entropy_with_the_term_is_minus_the_mutual_information(size, masked, images) -> None:
    z = random_logits((images, 5, 4, 6)).requires_grad_()
    valid = random_valid((images, *(size or (4, 6)))) if masked else None
    loss = InformationMaximizationLoss(EntropyLoss())
    p = upsample(z, size).softmax(1)
    joint = p.movedim(1, -1)[valid] if masked else p.movedim(1, -1).flatten(0, -2)
    joint = joint / len(joint)
    independent = joint.sum(1, keepdim=True) * joint.sum(0, keepdim=True)
    information = (joint * (joint / independent).log()).sum()
    constant = torch.tensor(5.0, dtype=torch.float64).log()
    found = loss(z, size=size, valid=valid)
    assert_close(found.detach(), (constant - information).detach())
    (ours,) = torch.autograd.grad(found, z)
    (exact,) = torch.autograd.grad(-information, z)
    assert_close(ours, exact)


@each_target
@each_size
def test_the_term_is_the_divergence_with_the_factor_and_weights_of_its_loss(target, size) -> None:
    loss = TARGETS[target]
    z, valid = random_logits((3, 4, 5, 6)), random_valid((3, *(size or (5, 6))))
    found = InformationMaximizationLoss(loss, weight=0.7)(z, size=size, valid=valid)
    binary = loss.activation == "sigmoid"
    p = upsample(z, size)
    p = torch.stack([p.sigmoid(), 1 - p.sigmoid()]) if binary else p.softmax(1).unsqueeze(0)
    means = (
        [torch.stack([masked_mean(side, valid)[c] for side in p]) for c in range(4)]
        if binary
        else [masked_mean(p[0], valid)]
    )
    q = {EntropyLoss: 1, PseudoLabelLoss: 1, TsallisEntropyLoss: getattr(loss, "q", 0)}
    q = q.get(type(loss), 2)
    total = 0
    for mean in means:
        tau = 1 / len(mean)
        if abs(q - 1) < 1e-6:
            total += (mean * (mean / tau).log()).sum()
        else:
            terms = mean**q - tau**q - q * tau ** (q - 1) * (mean - tau)
            total += terms.sum() / (q - 1)
    factor = {MaxSquareLoss: 0.5, IWMaxSquareLoss: 0.5}.get(type(loss), 1) / len(means)
    if target == "reference":
        factor *= 2 / 4
    if getattr(loss, "ratio", None) is not None:
        factor *= functional.image_weights(z, ratio=loss.ratio, size=size, valid=valid).sum() / 3
    if loss.reduction == "sum":
        factor *= valid.sum()
    expected = loss(z, size=size, valid=valid) + 0.7 * factor * total
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


@each_target
@each_size
def test_gradcheck(target: str, size) -> None:
    z = random_logits((2, 3, 3, 4)).requires_grad_()
    loss = InformationMaximizationLoss(TARGETS[target])
    assert gradcheck(lambda z: loss(z, size=size), z)


@each_target
def test_terms_of_pixels_add_up_to_the_sum(target: str) -> None:
    z, valid = random_logits((2, 3, 5, 6)), random_valid((2, 5, 6))
    options = TARGETS[target].options()
    make = type(TARGETS[target])
    by_pixel = InformationMaximizationLoss(make(**{**options, "reduction": "none"}))
    summed = InformationMaximizationLoss(make(**{**options, "reduction": "sum"}))
    terms = by_pixel(z, valid=valid)
    assert_close(terms.sum(), summed(z, valid=valid))
    assert terms.shape == ((2, 3, 5, 6) if options["activation"] == "sigmoid" else (2, 5, 6))


def test_a_prior_moves_the_minimum_of_the_term() -> None:
    prior = torch.tensor([0.7, 0.2, 0.1])
    for q in (0.5, 1, 2, 3):
        mean = prior.log().double().view(1, 3, 1).requires_grad_()
        at_prior = InformationMaximizationLoss(TsallisEntropyLoss(q), prior=prior)(mean)
        alone = TsallisEntropyLoss(q)(mean)
        assert_close(at_prior, alone)
        uniform = InformationMaximizationLoss(TsallisEntropyLoss(q))(mean)
        assert uniform > alone


def test_a_prior_is_a_distribution_over_the_classes() -> None:
    for prior in ([0.5, 0.2], [-0.1, 1.1], [[0.5, 0.5]], [0.5, float("nan")]):
        with pytest.raises(ValueError, match="prior"):
            InformationMaximizationLoss(MaxSquareLoss(), prior=prior)
    with pytest.raises(TypeError, match="prior"):
        InformationMaximizationLoss(MaxSquareLoss(), prior="uniform")
    loss = InformationMaximizationLoss(MaxSquareLoss(), prior=[0.7, 0.3])
    assert repr(loss).startswith("InformationMaximizationLoss(\n  weight=1.0, prior=[0.7, 0.3]\n")
    # Some devices have no float64.
    assert loss.prior is not None and loss.prior.dtype == torch.get_default_dtype()
    InformationMaximizationLoss(MaxSquareLoss(), prior=[0.5, 0.5005])
    with pytest.raises(ValueError, match="prior must have 3 classes, not 2"):
        InformationMaximizationLoss(MaxSquareLoss(), prior=[0.5, 0.5])(random_logits((1, 3, 4)))


def test_only_a_loss_of_one_head_is_a_target_loss() -> None:
    once = InformationMaximizationLoss(MaxSquareLoss())
    for loss in (once, MultiLevelLoss(MaxSquareLoss()), nn.CrossEntropyLoss(), None):
        with pytest.raises(TypeError, match="target_loss must be a loss of one head's logits"):
            InformationMaximizationLoss(loss)
    with pytest.raises(ValueError, match="weight"):
        InformationMaximizationLoss(MaxSquareLoss(), weight=-1)


def test_it_stands_in_a_multi_level_loss() -> None:
    z, low = random_logits((2, 4, 5, 6)), random_logits((2, 4, 3, 4), seed=1)
    target = InformationMaximizationLoss(IWMaxSquareLoss())
    loss = MultiLevelLoss(target, threshold=0.5, weight=0.3)
    guidance = functional.guidance_loss(z, low, threshold=0.5, size=(9, 11))
    assert_close(loss(z, low, size=(9, 11)), target(z, size=(9, 11)) + 0.3 * guidance)


def test_nothing_valid_gives_zero_and_a_zero_gradient() -> None:
    nothing = torch.zeros(2, 4, 5, dtype=torch.bool)
    for target in TARGETS.values():
        loss = InformationMaximizationLoss(target)
        value, (gradient,) = value_and_gradient(
            lambda z, loss=loss: loss(z, valid=nothing), (random_logits((2, 3, 4, 5)),)
        )
        assert value == 0
        assert not gradient.any()


# A classifier that adapts while it predicts -------------------------------------------------------


def accuracy_after_adapting(loss: nn.Module, seed: int) -> tuple[float, float]:
    """Of a small LayerNorm network on shifted clusters, before and after a stream of batches."""
    torch.manual_seed(seed)
    classes, features = 5, 16
    centres = torch.randn(classes, features)
    model = nn.Sequential(
        nn.Linear(features, 32), nn.LayerNorm(32), nn.ReLU(), nn.Linear(32, classes)
    )
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)

    def batch(shift: float) -> tuple[Tensor, Tensor]:
        y = torch.randint(classes, (64,))
        x = centres[y] + torch.randn(64, features)
        return x + shift * torch.linspace(-1, 1, features), y

    for _ in range(100):
        x, y = batch(0.0)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    x, y = batch(2.5)

    def accuracy() -> float:
        with torch.no_grad():
            return (model(x).argmax(1) == y).double().mean().item()

    before = accuracy()
    norms = [p for m in model if isinstance(m, nn.LayerNorm) for p in m.parameters()]
    optimizer = torch.optim.SGD(norms, 0.1)
    for _ in range(300):
        optimizer.zero_grad()
        loss(model(batch(2.5)[0])).backward()
        optimizer.step()
    return before, accuracy()


def test_the_term_prevents_the_collapse_that_happens_without_it() -> None:
    plain = [accuracy_after_adapting(MaxSquareLoss(), seed) for seed in range(3)]
    cured = [
        accuracy_after_adapting(InformationMaximizationLoss(MaxSquareLoss()), seed)
        for seed in range(3)
    ]
    assert sum(after - before for before, after in plain) < 0
    assert all(with_it > without for (_, with_it), (_, without) in zip(cured, plain, strict=True))


# Teacher -----------------------------------------------------------------------------------------


@each_size
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
@pytest.mark.parametrize("average", ["accepted", "valid", "share"])
def test_the_teachers_loss_is_that_of_its_definition(size, activation: str, average: str) -> None:
    z = random_logits((2, 4, 5, 6)).requires_grad_()
    teacher = random_logits((2, 4, 5, 6) if size is None else (2, 4, 3, 4), seed=1).requires_grad_()
    valid = random_valid((2, *(size or (5, 6))))
    loss = TeacherLoss(0.6, average, activation=activation)
    found = loss(z, teacher, size=size, valid=valid)
    full, sure = upsample(z, size), upsample(teacher.detach(), size)
    if activation == "softmax":
        largest, y = sure.softmax(1).max(1)
        terms, counted = F.cross_entropy(full, y, reduction="none"), valid
    else:
        p = sure.sigmoid()
        largest, y = torch.maximum(p, 1 - p), (p >= 0.5).double()
        terms = F.binary_cross_entropy_with_logits(full, y, reduction="none")
        counted = valid.unsqueeze(1).expand_as(terms)
    accepted = (largest > 0.6) & counted
    expected = {
        "accepted": terms[accepted].mean(),
        "valid": terms[accepted].sum() / counted.sum(),
        "share": terms[counted].mean() * accepted.sum() / counted.sum(),
    }[average]
    assert_close(found.detach(), expected.detach())
    (ours,) = torch.autograd.grad(found, z, retain_graph=True)
    (exact,) = torch.autograd.grad(expected, z)
    assert_close(ours, exact)
    assert torch.autograd.grad(found, teacher, allow_unused=True) == (None,)


def test_a_teacher_is_like_its_student() -> None:
    z = random_logits((2, 4, 5, 6))
    for teacher in (random_logits((2, 3, 5, 6)), random_logits((1, 4, 5, 6)), z[..., :3]):
        with pytest.raises(ValueError, match="teacher_logits must match"):
            TeacherLoss()(z, teacher)
    with pytest.raises(ValueError, match="average"):
        TeacherLoss(average="mean")
    with pytest.raises(TypeError, match="teacher_logits"):
        TeacherLoss()(z, z.long())
    assert TeacherLoss(0.5)(z.float(), z.half()).dtype == torch.float32
    assert TeacherLoss(1.0)(z, z) == 0


# Statistics of predictions ------------------------------------------------------------------------


@each_size
def test_statistics_over_batches_are_those_of_all_pixels_at_once(size) -> None:
    statistics, pixels = PredictionStatistics(), []
    for seed in range(3):
        z = random_logits((seed + 1, 4, 5, 6), seed=seed, spread=4)
        z[:, 3] -= 99  # a class that nothing is predicted as
        valid = random_valid((len(z), *(size or (5, 6))), seed=seed)
        statistics.update(z.requires_grad_(), size=size, valid=valid)
        pixels.append(upsample(z.detach(), size).softmax(1).movedim(1, -1)[valid])
    p = torch.cat(pixels)
    found = statistics.compute()
    entropy = torch.special.entr(p).sum(1).mean()
    diversity = torch.special.entr(p.mean(0)).sum()
    assert_close(found.entropy, entropy)
    assert_close(found.proportions, p.mean(0))
    assert_close(found.diversity, diversity)
    assert_close(found.information, diversity - entropy)
    assert found.classes == 3
    statistics.reset()
    with pytest.raises(ValueError, match="at least one counted pixel"):
        statistics.compute()


def test_statistics_are_of_one_number_of_classes() -> None:
    statistics = PredictionStatistics()
    statistics.update(random_logits((1, 3, 4)))
    with pytest.raises(ValueError, match="3 classes as before, not 4"):
        statistics.update(random_logits((1, 4, 4)))
    with pytest.raises(TypeError, match="logits must be a tensor"):
        statistics.update(None)
    nothing = PredictionStatistics()
    nothing.update(random_logits((1, 3, 4)), valid=torch.zeros(1, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="at least one counted pixel"):
        nothing.compute()
