"""Pre-trains the backbone of a detector's config on the drawn classification task.

``tools/quickstart.py`` starts it; MMEngine's Runner does the work. The file it writes is an
ordinary one: the state dict of the stock backbone, tensors only.
"""
from __future__ import annotations

import argparse
import os
from pathlib import Path

import cv2
import numpy as np
import torch
from mmdet.models.backbones import ResNet
from mmengine.config import Config
from mmengine.evaluator import BaseMetric
from mmengine.model import BaseModel, ImgDataPreprocessor
from mmengine.runner import Runner
from quickstart_data import MOTIFS, pretraining_image, stream
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Dataset

SIDE = 64  # pixels
EPOCHS = 3


class DrawnMotifs(Dataset):
    """Plain motifs; the class runs through all classes in turn."""

    def __init__(self, number: int, seed: int, split: str) -> None:
        self.metainfo = dict(classes=MOTIFS)
        self.labels = [i % len(MOTIFS) for i in range(number)]
        self.images = torch.from_numpy(np.stack([
            pretraining_image(label, SIDE, stream(seed, split, i))
            for i, label in enumerate(self.labels)])).permute(0, 3, 1, 2)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict:
        return dict(inputs=self.images[index], data_samples=self.labels[index])


class Classifier(BaseModel):
    """A stock backbone, average pooling, one linear layer."""

    def __init__(self, backbone: nn.Module, preprocessor: dict) -> None:
        super().__init__(ImgDataPreprocessor(**preprocessor))
        self.backbone = backbone
        self.head = nn.Linear(backbone.feat_dim, len(MOTIFS))

    def forward(self, inputs: torch.Tensor, data_samples: list[int], mode: str = 'tensor'):
        """Logits (N, classes), ``dict(loss=…)`` or, per image, whether it was right."""
        logits = self.head(self.backbone(inputs)[-1].mean((2, 3)))
        target = torch.as_tensor(data_samples, device=logits.device)
        if mode == 'loss':
            return dict(loss=F.cross_entropy(logits, target))
        if mode == 'predict':
            return (logits.argmax(1) == target).tolist()
        return logits


class Accuracy(BaseMetric):
    """Share of right answers, 0..1."""

    default_prefix = 'drawn'

    def process(self, data_batch: dict, data_samples: list[bool]) -> None:
        """Keep one bool an image."""
        self.results.extend(data_samples)

    def compute_metrics(self, results: list[bool]) -> dict:
        """Average them."""
        return dict(accuracy=sum(results) / len(results))


def pretrain(backbone: dict, preprocessor: dict, out: Path, seed: int, number: int,
             number_val: int, batch_size: int = 64) -> None:
    """Train a backbone and save it under its stock keys.

    Args:
        backbone (dict): Config of an mmdet ResNet; what it says about freezing does not count.
        preprocessor (dict): mean, std and bgr_to_rgb, as the detector will use them.
        out (Path): File for the state dict of the backbone; logs go beside it.
        seed (int): Seed of the drawing and of the initial weights.
        number (int): Images to train on.
        number_val (int): Other images, to measure the accuracy on.
        batch_size (int): Images a step.
    """
    torch.manual_seed(seed)
    settings = {key: value for key, value in backbone.items() if key not in ('type', 'init_cfg')}
    settings.update(frozen_stages=-1, norm_eval=False, norm_cfg=dict(type='BN'))
    model = Classifier(ResNet(**settings), preprocessor)

    def loader(split: str, length: int, shuffle: bool) -> dict:
        return dict(
            dataset=DrawnMotifs(length, seed, split), batch_size=batch_size, num_workers=0,
            sampler=dict(type='DefaultSampler', shuffle=shuffle),
            collate_fn=dict(type='default_collate'))

    steps = EPOCHS * -(-number // batch_size)
    runner = Runner(
        model=model, work_dir=str(out.parent / 'pretraining'), experiment_name='pretraining',
        default_scope='mmengine', randomness=dict(seed=seed),
        train_dataloader=loader('pretrain', number, True),
        train_cfg=dict(by_epoch=True, max_epochs=EPOCHS, val_interval=EPOCHS),
        optim_wrapper=dict(optimizer=dict(type='AdamW', lr=2e-3, weight_decay=0.05)),
        param_scheduler=dict(type='OneCycleLR', eta_max=2e-3, total_steps=steps, by_epoch=False),
        val_dataloader=loader('pretrain-val', number_val, False), val_cfg=dict(),
        val_evaluator=[Accuracy()],
        default_hooks=dict(checkpoint=None,
                           logger=dict(type='LoggerHook', interval=max(1, steps // 9))))
    runner.train()

    partial = out.with_name(out.name + '.part')
    torch.save(model.backbone.state_dict(), partial)
    os.replace(partial, out)


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description='Pre-train a backbone on drawn motifs')
    parser.add_argument('config', help='config of the detector that the backbone is for')
    parser.add_argument('--out', type=Path, required=True, help='file for the backbone')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--images', type=int, default=12000, help='images to train on')
    parser.add_argument('--val-images', type=int, default=1200, help='other images, to test on')
    args = parser.parse_args(argv)

    cv2.setNumThreads(1)  # torch has the cores
    model = Config.fromfile(args.config).model
    preprocessor = {key: model.data_preprocessor[key] for key in ('mean', 'std', 'bgr_to_rgb')}
    pretrain(model.backbone.get('backbone', model.backbone), preprocessor, args.out, args.seed,
             args.images, args.val_images)


if __name__ == '__main__':
    main()
