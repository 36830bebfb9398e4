"""The two operators run wherever a loss is called, and all their derivatives are right."""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType, ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from support import (
    LAYOUTS,
    LOSSES,
    Member,
    assert_close,
    inputs_of,
    largest,
    lay_out,
    loss_named,
    oracle,
    random_labels,
    random_logits,
    random_valid,
    value_and_gradient,
)
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch.autograd import gradcheck, gradgradcheck
from torch.profiler import ProfilerActivity, profile

from maxsquare import (
    InformationMaximizationLoss,
    IWMaxSquareLoss,
    MaxSquareLoss,
    MultiLevelLoss,
    functional,
)
from maxsquare.engine import operators, plain
from maxsquare.potentials import POWER_FROM_Q, CrossEntropy, Tsallis, numbers_of

OPERATORS = torch.ops.maxsquare
LIBRARY = Path(plain.__file__).parents[1]
each_loss = pytest.mark.parametrize("member", LOSSES, ids=repr)
each_size = pytest.mark.parametrize("size", [None, (7, 9)], ids=["as is", "upsampled"])
# What a compiler or a transform has to get through: no class, counts, indices, and two heads.
KINDS = [loss_named(name) for name in ("tsallis[1.5]", "iw_max_square", "pseudo_label")]
KINDS.append(loss_named("iw_multi_level"))
each_kind = pytest.mark.parametrize("member", KINDS, ids=repr)


Calls = list[tuple[Any, ...]]
# What PyTorch says of itself when it first takes a derivative in forward mode.
forward_mode = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:FutureWarning")
# What gradcheck of PyTorch 2.6 says of itself.
batched = pytest.mark.filterwarnings("ignore:Please use .torch.vmap. instead:FutureWarning")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """What the kernels are called for: "classify", or "sum" and whether with its slope."""
    kernels_for, noted = operators.kernels_for, []

    def noting(kernel: Callable[..., Any], note: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            noted.append(note(arguments))
            return kernel(*arguments)

        return call

    def recording(z: Tensor) -> Any:
        kernels: ModuleType = kernels_for(z) or plain
        return SimpleNamespace(
            classify=noting(kernels.classify, lambda arguments: ("classify",)),
            weighted_sum=noting(kernels.weighted_sum, lambda arguments: ("sum", arguments[-1])),
            weighted_parts=noting(kernels.weighted_parts, lambda arguments: ("sum", arguments[-1])),
        )

    monkeypatch.setattr(operators, "kernels_for", recording)
    return noted


def loss_of(member: Member, size: tuple[int, int] | None = None, **options: Any) -> Any:
    return functools.partial(member.make(**options), size=size)


# What is called


@each_loss
@each_size
def test_every_loss_is_classifications_and_weighted_sums(
    member: Member, size: tuple[int, int] | None, calls: Calls
) -> None:
    inputs = inputs_of(member, (2, 4, 5, 6))
    value = loss_of(member, size)(*inputs)
    own = member.formula is not None
    classified = int(own and (member.image_wise or not member.has_scale)) + (member.heads == 2)
    sums = own + (member.heads == 2)
    assert calls.count(("classify",)) == classified
    # An upsampled slope comes with the value, another one is left to the backward pass.
    assert calls.count(("sum", size is not None)) == sums == len(calls) - classified
    calls.clear()
    torch.autograd.grad(value, inputs[0 if own else 1 :])
    assert calls == ([("sum", True)] * sums if size is None else [])


def test_a_call_of_a_loss_takes_few_frames() -> None:
    """They are most of the time of a small call, and what a reader has to follow."""
    loss, z = MaxSquareLoss(), random_logits((1, 2, 16, 32)).float().requires_grad_()
    frames: list[str] = []

    def count(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and Path(frame.f_code.co_filename).is_relative_to(LIBRARY):
            frames.append(frame.f_code.co_name)

    loss(z, size=(32, 64))  # finds the kernels
    sys.setprofile(count)
    try:
        loss(z, size=(32, 64))
    finally:
        sys.setprofile(None)
    assert 0 < len(frames) <= 30, frames


@each_size
def test_no_slope_is_computed_where_no_gradient_is_wanted(
    size: tuple[int, int] | None, calls: Calls
) -> None:
    z = random_logits((1, 3, 4, 5)).requires_grad_()
    loss = IWMaxSquareLoss()
    loss(z.detach(), size=size)
    with torch.no_grad():
        loss(z, size=size)
    with torch.inference_mode():
        loss(z, size=size)
    assert calls == [("classify",), ("sum", False)] * 3


@each_loss
@each_size
def test_the_plain_formula_computes_where_a_device_has_no_kernels(
    member: Member, size: tuple[int, int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = inputs_of(member)
    expected, slopes = value_and_gradient(loss_of(member, size), inputs)
    monkeypatch.setattr(operators, "kernels_for", lambda z: None)
    value, plain_slopes = value_and_gradient(loss_of(member, size), inputs)
    assert_close(value, expected)
    for ours, slope in zip(plain_slopes, slopes, strict=True):
        assert_close(ours, slope)


def test_without_kernels_each_head_is_upsampled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    heads = [random_logits((2, 3, 4, 5), seed=seed) for seed in range(3)]
    call: Any = {"size": (8, 10), "valid": random_valid((2, 8, 10))}
    multi_level = MultiLevelLoss(InformationMaximizationLoss(IWMaxSquareLoss()))
    expected = multi_level(heads[0], heads[1:], **call)
    monkeypatch.setattr(operators, "kernels_for", lambda z: None)
    made: list[Tensor] = []
    interpolate = plain.F.interpolate

    def noted(z: Tensor, *arguments: Any, **options: Any) -> Tensor:
        made.append(z)
        return interpolate(z, *arguments, **options)

    monkeypatch.setattr(plain.F, "interpolate", noted)
    assert_close(multi_level(heads[0], heads[1:], **call), expected)
    assert len(made) == 3
    # Their terms say what is wrong with their input, in the same words as ever.
    with pytest.raises(TypeError, match="low_logits must be torch.float64"):
        multi_level(heads[0], heads[1].float(), **call)
    with pytest.raises(TypeError, match="low_logits must be a tensor or a list of tensors"):
        multi_level(heads[0], None, **call)


@each_loss
@each_size
def test_a_device_without_numbers_gives_shapes(
    member: Member, size: tuple[int, int] | None
) -> None:
    for dtype in (torch.float64, torch.bfloat16):
        inputs = tuple(x.detach().to("meta", dtype) for x in inputs_of(member))
        value, slopes = value_and_gradient(loss_of(member, size), inputs)
        assert (value.device.type, value.shape) == ("meta", ())
        assert value.dtype == plain.accumulation_dtype(dtype)
        assert all(
            (s.shape, s.dtype) == (x.shape, dtype) for s, x in zip(slopes, inputs, strict=True)
        )


def test_gpu_kernels_that_do_not_work_give_one_warning_and_the_plain_formula(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(name: str) -> Any:
        raise ImportError(f"no {name}")

    monkeypatch.setattr(operators.importlib, "import_module", fail)
    monkeypatch.setattr(operators, "_CHECKED_KERNELS", {})
    device = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    with pytest.warns(UserWarning, match=r"slowly on cuda:0.*no maxsquare\.engine\.cuda"):
        assert operators.cuda_kernels(device) is None
    # Once is enough.
    assert operators.cuda_kernels(device) is None


def test_a_failure_that_is_not_of_the_gpu_kernels_is_raised_and_the_check_repeated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    failures = iter([torch.OutOfMemoryError("no memory"), OSError("disk full")])

    class Kernels:
        @staticmethod
        def check(device: torch.device) -> None:
            for failure in failures:
                raise failure

    monkeypatch.setattr(operators.importlib, "import_module", lambda name: Kernels)
    monkeypatch.setattr(operators, "_CHECKED_KERNELS", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    device = torch.device("cuda", 0)
    with pytest.raises(torch.OutOfMemoryError, match="no memory"):
        operators.cuda_kernels(device)
    with pytest.raises(OSError, match="disk full"):
        operators.cuda_kernels(device)
    assert operators.cuda_kernels(device) is Kernels


def test_the_gpu_kernels_are_checked_outside_of_inference_mode(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a GPU the gradient of the plain formula, their judge, is wrong within it."""
    modes = []

    class Kernels:
        @staticmethod
        def check(device: torch.device) -> None:
            modes.append(torch.is_inference_mode_enabled())

    monkeypatch.setattr(operators.importlib, "import_module", lambda name: Kernels)
    monkeypatch.setattr(operators, "_CHECKED_KERNELS", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    with torch.inference_mode():
        assert operators.cuda_kernels(torch.device("cuda", 0)) is Kernels
    assert modes == [False]


def test_a_graph_cannot_capture_a_loss_before_its_first_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(operators, "_CHECKED_KERNELS", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="call the loss once before the capture"):
        operators.cuda_kernels(torch.device("cuda", 0))
    # Nothing is settled for later.
    assert operators._CHECKED_KERNELS == {}


class Carrier(Tensor):
    """A tensor that carries more than numbers."""


class Wrapper(Tensor):
    """A tensor that is no memory but has its operations done by another one."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> Wrapper:
        return Tensor._make_wrapper_subclass(
            cls, inner.shape, dtype=inner.dtype, requires_grad=inner.requires_grad
        )

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner.detach()

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        unwrap = functools.partial(
            torch.utils._pytree.tree_map_only, Wrapper, lambda wrapper: wrapper.inner
        )
        out = func(*unwrap(args), **unwrap(kwargs or {}))
        return torch.utils._pytree.tree_map_only(Tensor, Wrapper, out)


@each_kind
@each_size
def test_a_tensor_that_carries_more_is_computed_as_any_other(
    member: Member, size: tuple[int, int] | None, calls: Calls
) -> None:
    inputs = inputs_of(member)
    expected, slopes = value_and_gradient(loss_of(member, size), inputs)
    usual, _ = list(calls), calls.clear()
    carriers = tuple(x.detach().as_subclass(Carrier) for x in inputs)
    value, carried = value_and_gradient(loss_of(member, size), carriers)
    assert calls == usual
    assert torch.equal(value, expected)
    assert all(map(torch.equal, carried, slopes))
    assert loss_of(member, size)(*map(nn.Parameter, inputs)) == expected


@each_kind
@each_size
def test_a_tensor_that_dispatches_by_itself_takes_the_plain_formula(
    member: Member, size: tuple[int, int] | None, calls: Calls
) -> None:
    inputs = inputs_of(member)
    expected = loss_of(member, size)(*inputs)
    calls.clear()
    value = loss_of(member, size)(*map(Wrapper, inputs))
    assert not calls
    assert isinstance(value, Wrapper)
    assert_close(value.inner, expected.detach())


# Derivatives


@forward_mode
@batched
@each_loss
@each_size
def test_gradcheck(member: Member, size: tuple[int, int] | None) -> None:
    inputs = inputs_of(member, (2, 3, 3, 4))
    # Forward mode, and batches of upstream gradients, too.
    assert gradcheck(loss_of(member, size), inputs, check_forward_ad=True, check_batched_grad=True)


@batched
@each_loss
@each_size
def test_gradgradcheck(member: Member, size: tuple[int, int] | None) -> None:
    inputs = inputs_of(member, (2, 3, 2, 3))
    # The final head has no part in a guidance's second derivatives, nor they in it.
    learning = inputs[-1:] if member.formula is None else inputs
    fixed = tuple(x.detach() for x in inputs[: len(inputs) - len(learning)])
    loss = loss_of(member, size)
    assert gradgradcheck(lambda *heads: loss(*fixed, *heads), learning, check_batched_grad=True)


@forward_mode
@each_size
@pytest.mark.parametrize("q", [0.5, 1, 1.2, POWER_FROM_Q, 2, 3])
def test_second_derivatives_are_those_of_the_formula(
    q: float, size: tuple[int, int] | None
) -> None:
    z = random_logits((2, 3, 2, 3))
    formula = LOSSES[0].formula.__class__(q=q)
    member = Member("", None, None, formula)
    ours = functools.partial(functional.tsallis_entropy, q=q, size=size)
    theirs = lambda z: oracle(member, (z,), size=size)  # noqa: E731
    exact = torch.autograd.functional.hessian(theirs, z)
    assert_close(torch.autograd.functional.hessian(ours, z), exact)
    for transformed in (
        torch.func.hessian(ours),
        torch.func.jacrev(torch.func.jacrev(ours)),
        torch.func.jacfwd(torch.func.jacrev(ours)),
    ):
        assert_close(transformed(z), exact)


@forward_mode
@each_loss
@each_size
def test_transformed_gradients_are_those_of_backward(
    member: Member, size: tuple[int, int] | None, calls: Calls
) -> None:
    inputs = tuple(x.detach() for x in inputs_of(member))
    loss = loss_of(member, size)
    _, expected = value_and_gradient(loss, inputs)
    calls.clear()
    which = tuple(range(len(inputs)))
    for transform in (torch.func.grad, torch.func.jacrev, torch.func.jacfwd):
        for ours, slope in zip(transform(loss, which)(*inputs), expected, strict=True):
            assert_close(ours, slope)
        assert ("sum", True) in calls
        calls.clear()


@each_loss
@each_size
@pytest.mark.parametrize("in_dim", [0, 1, -1])
def test_mapping_over_a_dimension_is_a_loop_over_it(
    member: Member, size: tuple[int, int] | None, in_dim: int, calls: Calls
) -> None:
    loss = loss_of(member, size)
    one_by_one = [
        tuple(x.detach() for x in inputs_of(member, (2, 3, 4, 5), seed=10 * i)) for i in range(3)
    ]
    mapped = tuple(torch.stack(heads, in_dim) for heads in zip(*one_by_one, strict=True))
    expected = [value_and_gradient(loss, inputs) for inputs in one_by_one]
    each = list(calls)[: len(calls) // 3]
    calls.clear()
    value_and_slope = torch.func.grad_and_value(loss, tuple(range(member.heads)))
    slopes, values = torch.func.vmap(value_and_slope, in_dims=in_dim)(*mapped)
    # One call does the work of all of them.
    assert len(calls) == len(each)
    assert_close(torch.func.vmap(loss, in_dims=in_dim)(*mapped), values)
    for i, (value, gradients) in enumerate(expected):
        assert_close(values[i], value)
        for slope, gradient in zip(slopes, gradients, strict=True):
            assert_close(slope[i], gradient)


@each_size
def test_mapping_over_maps_and_over_one_of_several_arguments(
    size: tuple[int, int] | None,
) -> None:
    shape = (2, 3, 4, 5)
    pixels = (*shape[:2], *(size or shape[2:]))
    z = random_logits(shape)
    many = torch.stack([random_logits(shape, seed=i) for i in range(3)])
    valid = torch.stack([random_valid((2, *pixels[2:]), seed=i) for i in range(3)])
    labels = torch.stack([random_labels(pixels, seed=i) for i in range(3)])

    def loss(z: Tensor, valid: Tensor, labels: Tensor) -> Tensor:
        counted = functional.max_square(z, ratio=0.4, size=size, valid=valid, labels=labels)
        return counted + functional.cross_entropy(z, labels, size=size, valid=valid)

    for arguments, in_dims in (
        ((many, valid, labels), (0, 0, 0)),
        ((many, valid[0], labels[0]), (0, None, None)),
        ((z, valid, labels[0]), (None, 0, None)),
        ((z, valid[0], labels), (None, None, 0)),
        ((many, valid.movedim(0, 2), labels), (0, 2, 0)),
    ):
        slopes, values = torch.func.vmap(torch.func.grad_and_value(loss), in_dims)(*arguments)
        for i in range(3):
            one = [
                a if dim is None else a.select(dim, i)
                for a, dim in zip(arguments, in_dims, strict=True)
            ]
            value, (slope,) = value_and_gradient(lambda z, one=one: loss(z, *one[1:]), (one[0],))
            assert_close(values[i], value)
            assert_close(slopes[i], slope)


@each_size
def test_a_map_within_a_map(size: tuple[int, int] | None) -> None:
    z = random_logits((2, 3, 1, 4, 3, 5))
    loss = functools.partial(IWMaxSquareLoss(), size=size)
    values = torch.func.vmap(torch.func.vmap(loss))(z)
    expected = torch.stack([torch.stack([loss(one) for one in row]) for row in z])
    assert_close(values, expected)


@forward_mode
@each_size
def test_second_derivatives_of_a_mapped_loss(size: tuple[int, int] | None) -> None:
    z = torch.stack([random_logits((1, 3, 2, 3), seed=i) for i in range(2)])
    loss = functools.partial(IWMaxSquareLoss(), size=size)
    hessians = torch.func.vmap(torch.func.hessian(loss))(z)
    for one, expected in zip(hessians, z, strict=True):
        assert_close(one, torch.autograd.functional.hessian(loss, expected))


# Registration


@pytest.mark.parametrize(
    ("layout", "binary", "dtype"),
    [("contiguous", False, torch.float32), ("channels_last", True, torch.float16)],
    ids=["usual", "unusual"],
)
def test_the_operators_are_registered_as_they_behave(
    layout: str, binary: bool, dtype: torch.dtype
) -> None:
    channels = 1 if binary else 3
    z, guide = (
        lay_out(random_logits((2, channels, 4, 5), seed=i).to(dtype), layout) for i in range(2)
    )
    for size in ((None, None), (7, 9)):
        pixels = (2, *(z.shape[2:] if size[0] is None else size))
        valid = random_valid(pixels)
        labels = random_labels((2, 2, *pixels[1:]))
        how = (*size, False, binary)
        for tensors, threshold in (
            ((z, None, None, None), None),
            ((z, guide, None, valid), 0.6),
            ((z, None, labels, valid), None),
        ):
            torch.library.opcheck(OPERATORS.classify.default, (*tensors, *how, threshold, 1))
        y, _ = OPERATORS.classify(z, None, None, None, *how, None, -1)
        weights = torch.rand(2, 2 if binary else 3)
        for potential in (CrossEntropy(), Tsallis(2)):
            for needs_grad in (False, True):
                options = (*how, *numbers_of(potential), needs_grad)
                arguments = (z, weights, y, valid, *options)
                torch.library.opcheck(OPERATORS.weighted_sum.default, arguments)
    slope = z.to(plain.accumulation_dtype(dtype))
    torch.library.opcheck(OPERATORS.scale_grad.default, (slope, torch.rand(2), z))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_scaled_slope_is_rounded_once(dtype: torch.dtype, layout: str) -> None:
    slope = lay_out(random_logits((3, 4, 5, 6)).float(), layout)
    factors = torch.tensor([1e-7, -1, 3e4])
    expected = (slope * factors.view(-1, 1, 1, 1)).to(dtype)
    assert torch.equal(OPERATORS.scale_grad(slope, factors, slope.to(dtype)), expected)


@pytest.mark.parametrize("classes", [127, 128])
def test_the_dtype_of_a_class_map_is_known_beforehand(classes: int) -> None:
    z = torch.zeros(1, classes, 2, 3)
    arguments = (None, None, None, None, None, False, False, None, -1)
    y, _ = OPERATORS.classify(z, *arguments)
    shapes, _ = OPERATORS.classify(z.to("meta"), *arguments)
    assert (y.dtype, y.shape) == (shapes.dtype, shapes.shape)


# Compilers


class Recording:
    """A backend that runs graphs as they are, and keeps them: forward, then backward."""

    def __init__(self) -> None:
        self.graphs: list[torch.fx.GraphModule] = []
        self.compile = aot_autograd(fw_compiler=self.keep, bw_compiler=self.keep)

    def __call__(self, *arguments: Any) -> Any:
        return self.compile(*arguments)

    def keep(self, graph: torch.fx.GraphModule, _: Any) -> Any:
        self.graphs.append(graph)
        return make_boxed_func(graph.forward)


def targets(graph: torch.fx.GraphModule) -> list[str]:
    return [str(node.target) for node in graph.graph.nodes]


def largest_tensor(graph: torch.fx.GraphModule) -> int:
    """Elements of the largest tensor that a graph computes; inputs are not its own."""
    values = [node.meta.get("val") for node in graph.graph.nodes if node.op == "call_function"]
    return max(value.numel() for value in values if isinstance(value, Tensor))


@each_kind
def test_compiled_losses_call_the_operators_and_make_no_upsampled_logits(
    member: Member, calls: Calls
) -> None:
    torch._dynamo.reset()
    size = (30, 40)
    inputs = inputs_of(member, (2, 5, 4, 6), dtype=torch.float32)
    expected, slopes = value_and_gradient(loss_of(member, size), inputs)
    eager = list(calls)
    calls.clear()
    backend = Recording()
    loss = torch.compile(loss_of(member, size), fullgraph=True, dynamic=False, backend=backend)
    value, compiled_slopes = value_and_gradient(loss, inputs)
    # The same numbers from the same calls.
    assert calls == eager
    assert torch.equal(value, expected)
    assert all(map(torch.equal, compiled_slopes, slopes))
    forward, backward = backend.graphs
    operators_called = [target for target in targets(forward) if "maxsquare" in target]
    assert len(operators_called) == len(eager)
    # Nothing but a class of every pixel is as large as the result; logits would be C times it.
    assert largest_tensor(forward) <= 2 * 30 * 40
    assert largest_tensor(backward) <= 2 * 5 * 4 * 6


@each_kind
@pytest.mark.parametrize("upsampled", [False, True], ids=["as is", "upsampled"])
def test_one_compilation_serves_all_shapes(member: Member, upsampled: bool, calls: Calls) -> None:
    torch._dynamo.reset()
    backend = Recording()
    module = member.make()
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=backend)
    for shape, size in (((2, 5, 4, 6), (9, 8)), ((3, 7, 5, 9), (11, 30)), ((4, 3, 8, 7), (20, 9))):
        how = {"size": size if upsampled else None}
        inputs = inputs_of(member, shape, dtype=torch.float32)
        expected, slopes = value_and_gradient(functools.partial(module, **how), inputs)
        eager = list(calls)
        calls.clear()
        value, compiled_slopes = value_and_gradient(functools.partial(compiled, **how), inputs)
        assert calls == eager
        calls.clear()
        assert_close(value, expected, torch.float32)
        for ours, slope in zip(compiled_slopes, slopes, strict=True):
            assert_close(ours, slope, torch.float32)
    # One of either pass.
    assert len(backend.graphs) == 2
    assert any("maxsquare.weighted_sum" in target for target in targets(backend.graphs[0]))


@each_kind
@pytest.mark.parametrize("strict", [False, True], ids=["traced", "read"])
def test_exported_losses_hold_the_operators(member: Member, strict: bool, calls: Calls) -> None:
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.loss = member.make()

        def forward(self, *heads: Tensor) -> Tensor:
            return self.loss(*heads, size=(30, 40))

    inputs = tuple(x.detach() for x in inputs_of(member, (2, 5, 4, 6), dtype=torch.float32))
    images = torch.export.Dim("images")
    program = torch.export.export(
        Head(), inputs, dynamic_shapes=(tuple({0: images} for _ in inputs),), strict=strict
    )
    program = program.run_decompositions()
    assert any("maxsquare.weighted_sum" in target for target in targets(program.graph_module))
    assert not any("upsample" in target for target in targets(program.graph_module))
    calls.clear()
    more = tuple(x.detach() for x in inputs_of(member, (3, 5, 4, 6), dtype=torch.float32))
    assert torch.equal(program.module()(*more), loss_of(member, (30, 40))(*more))
    half = len(calls) // 2
    assert half and calls[:half] == calls[half:]


@each_kind
def test_exported_losses_can_be_learnt_from(member: Member, calls: Calls) -> None:
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.loss = member.make()

        def forward(self, *heads: Tensor) -> Tensor:
            return self.loss(*heads, size=(30, 40)) + self.loss(*heads)

    inputs = inputs_of(member, (2, 5, 4, 6))
    exported = torch.export.export(Head(), inputs).module()
    expected, slopes = value_and_gradient(Head(), inputs)
    calls.clear()
    value, gradients = value_and_gradient(exported, inputs)
    assert torch.equal(value, expected)
    for gradient, slope in zip(gradients, slopes, strict=True):
        assert_close(gradient, slope)
    assert ("sum", True) in calls


@each_kind
@each_size
def test_losses_without_gradient_compile(
    member: Member, size: tuple[int, int] | None, calls: Calls
) -> None:
    torch._dynamo.reset()
    inputs = inputs_of(member, (2, 5, 4, 6))
    expected = loss_of(member, size)(*inputs).detach()
    for context, leaves in (
        (torch.no_grad(), inputs),
        (torch.enable_grad(), tuple(x.detach() for x in inputs)),
    ):
        calls.clear()
        with context:
            loss = torch.compile(loss_of(member, size), fullgraph=True, backend=Recording())
            assert torch.equal(loss(*leaves), expected)
        assert ("sum", False) in calls and ("sum", True) not in calls


@each_size
def test_second_derivatives_of_what_is_compiled_are_refused(size: tuple[int, int] | None) -> None:
    """As PyTorch refuses those of all that it compiles: never are they silently 0."""
    torch._dynamo.reset()
    z = random_logits((1, 3, 4, 5)).requires_grad_()
    loss = torch.compile(functools.partial(MaxSquareLoss(), size=size), backend=Recording())
    (gradient,) = torch.autograd.grad(loss(z), z, create_graph=True)
    with pytest.raises(RuntimeError, match="does not currently support double backward"):
        torch.autograd.grad(gradient.square().sum() + z.sum(), z)


@each_size
def test_transforms_within_what_is_compiled_are_right(size: tuple[int, int] | None) -> None:
    torch._dynamo.reset()
    loss = functools.partial(IWMaxSquareLoss(), size=size)
    z = random_logits((2, 1, 3, 4, 5))
    gradient = torch.func.grad(loss)
    for transformed, logits in ((gradient, z[0]), (torch.func.vmap(gradient), z)):
        compiled = torch.compile(transformed, fullgraph=True, backend=Recording())
        assert_close(compiled(logits), transformed(logits))


def allocated(run: Callable[[], Any]) -> list[int]:
    """Bytes of every tensor for which memory is taken."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    sizes = [
        event.nbytes()
        for event in profiler.profiler.kineto_results.events()
        if event.name() == "[memory]"
    ]
    return [size for size in sizes if size > 0]


# What the compiler of PyTorch 2.6 says of its own cache.
@pytest.mark.filterwarnings("ignore:Skipping serialization of skipfiles_inline:UserWarning")
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_upsampled_losses_take_far_less_memory_than_their_logits(
    compiled: bool, calls: Calls
) -> None:
    torch._dynamo.reset()
    member = loss_named("iw_multi_level")
    size = (512, 1024)
    loss = loss_of(member, size)
    loss = torch.compile(loss, fullgraph=True) if compiled else loss
    inputs = inputs_of(member, (1, 19, 33, 65), dtype=torch.float32)

    def run() -> None:
        torch.autograd.grad(loss(*inputs), inputs)

    run()
    calls.clear()
    sizes = allocated(run)
    assert calls == [("classify",), ("sum", True)] * 2
    full_resolution = 4 * 19 * size[0] * size[1]
    # Two maps of classes in a byte a pixel each are the largest.
    assert sizes and max(sizes) < 0.02 * full_resolution
    assert sum(sizes) < 0.06 * full_resolution


# Around the losses


@each_size
def test_hooks_see_what_they_ask_for(size: tuple[int, int] | None) -> None:
    leaf = random_logits((1, 3, 4, 5)).requires_grad_()
    # As a network makes them: of a leaf that any custom function keeps, PyTorch 2.6 forgets hooks.
    z = leaf * 1
    loss = IWMaxSquareLoss()
    (expected,) = torch.autograd.grad(loss(z, size=size), z)
    packed: list[Tensor] = []

    def pack(tensor: Tensor) -> int:
        packed.append(tensor.clone())
        return len(packed) - 1

    # As activations are kept elsewhere between the passes.
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda index: packed[index]):
        value = loss(z, size=size)
    assert packed
    z.register_hook(lambda gradient: 3 * gradient)
    value.backward()
    assert_close(leaf.grad, 3 * expected)


@each_size
def test_a_checkpoint_computes_the_loss_again(size: tuple[int, int] | None, calls: Calls) -> None:
    z = random_logits((1, 3, 4, 5)).requires_grad_()
    loss = functools.partial(IWMaxSquareLoss(), size=size)
    (expected,) = torch.autograd.grad(loss(z), z)
    calls.clear()
    value = torch.utils.checkpoint.checkpoint(loss, z, use_reentrant=False)
    (gradient,) = torch.autograd.grad(value, z)
    assert torch.equal(gradient, expected)
    assert calls.count(("classify",)) == 2


@each_size
def test_autocast_changes_nothing(size: tuple[int, int] | None) -> None:
    z = random_logits((1, 3, 4, 5)).float()
    loss = functools.partial(IWMaxSquareLoss(), size=size)
    expected, (slope,) = value_and_gradient(loss, (z,))
    with torch.autocast("cpu", torch.bfloat16):
        value, (gradient,) = value_and_gradient(loss, (z,))
    assert torch.equal(value, expected) and torch.equal(gradient, slope)


@each_size
def test_logits_of_inference_are_taken(size: tuple[int, int] | None) -> None:
    loss = functools.partial(IWMaxSquareLoss(), size=size)
    with torch.inference_mode():
        z = random_logits((1, 3, 4, 5))
        inside = loss(z)
    assert torch.equal(loss(z), inside)
    assert torch.equal(loss(z.clone().requires_grad_()).detach(), inside)


def test_logits_changed_between_the_passes_are_noticed() -> None:
    z = random_logits((1, 3, 4, 5)).requires_grad_()
    for loss in (MaxSquareLoss(), IWMaxSquareLoss()):
        leaf = z * 1
        value = loss(leaf)
        leaf += 1
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            value.backward()


@forward_mode
@each_loss
@each_size
def test_the_default_device_is_not_that_of_the_logits(
    member: Member, size: tuple[int, int] | None
) -> None:
    inputs = inputs_of(member)
    expected, slopes = value_and_gradient(loss_of(member, size), inputs)
    with torch.device("meta"):
        value, gradients = value_and_gradient(loss_of(member, size), inputs)
        gradient = torch.func.grad(loss_of(member, size), len(inputs) - 1)
        hessian = torch.func.jacfwd(gradient, len(inputs) - 1)
        assert hessian(*(x.detach() for x in inputs)).device == inputs[0].device
    assert torch.equal(value, expected)
    assert all(map(torch.equal, gradients, slopes))


@each_kind
def test_several_threads_at_once_get_what_one_gets(member: Member) -> None:
    shapes = [(1, 3, 40, 50), (2, 5, 30, 31), (1, 19, 7, 90), (3, 2, 20, 20)]
    heads = [inputs_of(member, shape, seed=i) for i, shape in enumerate(shapes)] * 2
    losses = [loss_of(member, size) for size in [None] * 4 + [(60, 70)] * 4]
    expected = list(map(value_and_gradient, losses, heads))
    start = threading.Barrier(8)

    def run(loss: Any, inputs: tuple[Tensor, ...]) -> Any:
        start.wait(60)
        return value_and_gradient(loss, inputs)

    with ThreadPoolExecutor(8) as pool:
        for (value, slopes), (single, single_slopes) in zip(
            pool.map(run, losses, heads), expected, strict=True
        ):
            assert torch.equal(value, single)
            assert all(map(torch.equal, slopes, single_slopes))


@each_size
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_gradients_have_dtype_and_layout_of_the_logits(
    dtype: torch.dtype, size: tuple[int, int] | None
) -> None:
    z = random_logits((2, 8, 6, 9)).to(dtype)
    for layout in ("contiguous", "channels_last"):
        _, (gradient,) = value_and_gradient(
            functools.partial(MaxSquareLoss(), size=size), (lay_out(z, layout),)
        )
        assert gradient.dtype == dtype
        if size is None:
            assert gradient.stride() == lay_out(z, layout).stride()


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


@pytest.mark.parametrize("size", [None, (60, 50)], ids=["as is", "upsampled"])
def test_a_weighted_bfloat16_gradient_is_rounded_once(size: tuple[int, int] | None) -> None:
    z = random_logits((1, 19, 32, 32)).bfloat16()
    gradients = []
    for leaf in (z.requires_grad_(), z.detach().double().requires_grad_()):
        (gradient,) = torch.autograd.grad(0.1 * MaxSquareLoss()(leaf, size=size), leaf)
        gradients.append(gradient.double())
    ours, exact = gradients
    # A rounding is half of eps; a little more for float32 arithmetic, where terms cancel.
    near = 0.51 * torch.finfo(torch.bfloat16).eps * exact.abs() + 1e-6 * largest(exact)
    assert ((ours - exact).abs() <= near).all()
