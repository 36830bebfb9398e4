"""The losses under torch's transformations: each must give what the plain call gives."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from support import (
    IMAGE_WISE,
    LOSSES,
    TWO_HEADS,
    Member,
    assert_close,
    inputs_of,
    loss_named,
    random_labels,
    random_logits,
    value_and_gradient,
)
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

from maxsquare import functional

each_loss = pytest.mark.parametrize("member", LOSSES, ids=repr)
each_size = pytest.mark.parametrize("size", [None, (5, 3)], ids=["as is", "upsampled"])
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
# Fewer members where one example costs about a second: one of each way through the library.
SLOW_MEMBERS = [
    loss_named(name)
    for name in ("max_square", "iw_entropy", "tsallis[1.5]", "pseudo_label", "iw_multi_level")
]
each_slow_member = pytest.mark.parametrize("member", SLOW_MEMBERS, ids=repr)

VALID = torch.tensor([[[1, 0], [1, 1], [1, 1]], [[1, 1], [0, 0], [1, 1]]], dtype=torch.bool)


# --------------------------------------------------------------------------------------------
# Numerical derivatives
# --------------------------------------------------------------------------------------------


@each_loss
@pytest.mark.parametrize(
    ("size", "activation"), [(None, "softmax"), (None, "sigmoid"), ((5, 3), "softmax")]
)
def test_gradcheck(member: Member, size: tuple[int, int] | None, activation: str) -> None:
    loss = member.make(activation=activation)
    assert gradcheck(partial(loss, size=size), inputs_of(member, (2, 3, 2, 2)))


@each_loss
@each_size
def test_gradgradcheck(member: Member, size: tuple[int, int] | None) -> None:
    assert gradgradcheck(partial(member.make(), size=size), inputs_of(member, (1, 3, 2, 2)))


@each_loss
def test_gradcheck_of_masked_terms(member: Member) -> None:
    loss = partial(member.make(reduction="none"), valid=VALID[:1])
    inputs = inputs_of(member, (1, 3, 3, 2))
    assert gradcheck(loss, inputs)
    assert gradgradcheck(loss, inputs)


@pytest.mark.parametrize("align_corners", [False, True])
@each_size
def test_gradcheck_of_cross_entropy(size: tuple[int, int] | None, align_corners: bool) -> None:
    labels = random_labels((2, 3, *(size or (3, 2))))
    loss = partial(functional.cross_entropy, labels=labels, size=size, align_corners=align_corners)
    logits = random_logits((2, 3, 3, 2)).requires_grad_()
    assert gradcheck(loss, logits)
    assert gradgradcheck(loss, logits)


def test_hessian_of_a_loss_is_that_of_ordinary_torch_code() -> None:
    logits = random_logits((1, 4, 2))
    ours = torch.autograd.functional.hessian(loss_named("max_square").make(), logits)
    plain = torch.autograd.functional.hessian(
        lambda z: -(z.softmax(1) ** 2).sum(1).mean() / 2, logits
    )
    assert_close(ours, plain)


# --------------------------------------------------------------------------------------------
# torch.func
# --------------------------------------------------------------------------------------------


@each_loss
@each_size
def test_func_grad_equals_autograd(member: Member, size: tuple[int, int] | None) -> None:
    loss = partial(member.make(), size=size)
    inputs = tuple(x.detach() for x in inputs_of(member))
    gradients = torch.func.grad(loss, argnums=tuple(range(member.heads)))(*inputs)
    for gradient, expected in zip(gradients, value_and_gradient(loss, inputs)[1], strict=True):
        assert_close(gradient, expected)


@each_loss
@each_size
def test_vmap_equals_a_loop(member: Member, size: tuple[int, int] | None) -> None:
    loss = partial(member.make(), size=size)
    stacks = tuple(x.detach() for x in inputs_of(member, (3, 2, 4, 5)))
    stacks = tuple(x.unsqueeze(1) for x in stacks)
    expected = torch.stack([loss(*(x[i] for x in stacks)) for i in range(3)])
    assert_close(torch.func.vmap(loss)(*stacks), expected)


@each_loss
@each_size
def test_vmap_of_grad_equals_a_loop(member: Member, size: tuple[int, int] | None) -> None:
    loss = partial(member.make(), size=size)
    stacks = tuple(x.detach().unsqueeze(1) for x in inputs_of(member, (3, 2, 4, 5)))
    gradient_of = torch.func.grad(loss, argnums=member.heads - 1)
    expected = torch.stack([gradient_of(*(x[i] for x in stacks)) for i in range(3)])
    assert_close(torch.func.vmap(gradient_of)(*stacks), expected)


# What vmap of PyTorch 2.6 says of its own loop.
@pytest.mark.filterwarnings("ignore:.*batching rule for aten..count_nonzero:UserWarning")
@each_loss
def test_vmap_over_masks_equals_a_loop(member: Member) -> None:
    inputs = tuple(x.detach() for x in inputs_of(member, (2, 3, 3, 2)))
    valid = torch.stack([VALID, ~VALID, torch.zeros_like(VALID)])
    loss = member.make()

    def masked(v: Tensor) -> Tensor:
        return loss(*inputs, valid=v)

    assert_close(torch.func.vmap(masked)(valid), torch.stack([masked(v) for v in valid]))


@pytest.mark.parametrize("member", IMAGE_WISE, ids=repr)
def test_vmap_over_labels_equals_a_loop(member: Member) -> None:
    inputs = tuple(x.detach() for x in inputs_of(member, (2, 3, 3, 2)))
    labels = torch.stack([random_labels((2, 3, 3, 2), seed=seed) for seed in range(3)])
    loss = member.make()

    def counted(y: Tensor) -> Tensor:
        return loss(*inputs, labels=y)

    assert_close(torch.func.vmap(counted)(labels), torch.stack([counted(y) for y in labels]))


def test_vmap_of_cross_entropy_equals_a_loop() -> None:
    logits = random_logits((3, 2, 4, 5, 6))
    labels = torch.stack([random_labels((2, 4, 5, 6), seed=seed) for seed in range(3)])
    gradient_of = torch.func.grad(functional.cross_entropy)
    expected = torch.stack([gradient_of(z, y) for z, y in zip(logits, labels, strict=True)])
    assert_close(torch.func.vmap(gradient_of)(logits, labels), expected)


# --------------------------------------------------------------------------------------------
# Compilation and export
# --------------------------------------------------------------------------------------------


@each_slow_member
@each_size
def test_compile_takes_the_whole_graph(member: Member, size: tuple[int, int] | None) -> None:
    torch._dynamo.reset()
    loss = partial(member.make(), size=size)
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    inputs = inputs_of(member)
    value, gradients = value_and_gradient(compiled, inputs)
    expected, expected_gradients = value_and_gradient(loss, inputs)
    assert_close(value, expected)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        assert_close(gradient, expected_gradient)


def test_compile_takes_every_call_option_and_dynamic_shapes() -> None:
    torch._dynamo.reset()
    loss = loss_named("iw_max_square").make(reduction="none")

    def call(logits: Tensor, valid: Tensor, labels: Tensor) -> Tensor:
        return loss(logits, valid=valid, labels=labels)

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True, dynamic=True)
    for shape in ((2, 4, 5, 6), (3, 4, 7, 5)):
        logits, labels = random_logits(shape), random_labels(shape)
        assert_close(compiled(logits, labels != 2, labels), call(logits, labels != 2, labels))


def test_compile_takes_cross_entropy() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(functional.cross_entropy, backend="aot_eager", fullgraph=True)
    logits, labels = random_logits((2, 4, 5, 6)), random_labels((2, 4, 9, 11))
    expected = functional.cross_entropy(logits, labels, size=(9, 11))
    assert_close(compiled(logits, labels, size=(9, 11)), expected)


class Called(nn.Module):
    """A loss with its call options, as a module: what torch.export takes."""

    def __init__(self, loss: nn.Module, size: tuple[int, int] | None) -> None:
        super().__init__()
        self.loss = loss
        self.size = size

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.loss(*inputs, size=self.size)


@each_slow_member
@each_size
def test_export_keeps_the_value(member: Member, size: tuple[int, int] | None) -> None:
    called = Called(member.make(), size)
    inputs = tuple(x.detach() for x in inputs_of(member))
    exported = torch.export.export(called, inputs).module()
    other = tuple(x.detach() for x in inputs_of(member, seed=9))
    assert_close(exported(*other), called(*other))


@each_slow_member
@each_size
def test_export_takes_batches_of_any_size(member: Member, size: tuple[int, int] | None) -> None:
    called = Called(member.make(), size)
    inputs = tuple(x.detach() for x in inputs_of(member, (3, 4, 5, 6)))
    batch = torch.export.Dim("batch")
    dynamic = {"inputs": tuple({0: batch} for _ in inputs)}
    exported = torch.export.export(called, inputs, dynamic_shapes=dynamic).module()
    other = tuple(x.detach() for x in inputs_of(member, (2, 4, 5, 6), seed=9))
    assert_close(exported(*other), called(*other))


# --------------------------------------------------------------------------------------------
# Mixed precision, devices, synchronisation
# --------------------------------------------------------------------------------------------


@each_loss
@each_size
def test_autocast_does_not_lower_the_precision_of_the_loss(
    member: Member, size: tuple[int, int] | None
) -> None:
    inputs = inputs_of(member, (2, 4, 5, 6), dtype=torch.float32)
    loss = partial(member.make(), size=size)
    expected, expected_gradients = value_and_gradient(loss, inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value, gradients = value_and_gradient(loss, inputs)
    assert value.dtype == torch.float32
    assert_close(value, expected, torch.float32)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        assert_close(gradient, expected_gradient, torch.float32)


def test_a_network_trains_under_autocast() -> None:
    network = nn.Conv2d(3, 4, 1)
    images = random_logits((2, 3, 5, 6)).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = network(images)
        loss = loss_named("iw_max_square").make()(logits, size=(9, 11))
    assert logits.dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    loss.backward()
    assert network.weight.grad.isfinite().all()
    assert network.weight.grad.any()


@each_loss
@each_size
def test_no_value_is_read_back_from_the_device(
    member: Member, size: tuple[int, int] | None
) -> None:
    # A meta tensor has no values: reading one, or a shape that depends on one, raises.
    inputs = tuple(x.detach().to("meta").requires_grad_() for x in inputs_of(member))
    shape = (2, *(size or (5, 6)))
    call = {"size": size, "valid": torch.ones(shape, dtype=torch.bool, device="meta")}
    if member.image_wise:
        call["labels"] = torch.zeros(shape, dtype=torch.int64, device="meta")
    for reduction in ("mean", "none"):
        loss = member.make(reduction=reduction)(*inputs, **call)
        assert loss.shape == (shape if reduction == "none" else ())
        loss.sum().backward()
        assert inputs[-1].grad.shape == inputs[-1].shape


def test_cross_entropy_and_the_maps_read_no_value_back() -> None:
    logits = torch.zeros(2, 4, 5, 6, device="meta")
    labels = torch.zeros(2, 9, 11, dtype=torch.int64, device="meta")
    assert functional.cross_entropy(logits, labels, size=(9, 11)).shape == ()
    assert functional.image_weights(logits, size=(9, 11), labels=labels).shape == (2, 9, 11)
    assert functional.guidance_labels(logits, logits, size=(9, 11)).shape == (2, 9, 11)


@needs_cuda
@each_loss
@each_size
def test_a_cuda_device_is_never_waited_for(member: Member, size: tuple[int, int] | None) -> None:
    inputs = tuple(x.detach() for x in inputs_of(member, dtype=torch.float32))
    on_cuda = tuple(x.cuda() for x in inputs)
    loss = partial(member.make(), size=size)
    value_and_gradient(loss, on_cuda)  # kernels are compiled and loaded once
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        value, gradients = value_and_gradient(loss, on_cuda)
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    expected, expected_gradients = value_and_gradient(loss, inputs)
    assert_close(value.cpu(), expected, torch.float32)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        assert_close(gradient.cpu(), expected_gradient, torch.float32)


@needs_cuda
@each_loss
@each_size
def test_a_cuda_graph_captures_value_and_gradient(
    member: Member, size: tuple[int, int] | None
) -> None:
    inputs = tuple(x.detach().cuda() for x in inputs_of(member, dtype=torch.float32))
    loss = partial(member.make(), size=size)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        value_and_gradient(loss, inputs)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        value, gradients = value_and_gradient(loss, inputs)
    for x in inputs:
        x.copy_(x.flip(1))
    graph.replay()
    expected, expected_gradients = value_and_gradient(loss, inputs)
    assert torch.equal(value, expected)
    assert torch.equal(gradients[-1], expected_gradients[-1])


@pytest.mark.parametrize("member", TWO_HEADS, ids=repr)
def test_low_heads_in_a_list_survive_compilation(member: Member) -> None:
    torch._dynamo.reset()
    logits, low_logits = inputs_of(member)
    loss = member.make()
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    heads = [low_logits, low_logits.detach().flip(1)]
    assert_close(compiled(logits, heads), loss(logits, heads))
