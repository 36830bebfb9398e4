"""What breaks the losses? Long searches and large tensors, for `pytest -m stress` alone.

Each path that may compute a loss is compared with float64 autograd of its printed formula: the
CPU kernels, the plain formula (what runs without a compiler), and the Triton kernels (on a GPU,
else by Triton's interpreter).
"""

from __future__ import annotations

import functools
import math
import sys
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from support import (
    HALF,
    KINDS,
    LOSSES,
    TOLERANCE,
    Batch,
    Member,
    accumulation_dtype,
    activate,
    as_images,
    assert_close,
    assert_within_budget,
    batches,
    class_counts,
    first_largest,
    image_weight,
    inputs_of,
    largest,
    log_probabilities,
    loss_named,
    map_as_images,
    options,
    oracle,
    random_labels,
    random_logits,
    resize,
    sides_of_labels,
    triton_kernels,
    two_sides,
    value_and_gradient,
)
from torch import Tensor

import maxsquare
from maxsquare import functional
from maxsquare.engine import cpu, libraries, operators

pytestmark = [
    pytest.mark.stress,
    # What numpy has to say of NaN and of infinities when it plays the GPU.
    pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning"),
    # Some of many logits look like probabilities by chance.
    pytest.mark.filterwarnings("ignore:.*probabilities:UserWarning"),
]

DTYPES = (torch.float64, torch.float32, *HALF)
# Pixels whose classes are further apart than this have the same class on every path.
DECIDED = 1e-5
# As the kernels do, where 0 times -inf would be NaN.
LOWEST_LOGIT = -1e30

each_loss = pytest.mark.parametrize("member", LOSSES, ids=repr)
Search = Callable[[Callable[[st.DataObject], None], float], None]


@pytest.fixture
def search(request: pytest.FixtureRequest, stress_budget: Callable[[float], float]) -> Search:
    """search(check, examples): so many examples of a check, other ones for every test."""

    def run(check: Callable[[st.DataObject], None], examples: float) -> None:
        chosen = settings(
            max_examples=int(stress_budget(examples)),
            suppress_health_check=list(HealthCheck),
        )
        chosen(seed(zlib.crc32(request.node.name.encode()))(given(st.data())(check)))()

    return run


PATHS = ("CPU kernels", "plain formula", "Triton kernels")


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each path that computes losses, for the length of a test."""
    take(request.param, monkeypatch)
    return request.param


def take(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = kernels_of(path)
    if kernels is None:
        pytest.skip(f"needs what the {path} need")
    monkeypatch.setattr(operators, "kernels_for", lambda z: kernels or None)


@functools.cache
def kernels_of(path: str) -> ModuleType | bool | None:
    """The module of a path; False: it has none; None: they do not work here."""
    if path == "plain formula":
        return False
    return (
        triton_kernels()
        if path == "Triton kernels"
        else cpu
        if any(libraries.compilers())
        else None
    )


def interpreted(path: str) -> bool:
    return path == "Triton kernels" and not torch.cuda.is_available()


def device_of(path: str) -> torch.device:
    return torch.device("cuda" if path == "Triton kernels" and torch.cuda.is_available() else "cpu")


# Against float64 ----------------------------------------------------------------------------------


def decided(
    member: Member, heads: tuple[Tensor, ...], batch: Batch, activation: str, from_logits: bool
) -> Tensor | None:
    """The mask of the batch without pixels whose class, or whether they count, is a rounding."""
    if member.smooth and not member.image_wise:
        return batch.valid
    full = [as_images(resize(x, batch.size, batch.align_corners)) for x in heads]
    channels = full[0].shape[1]
    if activation == "sigmoid":
        full = [two_sides(x, from_logits) for x in full]
    clear = torch.ones_like(full[0][:, 0], dtype=torch.bool)
    if member.image_wise and batch.size:
        first, second = full[0].topk(2, 1).values.unbind(1)
        clear &= first - second > DECIDED * (1 + first.abs())
    if not member.smooth:
        p = [log_probabilities(x, from_logits).exp() for x in full]
        for each in p:
            clear &= (each.amax(1) - member.threshold).abs() > DECIDED
        first, second = sum(p).topk(2, 1).values.unbind(1)
        clear &= first - second > DECIDED
    if activation == "sigmoid":
        clear = clear.unflatten(0, (-1, channels)).all(1)
    clear = clear.reshape(batch.labels.shape)
    if batch.valid is None:
        return None if clear.all() else clear
    return batch.valid & clear


def assert_as_good(
    actual: Tensor, exact: Tensor, plain: Callable[[], Tensor], dtype: torch.dtype, weight: float
) -> None:
    """Equal to float64 up to roundings of dtype, else no worse than the formula in dtype.

    A slope is a difference of terms up to 1 times the weight of a pixel: where it is 0 their
    roundings are left. Nor has dtype smaller numbers than its smallest one.
    """
    error = largest(actual.double() - exact)
    info, wide = torch.finfo(dtype), torch.finfo(accumulation_dtype(dtype))
    roundings = max(4 * wide.eps * weight, info.tiny * info.eps)
    if not error <= max(TOLERANCE[dtype] * largest(exact), roundings):
        assert_within_budget(actual, plain(), exact, dtype)


def assert_equals_float64(
    ours: Callable[..., Tensor],
    formula: Callable[..., Tensor],
    inputs: tuple[Tensor, ...],
    weight: float,
) -> None:
    """Value and gradient of a loss of these inputs, of which a pixel has up to this weight."""
    wide = tuple(x.detach().double().clamp_min(LOWEST_LOGIT) for x in inputs)
    exact = formula(*wide)
    upstream = torch.linspace(0.5, 2.0, exact.numel()).view(exact.shape).to(exact.device)
    results = value_and_gradient(ours, inputs, upstream)
    exacts = value_and_gradient(formula, wide, upstream)
    dtype = accumulation_dtype(inputs[0].dtype)

    def plain(which: int | None) -> Tensor:
        narrow = tuple(x.to(dtype) for x in wide)
        value, gradients = value_and_gradient(formula, narrow, upstream)
        return value if which is None else gradients[which]

    assert results[0].dtype == dtype and results[0].shape == exacts[0].shape
    assert_as_good(results[0], exacts[0], lambda: plain(None), dtype, weight)
    for i, x in enumerate(inputs):
        assert results[1][i].dtype == x.dtype and results[1][i].shape == x.shape
        assert_as_good(results[1][i], exacts[1][i], partial(plain, i), x.dtype, 2 * weight)


def weight_of(batch: Batch, reduction: str) -> float:
    """How much a pixel counts in a loss, times what interpolation adds to roundings."""
    pixels = batch.labels.numel() if batch.valid is None else int(batch.valid.sum())
    weight = 1 / max(pixels, 1) if reduction == "mean" else 1
    heads = [x.double().clamp_min(LOWEST_LOGIT) for x in batch[:2]]
    logits = max(largest(x.where(x > LOWEST_LOGIT, 0)) for x in heads)
    return weight * max(logits, 1) if batch.size else weight


def draw_batch(data: st.DataObject, path: str, activation: str, **how: Any) -> Batch:
    """Tiny for the interpreter, which takes a hundredth of a second for every program."""
    tiny = interpreted(path)
    classes = (2, 3, 5, 19, 130)
    batch = data.draw(
        batches(
            classes=classes if activation == "softmax" else (1, *classes[:-1]),
            longest=(12, 4, 3, 2) if tiny else (80, 150, 12, 5),
            largest_size=(4, 5) if tiny else (20, 80),
            **{"shortest": 0, "dtypes": DTYPES, "kinds": KINDS, **how},
        )
    )
    device = device_of(path)
    return Batch(*(x.to(device) if isinstance(x, Tensor) else x for x in batch))


@each_loss
def test_every_path_equals_float64_autograd_of_the_formula(
    member: Member, path: str, search: Search
) -> None:
    def check(data: st.DataObject) -> None:
        chosen = data.draw(options(member))
        if path == "Triton kernels":
            # The others are the plain formula's.
            chosen["from_logits"] = True
            chosen["reduction"] = "sum" if chosen["reduction"] == "none" else chosen["reduction"]
        activation, from_logits = chosen["activation"], chosen["from_logits"]
        batch = draw_batch(data, path, activation)
        inputs = tuple(x.detach() for x in batch.inputs(member))
        if not from_logits:
            inputs = tuple(activate(x.double(), activation).to(x.dtype) for x in inputs)
        heads = tuple(x.double().clamp_min(LOWEST_LOGIT) for x in inputs)
        mask = decided(member, heads, batch, activation, from_logits)
        call = {**batch.call(), "valid": mask}
        if member.image_wise and data.draw(st.booleans()):
            call["labels"] = batch.labels
        loss = member.make(**chosen)
        if data.draw(st.booleans()):
            loss = partial(member.function, **chosen)
        assert_equals_float64(
            lambda *x: loss(*x, **call),
            lambda *x: oracle(member, x, **chosen, **call),
            inputs,
            weight_of(batch, chosen["reduction"]),
        )

    search(check, 4 if path == "Triton kernels" else 540)


def tsallis(z: Tensor, q: float) -> Tensor:
    """S_q of every pixel, with the digits that the definition loses near q = 1."""
    log_p = log_probabilities(z, True)
    if q == 1:
        return -(log_p.exp() * log_p).sum(1)
    t = log_p.exp() * torch.expm1((q - 1) * log_p.clamp(min=-700))
    # p^q is something even where p has been rounded away.
    return -torch.where(log_p < -700, (q * log_p).exp(), t).sum(1) / (q - 1)


def test_tsallis_entropy_of_any_q_on_every_path_equals_float64_autograd_of_the_formula(
    path: str, search: Search
) -> None:
    near = st.sampled_from([-1, 1]).flatmap(
        lambda sign: st.floats(-16, -1).map(lambda digits: 1 + sign * 10**digits)
    )
    far = st.floats(-30, 38).map(lambda digits: 10.0**digits)
    special = st.sampled_from([1, 2, 1.5, math.nextafter(1.5, 0), 3, 3e38])

    def check(data: st.DataObject) -> None:
        q = data.draw(near | far | special)
        # A class that is certain to be absent costs p^0, were q 0.
        finite = tuple(kind for kind in KINDS if not kind.startswith("masked"))
        batch = draw_batch(data, path, "softmax", kinds=finite, shortest=1)
        batch = batch._replace(valid=None)
        # Terms of single pixels are the plain formula's.
        reductions = ["sum"] if path == "Triton kernels" else ["sum", "none"]
        reduction = data.draw(st.sampled_from(reductions))

        def formula(z: Tensor) -> Tensor:
            terms = tsallis(resize(z, batch.size, batch.align_corners), q)
            return terms.sum() if reduction == "sum" else terms

        assert_equals_float64(
            partial(maxsquare.TsallisEntropyLoss(q, reduction=reduction), **batch.call()),
            formula,
            (batch.logits.detach(),),
            weight_of(batch, reduction) * batch.logits.shape[1],
        )

    search(check, 10 if path == "Triton kernels" else 540)


def cross_entropy(z: Tensor, labels: Tensor, valid: Tensor, activation: str, reduction: str) -> Any:
    """By its formula: labels below 0 do not count, nor do those that are not valid."""
    images, y = as_images(z), map_as_images(labels.where(valid, -1))
    channels = images.shape[1]
    if activation == "sigmoid":
        images, y = two_sides(images, True), sides_of_labels(y, channels)
    nll = -log_probabilities(images, True).gather(1, y.clamp(min=0)[:, None])[:, 0]
    terms = torch.where(y >= 0, nll, 0)
    if reduction != "none":
        return terms.sum() / ((y >= 0).sum().clamp(min=1) if reduction == "mean" else 1)
    if activation == "sigmoid":
        terms = terms.unflatten(0, (-1, channels))
        return terms[0].t() if z.dim() == 2 else terms.unflatten(2, z.shape[2:])
    return terms[0] if z.dim() == 2 else terms.unflatten(1, z.shape[2:])


def test_cross_entropy_on_every_path_equals_float64_autograd_of_the_formula(
    path: str, search: Search
) -> None:
    def check(data: st.DataObject) -> None:
        activation = data.draw(st.sampled_from(["softmax", "sigmoid"]))
        reduction = data.draw(st.sampled_from(["mean", "sum", "none"]))
        # The label of a class that is masked out costs an infinity.
        unmasked = tuple(kind for kind in KINDS if not kind.startswith("masked"))
        batch = draw_batch(data, path, activation, kinds=unmasked)
        ignore_index = data.draw(st.sampled_from([-1, 0, 255]))
        integers = [torch.int16, torch.int32, torch.int64]
        integers += [torch.int8] if batch.logits.shape[1] < 128 else []
        # In the unsigned ones -1 is 255.
        integers += [torch.uint8] if ignore_index == 255 else []
        labels = batch.labels.to(data.draw(st.sampled_from(integers)))
        counted = (labels != ignore_index) & (batch.labels >= 0)
        counted = counted if batch.valid is None else counted & batch.valid

        def formula(z: Tensor) -> Tensor:
            full = resize(z, batch.size, batch.align_corners)
            return cross_entropy(full, batch.labels, counted, activation, reduction)

        assert_equals_float64(
            lambda z: functional.cross_entropy(
                z,
                labels,
                **batch.call(),
                ignore_index=ignore_index,
                activation=activation,
                reduction=reduction,
            ),
            formula,
            (batch.logits.detach(),),
            weight_of(batch, reduction),
        )

    search(check, 10 if path == "Triton kernels" else 540)


# What is not a number -----------------------------------------------------------------------------

INTEGER_OF = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def not_a_number(dtype: torch.dtype, digits: int) -> Tensor:
    """A NaN with some of the digits that it may have."""
    mantissa = round(-math.log2(torch.finfo(dtype).eps))
    infinity = torch.tensor(math.inf, dtype=dtype).view(INTEGER_OF[dtype.itemsize])
    return (infinity + 1 + digits % (2**mantissa - 1)).view(dtype)


@each_loss
def test_a_pixel_that_is_not_a_number_shows_and_reaches_no_other_image(
    member: Member, path: str, search: Search
) -> None:
    def check(data: st.DataObject) -> None:
        chosen = {**data.draw(options(member)), "from_logits": True}
        batch = draw_batch(data, path, chosen["activation"], shortest=1)
        inputs = tuple(x.detach().clone() for x in batch.inputs(member))
        if batch.size:
            # No source pixel is left out, and any may touch a pixel that does not count.
            size = tuple(
                max(lengths)
                for lengths in zip(batch.size, *(x.shape[2:] for x in inputs), strict=True)
            )
            batch = batch._replace(size=size, valid=None)
        loss = partial(member.make(**chosen), **batch.call())
        clean, clean_gradients = value_and_gradient(loss, inputs)

        head = data.draw(st.sampled_from(inputs))
        n, c, *pixel = (data.draw(st.integers(0, length - 1)) for length in head.shape)
        bad = data.draw(st.sampled_from(["a NaN", "infinity", "-infinity at all classes"]))
        if bad == "a NaN":
            head[(n, c, *pixel)] = not_a_number(head.dtype, data.draw(st.integers(0, 2**52)))
        elif bad == "infinity":
            head[(n, c, *pixel)] = math.inf
        elif chosen["activation"] == "softmax" and not batch.size:
            head[(n, slice(None), *pixel)] = -math.inf
        else:
            return

        value, gradients = value_and_gradient(loss, inputs)
        if batch.valid is not None and not batch.valid[(n, *pixel)]:
            assert same_bits(value, clean) and all(map(same_bits, gradients, clean_gradients))
            return
        if value.dim() == 0:
            assert value.isnan()
        elif not batch.size:
            expected = torch.zeros_like(value, dtype=torch.bool)
            expected[(n, c, *pixel) if chosen["activation"] == "sigmoid" else (n, *pixel)] = True
            assert torch.equal(value.isnan(), expected)
        if head.dim() > 2:
            others = torch.arange(len(head), device=head.device) != n
            assert all(gradient[others].isfinite().all() for gradient in gradients)

    search(check, 1 if path == "Triton kernels" else 40)


# The same bits ------------------------------------------------------------------------------------


def same_bits(one: Tensor, other: Tensor) -> bool:
    integer = INTEGER_OF[one.dtype.itemsize]
    return torch.equal(one.contiguous().view(integer), other.contiguous().view(integer))


@each_loss
def test_threads_repeats_and_places_in_a_batch_change_no_bit(
    member: Member,
    search: Search,
    set_threads: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    take("CPU kernels", monkeypatch)
    # Threads and chunks enough for tiny tensors.
    monkeypatch.setattr(cpu, "LOGITS_PER_THREAD", 1)
    monkeypatch.setattr(cpu, "CHUNK_PIXELS", 5)

    def check(data: st.DataObject) -> None:
        # The others are the plain formula's.
        chosen = {
            **data.draw(options(member)),
            "from_logits": True,
            "reduction": data.draw(st.sampled_from(["mean", "sum"])),
        }
        batch = draw_batch(data, "CPU kernels", chosen["activation"], shortest=1)
        inputs = tuple(x.detach() for x in batch.inputs(member))
        labelled = member.image_wise and data.draw(st.booleans())

        def run(images: list[int], **changed: Any) -> tuple[Tensor, ...]:
            """Value, and gradients of these images as a batch."""
            call = batch.call()
            if call["valid"] is not None:
                call["valid"] = call["valid"][images]
            if labelled:
                call["labels"] = batch.labels[images]
            loss = partial(member.make(**{**chosen, **changed}), **call)
            value, gradients = value_and_gradient(loss, tuple(x[images] for x in inputs))
            return value, *gradients

        everyone = list(range(len(inputs[0])))
        set_threads(1)
        expected = run(everyone)
        for threads in (1, 2, 3, 8):
            set_threads(threads)
            assert all(map(same_bits, run(everyone), expected))
        # The last bit of PyTorch's powers, which image weights have, depends on the place.
        powers_in_float64 = member.image_wise and inputs[0].dtype == torch.float64
        if inputs[0].dim() == 2 or powers_in_float64:
            return
        order = data.draw(st.permutations(everyone))
        _, *gradients = run(order)
        for gradient, before in zip(gradients, expected[1:], strict=True):
            assert same_bits(gradient, before[order])
        # A sum depends on no neighbour.
        _, *together = run(everyone, reduction="sum")
        n = data.draw(st.sampled_from(everyone))
        _, *alone = run([n], reduction="sum")
        for gradient, before in zip(alone, together, strict=True):
            assert same_bits(gradient, before[[n]])

    search(check, 30)


@pytest.mark.parametrize("size", [None, (251, 302)], ids=["as is", "upsampled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@each_loss
def test_every_number_of_threads_gives_the_same_bits_where_each_has_work(
    member: Member,
    dtype: torch.dtype,
    size: tuple[int, int] | None,
    set_threads: Callable[[int], None],
) -> None:
    shape = (2, 19, 33, 41) if size else (2, 19, 120, 126)
    inputs = tuple(x.detach() for x in inputs_of(member, shape, dtype=dtype))
    loss = partial(member.make(), size=size)
    results = []
    for threads in (1, 2, 3, 8, 8):
        set_threads(threads)
        value, gradients = value_and_gradient(loss, inputs)
        results.append((value, *gradients))
    for result in results[1:]:
        assert all(map(same_bits, result, results[0]))


# More than 2^31 elements --------------------------------------------------------------------------


def needs_memory(gib: float) -> None:
    """Skip the test where so much is not free."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        pytest.skip("does not know how much memory is free")
    free = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) / 2**20
    if free < gib:
        pytest.skip(f"needs {gib} GiB of memory, and {free:.1f} are free")


def test_an_image_of_more_than_2_31_pixels_is_that_many_pixels() -> None:
    """The same pixels again and again, of which the formula is known."""
    needs_memory(12)
    block = random_logits((2**20 + 8,)).to(torch.bfloat16)
    repeats = 2**31 // len(block) + 1
    z = torch.empty(1, 1, repeats * len(block), dtype=block.dtype)
    assert z.numel() > 2**31
    z.view(repeats, -1).copy_(block)
    z.requires_grad_()
    value = maxsquare.IWMaxSquareLoss(activation="sigmoid", reduction="sum")(z)
    value.backward()

    x = block.double().requires_grad_()
    on = x.detach() >= 0
    counts = torch.stack([on.sum(), (~on).sum()]).double() * repeats
    p = x.sigmoid()
    terms = -0.5 * (p * p + (1 - p) ** 2) * image_weight(counts, 0.2)[(~on).long()]
    terms.sum().backward()
    torch.testing.assert_close(value.item(), repeats * terms.sum().item(), rtol=1e-5, atol=0)
    assert z.grad is not None and x.grad is not None
    rows = z.grad.view(repeats, -1)
    assert_close(rows[0], x.grad, torch.bfloat16)
    # Four at once, which is faster.
    assert all(torch.equal(row, rows[0].view(torch.long)) for row in rows.view(torch.long))


@pytest.mark.parametrize("along", ["rows", "columns"])
def test_a_result_of_more_than_2_31_pixels_is_that_many_pixels(along: str) -> None:
    """Logits that change in one direction only: all lines in the other one are alike."""
    needs_memory(4)
    long, wide = 32771, 65537
    line = random_logits((1, 3, 6))
    # So many lines that not all pixels add up in one place, in float32.
    z, size = line[..., None].expand(1, 3, 6, 4096), (long, wide)
    image_wise = along == "rows"
    if along == "columns":
        z, size = z.transpose(2, 3), (wide, long)
    assert math.prod(size) > 2**31

    def formula(line: Tensor) -> Tensor:
        x = F.interpolate(line, long, mode="linear")
        y = first_largest(x)
        counts = class_counts(y[0], y[0] >= 0, 3).double() * wide
        weights = image_weight(counts, 0.2) if image_wise else torch.ones(3).double()
        return (-0.5 * x.softmax(1).square().sum(1) * weights[y]).sum() * wide

    exact, (exact_gradient,) = value_and_gradient(formula, (line,))
    loss = maxsquare.IWMaxSquareLoss if image_wise else maxsquare.MaxSquareLoss
    value, (gradient,) = value_and_gradient(partial(loss(reduction="sum"), size=size), (z.float(),))
    assert_close(value, exact, torch.float32)
    # One after the other, in float32, add up the thousands of pixels between two logits.
    gradient = gradient.sum(3 if along == "rows" else 2).double()
    assert largest(gradient - exact_gradient) < 1e-3 * largest(exact_gradient)


@pytest.mark.skipif(sys.platform != "linux", reason="needs memory that is not there until used")
@pytest.mark.parametrize("size", [None, (4, 3)], ids=["as is", "upsampled"])
def test_logits_that_lie_far_apart_are_read_where_they_are(
    path: str, size: tuple[int, int] | None
) -> None:
    if interpreted(path):
        pytest.skip("Triton's interpreter copies all memory around them")
    near = random_logits((2, 3, 2, 2)).to(device_of(path), torch.bfloat16)
    strides = (2**31 + 3, 2**29 + 1, 2**28 - 1, 5)
    try:
        # Memory of which only the pages with these logits come to be used.
        memory = torch.empty(2**32, dtype=near.dtype, device=near.device)
    except RuntimeError:
        pytest.skip("needs 8 GiB of memory, of which next to none is used")
    far = memory.as_strided(near.shape, strides).copy_(near)
    for loss in (maxsquare.IWMaxSquareLoss(), maxsquare.PseudoLabelLoss(threshold=0.4)):
        expected, gradients = value_and_gradient(partial(loss, size=size), (near,))
        value, far_gradients = value_and_gradient(partial(loss, size=size), (far,))
        assert same_bits(value, expected) and same_bits(*gradients, *far_gradients)


def test_many_images_and_many_classes_are_as_many() -> None:
    many_images = random_logits((2**18 + 3, 2, 1)).float()
    many_classes = random_logits((1, 2**17 + 5, 3)).float()
    for z in (many_images, many_classes):
        value, (gradient,) = value_and_gradient(maxsquare.EntropyLoss(), (z,))
        exact, (exact_gradient,) = value_and_gradient(
            lambda *x: oracle(loss_named("entropy"), x), (z.double(),)
        )
        assert_close(value, exact, torch.float32)
        # So many classes of a pixel add up one after the other, in float32.
        assert largest(gradient - exact_gradient) < 1e-4 * largest(exact_gradient)
        # One pixel an image, or a class: all weights are 1.
        weighted = maxsquare.IWMaxSquareLoss(ratio=1, reduction="sum")(z)
        assert_close(weighted, maxsquare.MaxSquareLoss(reduction="sum")(z), torch.float32)


# Low precision ------------------------------------------------------------------------------------


def errors_of(member: Member, dtype: torch.dtype, device: torch.device) -> tuple[float, float]:
    """The largest error of value and of gradient, in roundings of the largest entry.

    A rounding is half of eps: of float32, which the value is, and of the logits' dtype.
    """
    heads = tuple(x.detach() for x in inputs_of(member, (1, 19, 12, 16), dtype=dtype, spread=3.0))
    wide = tuple(x.double() for x in heads)
    # Rounded logits tie here and there.
    batch = Batch(heads[0], heads[-1], None, random_labels(heads[0].shape))
    valid = decided(member, wide, batch, "softmax", True)
    exact, exact_gradients = value_and_gradient(lambda *x: oracle(member, x, valid=valid), wide)
    on_device = None if valid is None else valid.to(device)
    value, gradients = value_and_gradient(
        partial(member.make(), valid=on_device), tuple(x.to(device) for x in heads)
    )
    pairs = [(value, exact, torch.float32)]
    # Of two heads the last one learns.
    pairs += [(gradients[-1], exact_gradients[-1], dtype)]
    value_error, gradient_error = (
        largest(ours.cpu().double() - expected) / largest(expected) / torch.finfo(each).eps * 2
        for ours, expected, each in pairs
    )
    return value_error, gradient_error


def test_errors_in_low_precision_are_a_few_roundings(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prints the table of the largest errors of value / gradient (see `errors_of`)."""
    paths = [path for path in PATHS if kernels_of(path) is not None]
    narrow = [torch.float32, *HALF]
    columns = [f"{str(dtype)[6:]}, {path}" for dtype in narrow for path in paths]
    table = [["loss", *columns], ["---"] * (1 + len(columns))]
    for member in LOSSES:
        row = [str(member)]
        for dtype in narrow:
            for path in paths:
                take(path, monkeypatch)
                value_error, gradient_error = errors_of(member, dtype, device_of(path))
                row.append(f"{value_error:.1f} / {gradient_error:.1f}")
                # Differences of probabilities near 1 lose the first digits of float32. Rounded to
                # nearest the error is 1; the interpreter cuts the last digits of bfloat16 off.
                limit = 64 if dtype == torch.float32 else 1.1
                if dtype == torch.bfloat16 and interpreted(path):
                    limit = 2.1
                assert value_error < 16 and gradient_error < limit
        table.append(row)
    with capsys.disabled():
        print("", *(f"| {' | '.join(row)} |" for row in table), sep="\n")
