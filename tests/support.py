"""What the tests of the losses share: the table of members, the oracle, tolerances, strategies.

The oracle writes every formula again, slowly and openly, and knows nothing of the library: it
takes its gradient from float64 autograd.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor, nn

import maxsquare
from maxsquare import functional

settings.register_profile(
    "maxsquare", deadline=None, derandomize=True, max_examples=15, database=None
)
settings.load_profile("maxsquare")

# The tensors here are tiny: on a busy machine threads cost ten times what they compute.
torch.set_num_threads(1)

# Relative to the largest entry of the float64 result: a few roundings of the dtype.
TOLERANCE = {
    torch.float64: 1e-10,
    torch.float32: 1e-5,
    torch.float16: 1e-3,
    torch.bfloat16: 8e-3,
}
HALF = (torch.float16, torch.bfloat16)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a loss of such logits is computed and returned."""
    return torch.float32 if dtype in HALF else dtype


# --------------------------------------------------------------------------------------------
# The oracle
# --------------------------------------------------------------------------------------------


class Reduced(NamedTuple):
    """Per-pixel terms of images (N, M) and the number by which a mean divides their sum."""

    terms: Tensor
    divisor: Tensor


@dataclass(frozen=True)
class Formula:
    """One loss as the paper writes it. `q` None: cross entropy against a label made on the spot."""

    q: float | None = None
    ratio: float | None = None
    threshold: float = 0.95
    max_square: bool = False

    def factor(self, classes: int) -> float:
        """`reference` over `paper` (METHOD's table of scales)."""
        if self.q is None:
            return 1.0
        return (2.0 if self.max_square and self.ratio is not None else 1.0) / classes


def first_largest(x: Tensor) -> Tensor:
    """Index of the largest entry along dim 1; the first one of several."""
    is_largest = x == x.amax(1, keepdim=True)
    return (is_largest.long().cumsum(1) == 0).sum(1)


def resize(x: Tensor, size: tuple[int, ...] | None, align_corners: bool) -> Tensor:
    if size is None:
        return x
    mode = {3: "linear", 4: "bilinear", 5: "trilinear"}[x.dim()]
    return F.interpolate(x, size=size, mode=mode, align_corners=align_corners)


def as_images(x: Tensor) -> Tensor:
    """(N, C, *spatial) as (images, C, pixels); (N, C) is one image of N pixels."""
    return x.t()[None] if x.dim() == 2 else x.flatten(2)


def map_as_images(x: Tensor) -> Tensor:
    return x[None] if x.dim() == 1 else x.flatten(1)


def two_sides(x: Tensor, from_logits: bool) -> Tensor:
    """Every channel as a two-class image with logits (z, 0), or probabilities (p, 1 - p)."""
    other = torch.zeros_like(x) if from_logits else 1 - x
    return torch.stack([x, other], 2).flatten(0, 1)


def sides_of_labels(labels: Tensor, classes: int) -> Tensor:
    """A label map (N, M) as seen by each channel: 0 its own class, 1 another one, -1 neither.

    The own class of a single channel is 1, the foreground.
    """
    own = range(classes) if classes > 1 else [1]
    sides = [torch.where(labels == c, 0, 1) for c in own]
    counted = (labels >= 0) & (labels < max(classes, 2))
    return torch.stack([torch.where(counted, side, -1) for side in sides], 1).flatten(0, 1)


def log_probabilities(x: Tensor, from_logits: bool) -> Tensor:
    if not from_logits:
        return x.log()
    # Logits of 1e4 have lost twelve digits behind the point, of which float64 has sixteen.
    x = x - x.detach().amax(1, keepdim=True) if x.numel() else x
    return x - torch.logsumexp(x, 1, keepdim=True)


def image_weight(counts: Tensor, ratio: float) -> Tensor:
    """1 / max(N_c^a N^(1-a), 1) for the counts (C,) of one image; 1 where nothing is counted."""
    if not counts.any():
        return torch.ones_like(counts)
    return 1 / (counts**ratio * counts.sum() ** (1 - ratio)).clamp(min=1)


def class_counts(classes_of_pixels: Tensor, counted: Tensor, classes: int) -> Tensor:
    return torch.stack([(counted & (classes_of_pixels == c)).sum() for c in range(classes)])


def target_terms(
    formula: Formula, x: Tensor, valid: Tensor, labels: Tensor | None, from_logits: bool
) -> Reduced:
    """Terms of one loss over images (N, C, M)."""
    log_p = log_probabilities(x, from_logits)
    p = log_p.exp()
    predicted = first_largest(x.detach())
    if formula.q is None:
        accepted = valid & (p.detach().amax(1) > formula.threshold)
        nll = -log_p.gather(1, predicted[:, None])[:, 0]
        return Reduced(torch.where(accepted, nll, 0), accepted.sum().clamp(min=1))
    if formula.max_square:
        phi = -0.5 * (p * p).sum(1)
    elif formula.q == 1:
        phi = -(p * log_p).sum(1)
    else:
        phi = (1 - (formula.q * log_p).exp().sum(1)) / (formula.q - 1)
    phi = torch.where(valid, phi, 0)
    if formula.ratio is None:
        return Reduced(phi, valid.sum().clamp(min=1))
    images, classes, _ = x.shape
    counted_as = predicted if labels is None else labels
    weights = torch.zeros_like(phi)
    for n in range(images):
        counts = class_counts(counted_as[n], valid[n], classes).to(x.dtype)
        weights[n] = image_weight(counts, formula.ratio)[predicted[n]]
    return Reduced(weights * phi, torch.tensor(max(images, 1)))


def guidance_labels_of(
    x: Tensor, low: Tensor, valid: Tensor, threshold: float, from_logits: bool
) -> Tensor:
    """Pseudo labels (N, M) of the averaged prediction, -1 where neither head is sure."""
    p = log_probabilities(x, from_logits).exp()
    p_low = log_probabilities(low, from_logits).exp()
    sure = (p.amax(1) > threshold) | (p_low.amax(1) > threshold)
    return torch.where(valid & sure, first_largest((p + p_low) / 2), -1)


def guidance_terms(
    x: Tensor, low: Tensor, valid: Tensor, threshold: float, from_logits: bool
) -> Reduced:
    labels = guidance_labels_of(x.detach(), low.detach(), valid, threshold, from_logits)
    log_p_low = log_probabilities(low, from_logits)
    nll = -log_p_low.gather(1, labels.clamp(min=0)[:, None])[:, 0]
    return Reduced(torch.where(labels >= 0, nll, 0), (labels >= 0).sum().clamp(min=1))


def oracle(
    member: Member,
    inputs: tuple[Tensor, ...],
    *,
    reduction: str = "mean",
    scale: str = "paper",
    activation: str = "softmax",
    from_logits: bool = True,
    size: tuple[int, ...] | None = None,
    align_corners: bool = False,
    valid: Tensor | None = None,
    labels: Tensor | None = None,
) -> Tensor:
    """The loss of `member` by its printed formula, in the dtype of the inputs."""
    heads = [resize(x, size, align_corners) for x in inputs]
    shape = heads[0].shape
    heads = [as_images(x) for x in heads]
    pixels = (heads[0].shape[0], heads[0].shape[2])
    if valid is None:
        counts = torch.ones(pixels, dtype=torch.bool, device=heads[0].device)
    else:
        counts = map_as_images(valid)
    given = None if labels is None else map_as_images(labels)
    classes = shape[1]
    if activation == "sigmoid":
        heads = [two_sides(x, from_logits) for x in heads]
        counts = counts.repeat_interleave(classes, 0)
        if given is not None:
            given = sides_of_labels(given, classes)

    def reduce(part: Reduced, factor: float) -> Tensor:
        if reduction == "none":
            terms = part.terms * factor
            if activation == "sigmoid":
                terms = terms.unflatten(0, (pixels[0], classes))
                return terms[0].t() if len(shape) == 2 else terms.unflatten(2, shape[2:])
            return terms[0] if len(shape) == 2 else terms.unflatten(1, shape[2:])
        total = part.terms.sum() * factor
        return total if reduction == "sum" else total / part.divisor

    loss = torch.zeros((), dtype=heads[0].dtype, device=heads[0].device)
    if member.formula is not None:
        factor = member.formula.factor(heads[0].shape[1]) if scale == "reference" else 1.0
        loss = reduce(target_terms(member.formula, heads[0], counts, given, from_logits), factor)
    for low in heads[1:]:
        part = guidance_terms(heads[0], low, counts, member.threshold, from_logits)
        loss = loss + member.weight * reduce(part, 1.0)
    return loss


# --------------------------------------------------------------------------------------------
# The members
# --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Member:
    """One public loss with its printed formula.

    make(**options) builds the module, function(*inputs, **options) is its functional twin;
    `heads` logits maps go in. `threshold` and `weight` belong to the guidance of two heads.
    """

    name: str
    make: Callable[..., nn.Module]
    function: Callable[..., Tensor]
    formula: Formula | None
    heads: int = 1
    threshold: float = 0.6
    weight: float = 1.0

    @property
    def image_wise(self) -> bool:
        return self.formula is not None and self.formula.ratio is not None

    @property
    def has_scale(self) -> bool:
        """Whether `scale` changes anything: cross entropies have only one scale."""
        return self.formula is not None and self.formula.q is not None

    @property
    def smooth(self) -> bool:
        """Whether no threshold decides which pixels count."""
        return self.has_scale and self.heads == 1

    def __repr__(self) -> str:
        return self.name


def _multi_level(target: Callable[..., nn.Module], **options: Any) -> nn.Module:
    return maxsquare.MultiLevelLoss(target(**options), threshold=0.6, weight=0.3)


def _multi_level_function(target: Callable[..., Tensor], **own: Any) -> Callable[..., Tensor]:
    def loss(logits: Tensor, low_logits: Tensor, **options: Any) -> Tensor:
        only_target = ("scale", "labels", "ignore_index")
        shared = {name: value for name, value in options.items() if name not in only_target}
        guidance = functional.guidance_loss(logits, low_logits, threshold=0.6, **shared)
        return target(logits, **own, **options) + 0.3 * guidance

    return loss


def _tsallis(q: float, ratio: float | None = None) -> Member:
    return Member(
        f"tsallis[{q}]" if ratio is None else f"iw_tsallis[{q}]",
        partial(maxsquare.TsallisEntropyLoss, q, ratio=ratio),
        lambda logits, **options: functional.tsallis_entropy(logits, q, ratio=ratio, **options),
        Formula(q=q, ratio=ratio),
    )


LOSSES = [
    Member(
        "max_square",
        maxsquare.MaxSquareLoss,
        functional.max_square,
        Formula(q=2, max_square=True),
    ),
    Member(
        "iw_max_square",
        maxsquare.IWMaxSquareLoss,
        partial(functional.max_square, ratio=0.2),
        Formula(q=2, ratio=0.2, max_square=True),
    ),
    Member(
        "inverse_iw_max_square",
        partial(maxsquare.IWMaxSquareLoss, ratio=-0.2),
        partial(functional.max_square, ratio=-0.2),
        Formula(q=2, ratio=-0.2, max_square=True),
    ),
    Member("entropy", maxsquare.EntropyLoss, functional.entropy, Formula(q=1)),
    Member(
        "iw_entropy",
        partial(maxsquare.IWEntropyLoss, ratio=0.7),
        partial(functional.entropy, ratio=0.7),
        Formula(q=1, ratio=0.7),
    ),
    _tsallis(0.5),
    _tsallis(1.5),
    _tsallis(3),
    _tsallis(1.5, ratio=0.4),
    Member(
        "pseudo_label",
        partial(maxsquare.PseudoLabelLoss, threshold=0.6),
        partial(functional.pseudo_label_loss, threshold=0.6),
        Formula(threshold=0.6),
    ),
    Member(
        "guidance",
        partial(maxsquare.MultiLevelGuidance, threshold=0.6),
        partial(functional.guidance_loss, threshold=0.6),
        None,
        heads=2,
    ),
    Member(
        "multi_level",
        partial(_multi_level, maxsquare.EntropyLoss),
        _multi_level_function(functional.entropy),
        Formula(q=1),
        heads=2,
        weight=0.3,
    ),
    Member(
        "iw_multi_level",
        partial(_multi_level, maxsquare.IWMaxSquareLoss),
        _multi_level_function(functional.max_square, ratio=0.2),
        Formula(q=2, ratio=0.2, max_square=True),
        heads=2,
        weight=0.3,
    ),
    Member(
        "tsallis_multi_level",
        partial(_multi_level, partial(maxsquare.TsallisEntropyLoss, 1.5)),
        _multi_level_function(functional.tsallis_entropy, q=1.5),
        Formula(q=1.5),
        heads=2,
        weight=0.3,
    ),
    Member(
        "pseudo_label_multi_level",
        partial(_multi_level, partial(maxsquare.PseudoLabelLoss, threshold=0.6)),
        _multi_level_function(functional.pseudo_label_loss, threshold=0.6),
        Formula(threshold=0.6),
        heads=2,
        weight=0.3,
    ),
]
IMAGE_WISE = [member for member in LOSSES if member.image_wise]
ONE_HEAD = [member for member in LOSSES if member.heads == 1]
TWO_HEADS = [member for member in LOSSES if member.heads == 2]
SMOOTH = [member for member in LOSSES if member.smooth]


def loss_named(name: str) -> Member:
    return next(member for member in LOSSES if member.name == name)


# --------------------------------------------------------------------------------------------
# Inputs
# --------------------------------------------------------------------------------------------

SHAPES_BY_RANK = {0: (7, 3), 1: (2, 4, 9), 2: (2, 5, 3, 7), 3: (2, 3, 2, 3, 5)}
LAYOUTS = ("contiguous", "channels_last", "reversed", "strided", "expanded")


class Batch(NamedTuple):
    """Two heads' logits, and the size and the maps that go with them."""

    logits: Tensor
    low_logits: Tensor
    valid: Tensor | None
    labels: Tensor
    size: tuple[int, int] | None = None
    align_corners: bool = False

    def inputs(self, member: Member) -> tuple[Tensor, ...]:
        return (self.logits, self.low_logits)[: member.heads]

    def call(self) -> dict[str, Any]:
        """What a loss is called with beside the logits."""
        return {"size": self.size, "align_corners": self.align_corners, "valid": self.valid}


def random_logits(shape: tuple[int, ...], *, seed: int = 0, spread: float = 2.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64) * spread


def random_labels(shape: tuple[int, ...], *, seed: int = 0) -> Tensor:
    """Labels of such logits, with -1 (not counted) among them."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-1, shape[1], (shape[0], *shape[2:]), generator=generator)


def random_valid(shape: tuple[int, ...], *, seed: int = 0, share: float = 0.6) -> Tensor:
    """A mask of that shape with about this share of valid pixels."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share


def inputs_of(
    member: Member,
    shape: tuple[int, ...] = (2, 4, 5, 6),
    *,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    spread: float = 2.0,
) -> tuple[Tensor, ...]:
    """Leaves that require a gradient, one for each head."""
    heads = [random_logits(shape, seed=seed + i, spread=spread) for i in range(member.heads)]
    return tuple(x.to(dtype).requires_grad_() for x in heads)


def lay_out(x: Tensor, layout: str) -> Tensor:
    """`x` in another memory layout; "expanded" repeats its first pixel (or image) instead."""
    if layout == "channels_last":
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "reversed":
        backwards = (0, 1, *range(x.dim() - 1, 1, -1))
        return x.permute(backwards).contiguous().permute(backwards)
    if layout == "strided":
        wide = torch.stack([x, torch.full_like(x, 7.0)], -1).flatten(-2)
        return wide[..., ::2]
    if layout == "expanded":
        repeated_dim = -1 if x.dim() > 2 else 0
        return x.narrow(repeated_dim, 0, min(1, x.shape[repeated_dim])).expand_as(x)
    return x


KINDS = (
    "random",
    "huge",
    "denormal",
    "ties",
    "equal",
    "one-hot",
    "masked",
    "masked pixels",
    "mixed",
)


def make_peculiar(x: Tensor, kind: str, dtype: torch.dtype, seed: int) -> Tensor:
    """Logits of a kind that seldom comes by chance, made of random ones."""
    if kind == "huge":
        return x.sign() * 1e4
    if kind == "denormal":
        return x * torch.finfo(dtype).tiny / 4
    if kind == "ties":
        return x.round().clamp(-1, 1)
    if kind == "equal":
        return torch.full_like(x, 3)
    if kind == "one-hot":
        return (x == x.amax(1, keepdim=True)).to(x) * 100
    if kind.startswith("masked"):
        # Some of the classes, of all pixels or of each; never all of them.
        of_all = (1, x.shape[1], *[1] * (x.dim() - 2))
        shape = x.shape if kind == "masked pixels" else of_all
        absent = random_valid(shape, seed=seed, share=0.4)
        absent[:, 0] = False
        return torch.where(absent, -torch.inf, x)
    if kind == "mixed":
        generator = torch.Generator().manual_seed(seed)
        of_pixel = torch.randint(6, (len(x), 1, *x.shape[2:]), generator=generator)
        for i, other in enumerate(KINDS[1:6]):
            x = torch.where(of_pixel == i, make_peculiar(x, other, dtype, seed), x)
    return x


@st.composite
def batches(
    draw: st.DrawFn,
    ranks: tuple[int, ...] = (0, 1, 2, 3),
    *,
    classes: tuple[int, ...] = (2, 3, 5, 19),
    shortest: int = 1,
    longest: tuple[int, ...] = (12, 5, 5, 5),
    largest_size: tuple[int, int] | None = None,
    dtypes: tuple[torch.dtype, ...] = (torch.float64,),
    kinds: tuple[str, ...] = ("random",),
) -> Batch:
    """Logits of any rank, layout and spread, with a mask (or none) and labels.

    shortest, longest: of a spatial dimension, the latter by rank, and so many pixels without one.
    largest_size: upsample some batches of images, up to this size.
    """
    rank = draw(st.sampled_from(ranks))
    images = draw(st.integers(shortest, 3 if rank else longest[0]))
    channels = draw(st.sampled_from(classes))
    lengths = st.integers(shortest, longest[rank])
    spatial = draw(st.lists(lengths, min_size=rank, max_size=rank))
    low_spatial, size, align_corners = spatial, None, False
    if largest_size and rank == 2 and 0 not in spatial and draw(st.booleans()):
        height, width = largest_size
        size = draw(st.tuples(st.integers(1, height), st.integers(1, width)))
        align_corners = draw(st.booleans())
        low_spatial = draw(st.sampled_from([spatial, [2, 3]]))
    seed = draw(st.integers(0, 2**16))
    dtype = draw(st.sampled_from(dtypes))
    spread = draw(st.sampled_from([0.1, 2.0, 20.0]))
    kind, low_kind = (draw(st.sampled_from(kinds)) for _ in range(2))
    if kind == "masked" or low_kind.startswith("masked"):
        # A label of a class that only the low head masks out would cost it an infinity.
        low_kind = kind if kind == "masked" else "random"
    # Two heads, both certain but of different classes, would tie but for rounding.
    heads = [
        lay_out(
            make_peculiar(
                random_logits((images, channels, *dims), seed=seed + i, spread=s), k, dtype, seed
            ).to(dtype),
            draw(st.sampled_from(LAYOUTS)),
        )
        for i, (dims, s, k) in enumerate(
            ((spatial, spread, kind), (low_spatial, min(spread, 2.0), low_kind))
        )
    ]
    result = (images, max(channels, 2), *(size or spatial))
    map_shape = (images, *result[2:])
    masks = {
        "none": None,
        "some": random_valid(map_shape, seed=seed),
        "no pixel": torch.zeros(map_shape, dtype=torch.bool),
        "every pixel, expanded": torch.ones((), dtype=torch.bool).expand(map_shape),
    }
    valid = masks[draw(st.sampled_from(list(masks)))]
    return Batch(*heads, valid, random_labels(result, seed=seed), size, align_corners)


@st.composite
def options(draw: st.DrawFn, member: Member) -> dict[str, Any]:
    """Constructor options of a member."""
    chosen = {
        "reduction": draw(st.sampled_from(["mean", "sum", "none"])),
        "activation": draw(st.sampled_from(["softmax", "sigmoid"])),
        "from_logits": draw(st.booleans()),
    }
    if member.has_scale:
        chosen["scale"] = draw(st.sampled_from(["paper", "reference"]))
    return chosen


def activate(x: Tensor, activation: str) -> Tensor:
    """Probabilities for from_logits=False, away from 0 where slopes diverge."""
    if activation == "sigmoid":
        return 0.01 + 0.98 * x.sigmoid()
    return 0.02 / x.shape[1] + 0.98 * x.softmax(1)


# --------------------------------------------------------------------------------------------
# Kernels
# --------------------------------------------------------------------------------------------


def triton_kernels() -> ModuleType | None:
    """The Triton kernels, without a GPU by Triton's interpreter; None: this Triton has not got it.

    Before 3.4 the kernels do not compile, and before 3.7 the interpreter takes arrays of one
    element for numbers, which NumPy 2.4 refuses.
    """
    on_gpu = torch.cuda.is_available()
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return None
    if tuple(map(int, version.split(".")[:2])) < ((3, 4) if on_gpu else (3, 7)):
        return None
    if not on_gpu and os.environ.get("TRITON_INTERPRET") != "1":
        # Triton asks for it when it is imported, which another module may have done before.
        os.environ["TRITON_INTERPRET"] = "1"
        for name in ("triton.language.standard", "triton.language"):
            importlib.reload(importlib.import_module(name))
    return importlib.import_module("maxsquare.engine.cuda")


# --------------------------------------------------------------------------------------------
# Comparison
# --------------------------------------------------------------------------------------------


def value_and_gradient(
    call: Callable[..., Tensor], inputs: tuple[Tensor, ...], upstream: Tensor | None = None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Value and gradients at a fresh view of the inputs, for any upstream gradient."""
    leaves = tuple(x.detach().requires_grad_() for x in inputs)
    value = call(*leaves)
    weights = torch.ones_like(value) if upstream is None else upstream.to(value)
    gradients = torch.autograd.grad(value, leaves, weights, allow_unused=True)
    return value.detach(), tuple(
        torch.zeros_like(x) if g is None else g for x, g in zip(leaves, gradients, strict=True)
    )


def largest(x: Tensor) -> float:
    return x.abs().max().item() if x.numel() else 0.0


def assert_close(actual: Tensor, expected: Tensor, dtype: torch.dtype = torch.float64) -> None:
    """Equal up to TOLERANCE[dtype] of the largest expected entry."""
    torch.testing.assert_close(
        actual.double(),
        expected.double(),
        rtol=0,
        atol=TOLERANCE[dtype] * max(largest(expected), 1e-3),
    )


def assert_within_budget(actual: Tensor, plain: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    """The budget rule: no further from float64 than the plain formula in that dtype, plus a bit."""
    error = largest(actual.double() - exact)
    budget = largest(plain.double() - exact) + TOLERANCE[dtype] * largest(exact)
    assert error <= budget, f"error {error:.3g} exceeds the budget {budget:.3g} of {dtype}"
