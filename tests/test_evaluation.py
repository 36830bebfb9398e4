"""Promises of uda.evaluation: the scores of the published and of the official evaluator."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import lightning_fabric
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from uda.datasets import LABEL_SPACES, LabelSpace, Sample
from uda.errors import UserError
from uda.evaluation import Scores, evaluate, predict

# Where a class of 13 stands among the 16 of SYNTHIA.
IDS_13_OF_16 = [LABEL_SPACES[16].train_ids.index(i) for i in LABEL_SPACES[13].train_ids]


class Oracle(nn.Module):
    """A network whose logits are given: image channel 0 holds the class, the others are unused."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.classes = classes

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        logits = 9.0 * F.one_hot(images[:, 0].long(), self.classes).movedim(-1, 1)
        return logits, torch.zeros_like(logits)


class Pooled(nn.Module):
    """A linear network at stride 8 whose predictions vary over an image."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.weight = nn.Parameter(torch.randn(classes, 3, 8, 8, generator=generator))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        logits = F.conv2d(images, self.weight, stride=8)
        return logits, -logits


def batch(images: Tensor, labels: Tensor) -> Sample:
    return Sample(images, labels, name=[str(i) for i in range(len(images))])  # type: ignore[arg-type]


def random_batches(classes: int, count: int = 3) -> list[Sample]:
    generator = torch.Generator().manual_seed(0)
    return [
        batch(
            torch.randn(2, 3, 32, 64, generator=generator),
            torch.randint(-1, classes, (2, 32, 64), generator=generator),
        )
        for _ in range(count)
    ]


@pytest.mark.parametrize("classes", [19, 16, 13])
def test_scores_equal_the_published_evaluator(classes: int) -> None:
    with np.load(Path(__file__).parent / "fixtures" / "metrics.npz") as arrays:
        recorded = {k.partition("/")[2]: arrays[k] for k in arrays.files if k[:2] == str(classes)}
    labels, predicted = (torch.from_numpy(recorded[key])[None] for key in ("label", "pred"))
    images = predicted.unsqueeze(1).expand(-1, 3, -1, -1).float()
    scores = evaluate(Oracle(classes), [batch(images, labels)], LABEL_SPACES[classes])

    assert torch.equal(scores.confusion, torch.from_numpy(recorded["confusion"]).long())
    assert scores.pixel_accuracy == pytest.approx(100 * recorded["pixel_accuracy"])
    views = [scores, scores.subset(IDS_13_OF_16)] if classes == 16 else [scores]
    for i, view in enumerate(views):
        for name, ours in (
            ("mean_iou", view.miou),
            ("mean_accuracy", view.mean_accuracy),
            ("mean_precision", view.mean_precision),
        ):
            assert ours == pytest.approx(100 * np.atleast_1d(recorded[name])[i]), name


def test_a_class_absent_from_both_maps_is_left_out() -> None:
    scores = Scores(torch.tensor([[6, 2, 0], [2, 0, 0], [0, 0, 0]]), ("a", "b", "c"))
    assert scores.per_class == {"a": pytest.approx(60), "b": 0, "c": None}
    assert scores.miou == pytest.approx(30)
    assert scores.subset((0,)).per_class == {"a": pytest.approx(60)}
    assert scores.subset((0, 2)).miou == pytest.approx(60)


def test_scores_of_nothing_are_undefined() -> None:
    scores = Scores(torch.zeros(2, 2), ("a", "b"))
    assert scores.per_class == {"a": None, "b": None}
    assert math.isnan(scores.miou)


def test_scores_equal_the_official_cityscapes_evaluator(tmp_path: Path) -> None:
    official = pytest.importorskip(
        "cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling", exc_type=ImportError
    )
    ids_of = {label.trainId: label.id for label in official.labels if 0 <= label.trainId < 19}
    ids = torch.tensor([0, *(ids_of[c] for c in range(19))], dtype=torch.uint8)  # ours -1 -> void

    model, batches = Pooled(19), random_batches(19)
    files: dict[str, list[str]] = {"labels": [], "predictions": []}
    for i, (images, labels, _) in enumerate(batches):
        # Half of the pixels right, so that no score is trivial.
        classes = predict(model, images, (32, 64)).argmax(dim=1)
        labels[..., ::2] = torch.where(labels[..., ::2] < 0, -1, classes[..., ::2])
        for kind, maps in (("labels", labels), ("predictions", classes)):
            for j, values in enumerate(maps):
                files[kind].append(str(tmp_path / f"{kind}{i}{j}.png"))
                Image.fromarray(ids[values + 1].numpy()).save(files[kind][-1])

    options = vars(official.args) | {
        "evalInstLevelScore": False,
        "JSONOutput": False,
        "quiet": True,
    }
    wanted = official.evaluateImgLists(
        files["predictions"], files["labels"], SimpleNamespace(**options)
    )
    scores = evaluate(model, batches, LABEL_SPACES[19])
    assert scores.miou == pytest.approx(100 * wanted["averageScoreClasses"])
    for name, iou in scores.per_class.items():
        assert iou == pytest.approx(100 * wanted["classScores"][name]), name


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_outputs_that_are_not_finite_get_no_score(value: float) -> None:
    model = Pooled(19)
    with torch.no_grad():
        model.weight[3] = value
    with pytest.raises(UserError, match="not finite"):
        evaluate(model, random_batches(19), LABEL_SPACES[19])


def test_flip_averages_the_probabilities_of_the_mirror_image() -> None:
    model, images = Pooled(5), torch.randn(2, 3, 32, 64)

    def upsampled(images: Tensor) -> Tensor:
        logits = model(images)[0]
        return F.interpolate(logits, (47, 95), mode="bilinear", align_corners=True)

    once = upsampled(images).softmax(1)
    mirrored = upsampled(images.flip(-1)).softmax(1).flip(-1)
    torch.testing.assert_close(predict(model, images, (47, 95), flip=False), once)
    torch.testing.assert_close(predict(model, images, (47, 95)), (once + mirrored) / 2)


def test_predictions_are_upsampled_to_the_size_of_the_labels() -> None:
    model, small = Pooled(5), random_batches(5)
    large = [
        batch(images, labels.repeat_interleave(2, 1).repeat_interleave(2, 2))
        for images, labels, _ in small
    ]
    space = LabelSpace(tuple("abcde"), ((0, 0, 0),) * 5, tuple(range(5)))
    network_size = evaluate(model, small, space)
    full = evaluate(model, large, space)
    assert full.confusion.sum() == 4 * network_size.confusion.sum()
    assert not torch.equal(full.confusion, 4 * network_size.confusion)


def test_evaluation_reports_progress_and_restores_the_mode() -> None:
    done: list[int] = []
    for training in (True, False):
        model = Pooled(19).train(training)
        evaluate(model, random_batches(19, 2), LABEL_SPACES[19], on_progress=done.append)
        assert model.training is training
    assert done == [2, 2, 2, 2]


def _confusion_of_share(fabric: lightning_fabric.Fabric) -> list[list[int]]:
    share = random_batches(19, 3)[fabric.global_rank :: fabric.world_size]
    confusion = evaluate(Pooled(19), share, LABEL_SPACES[19]).confusion.tolist()
    torch.distributed.destroy_process_group()  # else the exit may abort
    return confusion


@pytest.mark.stress  # test_examples runs the whole script with two processes
def test_processes_that_share_the_images_return_the_scores_of_all() -> None:
    fabric = lightning_fabric.Fabric(accelerator="cpu", devices=2, strategy="ddp_spawn")
    together = evaluate(Pooled(19), random_batches(19, 3), LABEL_SPACES[19])
    assert fabric.launch(_confusion_of_share) == together.confusion.tolist()
