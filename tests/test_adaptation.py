"""Promises of uda.adaptation: the published steps, number for number, and how they may be run."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import lightning_fabric
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fill import fill
from torch import Tensor, nn

import maxsquare
from uda.adaptation import (
    BackboneUpdates,
    RepeatedSGD,
    adaptation_step,
    make_teacher,
    methods,
    parameter_groups,
    poly_lr,
    set_learning_rate,
    source_step,
)
from uda.deeplab import DeepLabV2, deeplab_resnet101

# In float64: in float32, processors put a pixel on either side of the threshold, which moves a
# loss by 1e-4.
with np.load(Path(__file__).parent / "fixtures" / "trajectory.npz") as arrays:
    RECORDED = {key: torch.from_numpy(arrays[key]) for key in arrays.files}
CASES = sorted({key.rpartition("/")[0] for key in RECORDED if "/" in key})

PUBLISHED_MODES: dict[str, nn.Module] = {
    "hard": maxsquare.PseudoLabelLoss(threshold=0.3),
    "entropy": maxsquare.EntropyLoss(scale="reference"),
    "IW_entropy": maxsquare.IWEntropyLoss(ratio=0.2, scale="reference"),
    "maxsquare": maxsquare.MaxSquareLoss(scale="reference"),
    "IW_maxsquare": maxsquare.IWMaxSquareLoss(ratio=0.2, scale="reference"),
}
# How the recorded loop lists the backbone, and the torch whose optimiser it runs.
LISTINGS: dict[tuple[str, ...], BackboneUpdates] = {
    ("0",): "once",
    ("1",): "duplicated",
    ("1", "1.0.0"): "torch-1.0",
}


# Every mode and both values of every switch; `-m stress` runs all cases.
COVERING = {
    "hard/multi=1/freeze_bn=0/dup=1",
    "entropy/multi=0/freeze_bn=0/dup=1",
    "IW_entropy/multi=0/freeze_bn=0/dup=1",
    "maxsquare/multi=0/freeze_bn=0/dup=0",
    "IW_maxsquare/multi=1/freeze_bn=1/dup=1/sgd=1.0.0",
}


# Elsewhere torch.randn draws other last bits, and a pixel near the threshold goes the other way.
@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"),
    reason="torch.randn draws the recorded run's weights with these instructions only",
)
@pytest.mark.parametrize(
    "case",
    [case if case in COVERING else pytest.param(case, marks=pytest.mark.stress) for case in CASES],
)
def test_ten_steps_equal_the_published_loop(case: str) -> None:
    mode, multi, freeze_bn, *listing = (part.rpartition("=")[2] for part in case.split("/"))
    model = DeepLabV2(5, blocks=(1, 1, 1, 1), freeze_bn=freeze_bn == "1").train()
    fill(model)
    model.double()
    target_loss = PUBLISHED_MODES[mode]
    if multi == "1":
        target_loss = maxsquare.MultiLevelLoss(target_loss, threshold=0.3, weight=0.5)
    lr = 1e-4 if freeze_bn == "1" else 1e-3
    groups = parameter_groups(model, lr, backbone_updates=LISTINGS[(*listing,)])
    optimizer = RepeatedSGD(groups, momentum=0.9, weight_decay=5e-4)
    # The published code computes the image-wise weights in float32.
    tolerance = 1e-6 if mode.startswith("IW_") else 1e-9

    wanted = RECORDED[f"{case}/losses"].nan_to_num(0)  # published: NaN if nothing is accepted
    for step in range(10):
        set_learning_rate(optimizer, poly_lr(step, 20, lr))
        losses = adaptation_step(
            model,
            optimizer,
            RECORDED["source_images"][step].double(),
            RECORDED["source_labels"][step].long(),
            RECORDED["target_images"][step].double(),
            target_loss,
            target_weight=1.0,
            low_weight=0.5 if multi == "1" else 0.0,
        )
        source, source_low, target, guidance = wanted[step].tolist()
        assert torch.stack(losses).tolist() == pytest.approx(
            [source, source_low, target + guidance], abs=tolerance
        )

    model.eval()
    with torch.no_grad():
        heads = model(RECORDED["probe"].double())
    for name, logits in zip(("final", "low"), heads, strict=True):
        size = RECORDED["probe"].shape[-2:]
        probe = F.interpolate(logits, size, mode="bilinear", align_corners=True)[..., ::4, ::4]
        wanted_probe = RECORDED[f"{case}/probe_{name}"]
        torch.testing.assert_close(probe, wanted_probe, atol=tolerance, rtol=0)


def test_the_recorded_cases_cover_every_mode_and_switch() -> None:
    assert COVERING < set(CASES)
    assert {case.split("/")[0] for case in COVERING} == set(PUBLISHED_MODES)
    for switch in ("multi", "freeze_bn", "dup"):
        assert {case.partition(f"{switch}=")[2][0] for case in COVERING} == {"0", "1"}
    assert sum(case.endswith("/sgd=1.0.0") for case in CASES) == 5


@pytest.mark.parametrize("foreach", [False, True])
def test_repeated_sgd_equals_listing_a_parameter_repeatedly(foreach: bool) -> None:
    torch.manual_seed(0)
    start, gradients = torch.randn(2, 3), torch.randn(4, 2, 3)
    ours, listed = (
        [start[i].clone().requires_grad_() for i in range(2)] for _ in ("ours", "listed")
    )
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.05}
    groups = [{"params": [ours[0]], "repeats": 1}, {"params": [ours[1]], "repeats": 3}]
    repeated = RepeatedSGD(groups, foreach=foreach, **options)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*duplicate parameters")
        reference = torch.optim.SGD([listed[0]] + [listed[1]] * 3, foreach=False, **options)
    for gradient in gradients:
        for parameters in (ours, listed):
            for i in range(2):
                parameters[i].grad = gradient[i].clone()
        repeated.step()
        reference.step()
        torch.testing.assert_close(ours, listed)
    assert len(repeated.param_groups) == 2


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize(("repeats", "length"), [(1, 1.0), (3, 5.61), (4, 9.049)])
def test_momentum_is_carried_through_the_first_step_of_torch_1_0(
    repeats: int, length: float, foreach: bool
) -> None:
    parameter = torch.zeros(2, requires_grad=True)
    groups = [{"params": [parameter], "repeats": repeats, "carry": True}]
    optimizer = RepeatedSGD(groups, lr=1.0, momentum=0.9, foreach=foreach)
    parameter.grad = torch.ones(2)
    optimizer.step()
    assert parameter.tolist() == pytest.approx([-length, -length])


@pytest.mark.parametrize("foreach", [False, True])
def test_the_kth_update_of_torch_1_0_decays_k_times(foreach: bool) -> None:
    parameter = torch.ones(1, requires_grad=True)
    groups = [{"params": [parameter], "repeats": 3, "carry": True}]
    optimizer = RepeatedSGD(groups, lr=0.5, weight_decay=0.2, foreach=foreach)
    values = [1.0]
    for _ in range(3):
        values.append(values[-1] - 0.5 * 0.2 * sum(values))
    parameter.grad = torch.zeros(1)
    optimizer.step()
    assert parameter.item() == pytest.approx(values[-1])
    assert optimizer.param_groups[0]["weight_decay"] == 0.2


@pytest.mark.parametrize("carry", [False, True])
def test_repeated_sgd_resumes_with_its_momentum(carry: bool) -> None:
    def steps(parameter: Tensor, optimizer: RepeatedSGD, count: int) -> None:
        for _ in range(count):
            parameter.grad = torch.ones(3)
            optimizer.step()

    def begin(values: Tensor) -> tuple[Tensor, RepeatedSGD]:
        parameter = values.clone().requires_grad_()
        groups = [{"params": [parameter], "repeats": 3, "carry": carry}]
        return parameter, RepeatedSGD(groups, lr=0.1, momentum=0.9, weight_decay=0.05)

    whole, optimizer = begin(torch.zeros(3))
    steps(whole, optimizer, 4)
    first, optimizer = begin(torch.zeros(3))
    steps(first, optimizer, 2)
    second, resumed = begin(first.detach())
    resumed.load_state_dict(optimizer.state_dict())
    steps(second, resumed, 2)
    assert torch.equal(whole, second)


def test_repeated_sgd_calls_its_closure_once() -> None:
    parameter = torch.ones(1, requires_grad=True)
    optimizer = RepeatedSGD([{"params": [parameter], "repeats": 2}], lr=0.5)

    def closure() -> Tensor:
        loss = parameter.sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 1
    assert parameter.item() == 0


def test_groups_of_resnet101_are_the_published_ones() -> None:
    with torch.device("meta"):
        model = deeplab_resnet101(19)
    groups = parameter_groups(model, 2.5e-4, backbone_updates="duplicated")
    listed = [(len(g["params"]), g["repeats"], g["lr"]) for g in groups]
    assert listed == [(1, 1, 2.5e-4), (297, 3, 2.5e-4), (12, 4, 2.5e-4), (8, 1, 2.5e-3)]
    once = parameter_groups(model, 2.5e-4, backbone_updates="once", head_multiple=3)
    assert [group["repeats"] for group in once] == [1, 1, 1, 1]
    assert once[3]["lr"] == 7.5e-4
    with pytest.raises(ValueError, match="backbone_updates must be in .* got 'twice'"):
        parameter_groups(model, 1.0, backbone_updates="twice")  # type: ignore[arg-type]


def test_poly_lr_falls_from_base_to_zero() -> None:
    assert poly_lr(0, 20, 0.5) == 0.5
    assert poly_lr(5, 20, 0.5) == pytest.approx(0.5 * 0.75**0.9)
    assert poly_lr(10, 20, 0.5, power=2) == pytest.approx(0.5 / 4)
    assert poly_lr(20, 20, 0.5) == 0


# A small step, run in every way that must give the same result.
Step = Callable[..., tuple[Tensor, Tensor, Tensor]]


def small_model(**options: object) -> DeepLabV2:
    model = DeepLabV2(3, blocks=(1, 1, 1, 1), width=4, **options).train()  # type: ignore[arg-type]
    fill(model)
    return model


def small_batch() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(2, 4, 3, 33, 33, generator=generator)
    labels = torch.randint(0, 3, (4, 33, 33), generator=generator)
    return images[0], labels, images[1]


def sgd(model: nn.Module, lr: float = 1e-2) -> RepeatedSGD:
    return RepeatedSGD(parameter_groups(model, lr), momentum=0.9, weight_decay=5e-4)


METHODS = methods()
MULTI = methods(threshold=0.0)["maxsquare-iw-multi"]


@pytest.mark.parametrize("name", [name for name, loss in METHODS.items() if loss is not None])
def test_every_method_has_its_own_effect_on_the_weights(name: str) -> None:
    without, adapted = small_model(), small_model()
    source_images, source_labels, target_images = small_batch()
    source_step(without, sgd(without), source_images, source_labels, low_weight=0.1)
    loss = methods(threshold=0.4)[name]
    assert loss is not None
    teacher = {"teacher": make_teacher(adapted)} if name == "teacher" else {}
    losses = adaptation_step(
        adapted, sgd(adapted), *small_batch(), loss, target_weight=1.0, low_weight=0.1, **teacher
    )
    assert all(value.isfinite() and not value.requires_grad for value in losses)
    assert not torch.equal(adapted.layer4[0].conv1.weight, without.layer4[0].conv1.weight)


def test_target_weight_zero_moves_no_weight_beyond_the_source_step() -> None:
    without, adapted = small_model(freeze_bn=True), small_model(freeze_bn=True)
    images, labels, _ = small_batch()
    expected = source_step(without, sgd(without), images, labels, low_weight=0.1)
    losses = adaptation_step(
        adapted, sgd(adapted), *small_batch(), MULTI, target_weight=0.0, low_weight=0.1
    )
    torch.testing.assert_close(tuple(losses), tuple(expected))
    torch.testing.assert_close(adapted.state_dict(), without.state_dict())


def test_low_weight_zero_leaves_the_low_head_alone() -> None:
    model, untouched = small_model(), small_model()
    adaptation_step(
        model, sgd(model), *small_batch(), METHODS["maxsquare"], target_weight=1.0, low_weight=0.0
    )
    torch.testing.assert_close(model.layer5.state_dict(), untouched.layer5.state_dict())


def test_methods_take_their_settings() -> None:
    loss = methods(ratio=0.5, threshold=0.8, low_weight=0.3)["maxsquare-iw-multi"]
    assert isinstance(loss, maxsquare.MultiLevelLoss)
    assert (loss.target_loss.ratio, loss.threshold, loss.weight) == (0.5, 0.8, 0.3)
    assert METHODS["source"] is None


def run(prepare: Callable[[nn.Module], nn.Module] = lambda model: model) -> DeepLabV2:
    model = small_model()
    adaptation_step(
        prepare(model), sgd(model), *small_batch(), MULTI, target_weight=1.0, low_weight=0.1
    )
    return model


def test_channels_last_gives_the_same_step() -> None:
    model = run(lambda model: model.to(memory_format=torch.channels_last))
    torch.testing.assert_close(model.state_dict(), run().state_dict(), atol=1e-5, rtol=1e-4)


def test_a_compiled_model_gives_the_same_step() -> None:
    model = run(lambda model: torch.compile(model, backend="eager"))
    torch.testing.assert_close(model.state_dict(), run().state_dict(), atol=1e-5, rtol=1e-4)


def test_bf16_autocast_gives_nearly_the_same_losses() -> None:
    def losses() -> Tensor:
        model = small_model()
        batch = small_batch()
        return torch.stack(
            adaptation_step(model, sgd(model), *batch, MULTI, target_weight=1.0, low_weight=0.1)
        )

    exact = losses()
    with torch.autocast("cpu", torch.bfloat16):
        rounded = losses()
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, exact, atol=0.02, rtol=0.02)


def _take_two_steps(fabric: lightning_fabric.Fabric, weights: Path) -> None:
    """Each process takes its share of one batch; the first writes the weights."""
    model = small_model(freeze_bn=True)
    wrapped, optimizer = fabric.setup(model, sgd(model))
    share = [tensor.chunk(fabric.world_size)[fabric.global_rank] for tensor in small_batch()]
    for _ in range(2):
        adaptation_step(
            wrapped,
            optimizer,
            *share,
            MULTI,
            target_weight=1.0,
            low_weight=0.1,
            backward=fabric.backward,
        )
    if fabric.is_global_zero:
        torch.save(model.state_dict(), weights)
    if fabric.world_size > 1:
        torch.distributed.destroy_process_group()  # else the exit may abort


@pytest.mark.stress  # test_examples runs the whole script with two processes
def test_two_processes_with_half_a_batch_equal_one_with_all_of_it(tmp_path: Path) -> None:
    # Every pixel is labelled and accepted (threshold 0), so that both halves weigh the same.
    _take_two_steps(lightning_fabric.Fabric(accelerator="cpu", devices=1), tmp_path / "one.pt")
    fabric = lightning_fabric.Fabric(accelerator="cpu", devices=2, strategy="ddp_spawn")
    fabric.launch(_take_two_steps, tmp_path / "two.pt")
    one, two = torch.load(tmp_path / "one.pt"), torch.load(tmp_path / "two.pt")
    torch.testing.assert_close(two, one, atol=1e-6, rtol=1e-5)
    for key in ("layer1.0.conv1.weight", "layer5.conv2d_list.0.weight"):
        assert not torch.equal(one[key], small_model().state_dict()[key])
