# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Adapting a segmentation network without labels
#
# A network has learnt from labelled images of one style, the *source*. Images of another style, the
# *target*, have no labels. This notebook adapts the network to them with the maximum squares loss,
# shows how adaptation fails when the loss weighs too much, and chooses the weight without a label.
# It takes two to three minutes on two cores: `pip install -e ".[examples]" jupyter` first.

# %%
import copy
import tempfile

import matplotlib.pyplot as plt
import torch
from torch.utils.data import DataLoader

from maxsquare import (
    InformationMaximizationLoss,
    MaxSquareLoss,
    PredictionStatistics,
    functional,
)
from uda import datasets, deeplab, plots, scenes
from uda.evaluation import evaluate
from uda.presets import DEMO_CHECKPOINT

torch.set_num_threads(1)  # faster than two for a network this small

# %% [markdown]
# ## Two styles of street scenes
#
# The scenes are drawn here: a game's style as the source, a camera's as the target.

# %%
folder = tempfile.TemporaryDirectory()
scenes.render(folder.name, seed=0, train=24, val=12)
SIZE = (160, 320)
source = datasets.open_dataset("gta5", f"{folder.name}/GTA5", "train", size=(180, 320))
target = datasets.open_dataset(
    "cityscapes", f"{folder.name}/Cityscapes", "train", size=SIZE, labels=False
)
validation = datasets.open_dataset("cityscapes", f"{folder.name}/Cityscapes", "val", size=SIZE)
source_samples = list(source)
target_images = torch.stack([sample.image for sample in target])


def show(**pictures):
    """Images and maps of classes side by side."""
    _, axes = plt.subplots(1, len(pictures), figsize=(4 * len(pictures), 2.4), dpi=70)
    for axis, (title, picture) in zip(axes, pictures.items(), strict=True):
        axis.imshow(picture)
        axis.set_title(title.replace("_", " "))
        axis.axis("off")
    plt.tight_layout()
    plt.show()


def rgb(image):
    return datasets.to_rgb(image).permute(1, 2, 0).numpy()


show(source=rgb(source_samples[0].image), target=rgb(target_images[0]))

# %% [markdown]
# ## The source model
#
# This small DeepLab comes with the demo. It reaches 60.8 mIoU in its own style. `CALL` says how the
# losses upsample its logits, which have an eighth of the images' resolution.

# %%
source_model = deeplab.deeplab_small(19)
deeplab.load_weights(source_model, DEMO_CHECKPOINT)
CALL = {"size": SIZE, "align_corners": True}


@torch.no_grad()
def statistics(network):
    """What the predictions on unlabelled target images look like."""
    network.eval()
    found = PredictionStatistics()
    for images in target_images[:12].split(4):
        found.update(network(images)[0], **CALL)
    return found.compute()


@torch.no_grad()
def prediction(network, image):
    network.eval()
    logits, _ = network(image[None])
    full = torch.nn.functional.interpolate(logits, SIZE, mode="bilinear", align_corners=True)
    return plots.colorize(full.argmax(1)[0], validation.space)


results = {}


def report(name, network):
    """Keep and print the statistics; the mIoU needs labels, and is here to check the others."""
    s = statistics(network)
    scores = evaluate(network, DataLoader(validation, 4), validation.space, flip=False)
    results[name] = (s, scores.miou)
    print(
        f"{name:24} entropy {s.entropy:.3f}  information {s.information:.3f}  "
        f"classes {s.classes:2d}  mIoU {scores.miou:.1f}"
    )


report("source model", source_model)
scene = validation[0]
show(
    target=rgb(scene.image),
    ground_truth=plots.colorize(scene.labels, validation.space),
    source_model=prediction(source_model, scene.image),
)

# %% [markdown]
# ## Adaptation
#
# Every step learns from a labelled source image and from two unlabelled target images. The maximum
# squares loss makes predictions more certain; weighed moderately it helps.


# %%
def adapt(loss, weight, steps=40):
    torch.manual_seed(0)
    network = copy.deepcopy(source_model).train()
    optimizer = torch.optim.SGD(network.parameters(), lr=5e-3, momentum=0.9)
    for _ in range(steps):
        sample = source_samples[int(torch.randint(len(source_samples), ()))]
        images = target_images[torch.randperm(len(target_images))[:2]]
        optimizer.zero_grad()
        logits, _ = network(sample.image[None])
        labels = sample.labels[None]
        functional.cross_entropy(
            logits, labels, size=labels.shape[-2:], align_corners=True
        ).backward()
        logits, _ = network(images)
        (weight * loss(logits, **CALL)).backward()
        optimizer.step()
    return network


adapted = adapt(MaxSquareLoss(), weight=1)
report("maximum squares, 1", adapted)

# %% [markdown]
# ## Collapse
#
# Ten and a hundred times that weight make the network more certain still, and worse: frequent
# classes swallow the others. The entropy, which the loss lowers, cannot tell.

# %%
report("maximum squares, 10", adapt(MaxSquareLoss(), weight=10))
collapsed = adapt(MaxSquareLoss(), weight=100)
report("maximum squares, 100", collapsed)
show(
    ground_truth=plots.colorize(scene.labels, validation.space),
    adapted=prediction(adapted, scene.image),
    collapsed=prediction(collapsed, scene.image),
)

# %% [markdown]
# ## The choice without labels
#
# The *information* of the predictions is the entropy of their mean minus their mean entropy: it is
# high where the network is sure of each pixel and uses all classes. It falls as classes are lost.
# The highest information chooses among the three weights; the lowest entropy would choose the
# collapse.

# %%
weights = {name: row for name, row in results.items() if name.startswith("maximum squares")}
by_information = max(weights, key=lambda name: weights[name][0].information)
by_entropy = min(weights, key=lambda name: weights[name][0].entropy)
for criterion, name in (("information", by_information), ("entropy", by_entropy)):
    print(f"{criterion} chooses {name}, of mIoU {weights[name][1]:.1f}")

_, axes = plt.subplots(1, 3, figsize=(10, 2.4), dpi=70)
values = {
    "entropy": [float(s.entropy) for s, _ in results.values()],
    "information": [float(s.information) for s, _ in results.values()],
    "mIoU (needs labels)": [miou for _, miou in results.values()],
}
for axis, (title, column) in zip(axes, values.items(), strict=True):
    axis.plot(["source", "1", "10", "100"], column, "o-")
    axis.set_title(title)
    axis.set_xlabel("weight")
plt.tight_layout()
plt.show()

# %% [markdown]
# ## When the weight must be large
#
# `InformationMaximizationLoss` adds to a loss the divergence of the mean prediction from uniform,
# which keeps classes from being lost. At the weight that collapsed it keeps more of them. This loss
# raises the information itself: compare by information only runs of the same loss.

# %%
report("with information, 100", adapt(InformationMaximizationLoss(MaxSquareLoss()), weight=100))
folder.cleanup()

# %% [markdown]
# `train_uda.py` does the same at length, with image-wise weights and a second head:
# [the demo](README.md#the-demo).
