"""A student learns from its exponential moving average, on two views of unlabelled images.

torch.optim.swa_utils keeps the average; the teacher sees images as they are, the student distorted.
Low-resolution logits: the teacher's and the student's alike, upsampled within the loss.
align_corners: False, as in torchvision's own forward.
"""

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchvision.models.segmentation import lraspp_mobilenet_v3_large

from maxsquare import InformationMaximizationLoss, MaxSquareLoss, TeacherLoss


def main():
    torch.manual_seed(0)
    student = lraspp_mobilenet_v3_large(num_classes=19, weights_backbone=None)
    teacher = AveragedModel(student, multi_avg_fn=get_ema_multi_avg_fn(0.99), use_buffers=True)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4)
    from_teacher = TeacherLoss(threshold=0.06, average="share")  # 0.968 once it is trained
    keep_classes = InformationMaximizationLoss(MaxSquareLoss())
    for step in range(3):
        images = torch.randn(2, 3, 64, 128)
        distorted = images + 0.1 * torch.randn_like(images)
        with torch.no_grad():
            teacher_logits = teacher.module.classifier(teacher.module.backbone(images))
        logits, call = student.classifier(student.backbone(distorted)), {"size": (64, 128)}
        loss = from_teacher(logits, teacher_logits, **call) + 0.1 * keep_classes(logits, **call)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        teacher.update_parameters(student)
        print(f"step {step}  loss {loss.item():.4f}")


if __name__ == "__main__":
    main()
