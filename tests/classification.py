"""A small classifier, and drawn images in class folders, that tests can afford."""
from __future__ import annotations

import copy
import pathlib

import cv2
import numpy as np
import torch
from mmengine.registry import DefaultScope

from .conftest import RESNET18, build, wake

CLASSES = ('blue', 'green', 'red', 'white')
COLOURS = np.array([(170, 100, 100), (100, 170, 100), (100, 100, 170), (170, 170, 170)])  # BGR
SIZE = 32  # pixels
MEAN, STD = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]


def classification_scope():
    """Short type names mean mmpretrain's while this is open."""
    return DefaultScope.overwrite_default_scope('mmpretrain')


def draw(label: int, rng: np.random.Generator) -> np.ndarray:
    """A noisy image in the class's colour, (SIZE, SIZE, 3), BGR, uint8."""
    noise = rng.normal(0, 20, (SIZE, SIZE, 3))
    return np.clip(COLOURS[label] + noise, 0, 255).astype(np.uint8)


def draw_folder(folder: pathlib.Path, counts: tuple[int, ...], seed: int = 0) -> pathlib.Path:
    """Writes ``folder/CLASS/NUMBER.png``, ``counts`` images of each class."""
    rng = np.random.default_rng(seed)
    for label, (name, count) in enumerate(zip(CLASSES, counts)):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            cv2.imwrite(str(folder / name / f'{i}.png'), draw(label, rng))
    return folder


def batch(images: int = 24, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels (N, 3, SIZE, SIZE), float, BGR, and labels (N, )."""
    rng = np.random.default_rng(seed)
    labels = torch.arange(images) % len(CLASSES)
    pixels = np.stack([draw(int(label), rng) for label in labels])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float(), labels


def classifier_cfg(backbone: dict | None = None) -> dict:
    """A ResNet-18 of eighth width with prompts, frozen at random, and a linear head."""
    if backbone is None:
        backbone = dict(
            type='mmprotune.PromptedBackbone', backbone=copy.deepcopy(RESNET18), freeze='all')
    return dict(
        type='mmpretrain.ImageClassifier',
        data_preprocessor=dict(
            type='mmpretrain.ClsDataPreprocessor', mean=MEAN, std=STD, to_rgb=True),
        backbone=backbone,
        neck=dict(type='mmpretrain.GlobalAveragePooling'),
        head=dict(
            type='mmpretrain.LinearClsHead', num_classes=len(CLASSES), in_channels=64, topk=(1, ),
            loss=dict(type='mmpretrain.CrossEntropyLoss')))


def train(model, steps: int = 60) -> None:
    """Trains what is not frozen on drawn images."""
    wake(model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=0.01)
    model.train()
    for step in range(steps):
        pixels, labels = batch(seed=100 + step)
        inputs = model.data_preprocessor(dict(inputs=pixels), False)['inputs']
        loss = torch.nn.functional.cross_entropy(model(inputs, mode='tensor'), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    model.eval()


def trained_classifier(**kwargs):
    """A classifier that tells the drawn classes apart."""
    with classification_scope():
        model = build(classifier_cfg(**kwargs))
    train(model)
    return model
