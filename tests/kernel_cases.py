"""What the operators are given in tests: one list of potentials, and cases of logits and masks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import torch
from support import random_logits, random_valid
from torch import Tensor

from maxsquare.engine import LogitsSpec, plain
from maxsquare.potentials import POWER_FROM_Q, CrossEntropy, Linear, Potential, Tsallis

# Each form of t, on both sides of the q where it changes; and the two potentials without one.
POTENTIALS = {
    "square": Tsallis(2, offset=-1),
    "shannon": Tsallis(1),
    "power": Tsallis(POWER_FROM_Q),
    "near one": Tsallis(1.0001),
    "below one": Tsallis(0.5),
    "cross entropy": CrossEntropy(),
    "linear": Linear(),
}
KINDS = ("argmax", "threshold", "guide", "labels")


@dataclass
class Case:
    """What the operators are given."""

    z: Tensor
    potential: Potential
    guide: Tensor | None = None
    labels: Tensor | None = None
    valid: Tensor | None = None
    threshold: float | None = None
    spec: LogitsSpec = LogitsSpec()
    by_class: bool = True

    def classify(self, kernels: ModuleType) -> tuple[Tensor, Tensor]:
        tensors = (self.z, self.guide, self.labels, self.valid)
        ignore_index = 1
        y, counts = kernels.classify(*tensors, self.spec, self.threshold, ignore_index)
        narrow = plain.index_dtype(self.spec.classes(self.z))
        assert y.dtype == (torch.long if kernels is plain else narrow)
        return y.to(narrow), counts

    def weighted_sum(
        self, kernels: ModuleType, y: Tensor | None, needs_grad: bool = True
    ) -> tuple[Tensor, Tensor]:
        is_linear = isinstance(self.potential, Linear)
        columns = self.spec.classes(self.z) if self.by_class or is_linear else 1
        weights = random_logits((len(self.z), columns), seed=5)
        weights = weights.to(self.z.device, plain.accumulation_dtype(self.z.dtype))
        tensors = (self.z, weights, None if is_linear else y, self.valid)
        return kernels.weighted_sum(*tensors, self.potential, self.spec, needs_grad)

    def class_sums(self, kernels: ModuleType) -> Tensor:
        return kernels.class_sums(self.z, self.valid, self.spec)

    def to(self, dtype: torch.dtype, device: torch.device | None = None) -> Case:
        """The same logits in another dtype, and all tensors on another device."""
        changed: dict[str, Any] = {"z": self.z.to(device, dtype)}
        if self.guide is not None:
            changed["guide"] = self.guide.to(device, dtype)
        for name in ("labels", "valid"):
            tensor = getattr(self, name)
            changed[name] = None if tensor is None else tensor.to(device)
        return replace(self, **changed)


def make_case(
    shape: tuple[int, ...],
    kind: str,
    potential: Potential,
    spec: LogitsSpec = LogitsSpec(),  # noqa: B008
    *,
    seed: int = 0,
    share: float = 0.8,
    by_class: bool = True,
) -> Case:
    """float64 logits with a mask, whose classes are found in one of the ways KINDS."""
    case = Case(random_logits(shape, seed=seed), potential, spec=spec, by_class=by_class)
    pixels = (shape[0], *spec.spatial(case.z))
    case.valid = random_valid(pixels, seed=seed, share=share)
    if kind in ("threshold", "guide"):
        case.threshold = 0.6
    if kind == "guide":
        case.guide = random_logits(shape, seed=seed + 1)
    if kind == "labels":
        generator = torch.Generator().manual_seed(seed)
        case.labels = torch.randint(-1, spec.classes(case.z), pixels, generator=generator)
    return case
