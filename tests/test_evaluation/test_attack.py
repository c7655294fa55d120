from __future__ import annotations

import copy

import pytest
import torch
from mmengine.model import BaseModel
from mmpretrain.models import ClsDataPreprocessor
from mmpretrain.structures import DataSample
from torch import nn

from mmprotune.errors import OptionError
from mmprotune.evaluation import AttackedClassifier, PixelClassifier, perturb
from mmprotune.evaluation.attack import input_gradients

from ..classification import (
    MEAN,
    STD,
    batch,
    classification_scope,
    classifier_cfg,
    train,
    trained_classifier,
)
from ..conftest import RESNET18, build

pytest.importorskip('foolbox')


@pytest.fixture(scope='module')
def prompted():
    """A frozen ResNet-18 with prompts that tells drawn colours apart."""
    return trained_classifier()


def accuracy(model, pixels, labels) -> float:
    with torch.no_grad():
        return (PixelClassifier(model)(pixels).argmax(1) == labels).float().mean().item() * 100


# --- by hand ----------------------------------------------------------------------------------


class Linear(BaseModel):
    """Logits that are linear in the normalised pixels."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__(ClsDataPreprocessor(mean=MEAN, std=STD, to_rgb=True))
        self.weight = nn.Parameter(weight)

    def forward(self, inputs, data_samples=None, mode='tensor'):
        return inputs.flatten(1) @ self.weight.T


@pytest.fixture
def linear():
    generator = torch.Generator().manual_seed(0)
    return Linear(torch.randn(2, 3 * 4, generator=generator))


def test_pixels_go_through_the_preprocessor(linear):
    pixels = torch.rand(5, 3, 2, 2) * 255
    rgb = pixels.flip(1)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
    expected = ((rgb - mean) / std).flatten(1) @ linear.weight.T
    assert torch.allclose(PixelClassifier(linear)(pixels), expected, atol=1e-5)
    assert torch.allclose(PixelClassifier(linear, scale=1.)(pixels / 255), expected, atol=1e-5)


@pytest.mark.parametrize('kind', ['fgsm', 'pgd'])
def test_attack_on_a_linear_model_by_hand(linear, kind):
    """The worst image is eps towards the other class in every pixel, within 0 to 255."""
    pixels = torch.rand(6, 3, 2, 2) * 255
    pixels[0] = 0.5
    pixels[1] = 254.
    labels = torch.tensor([0, 1, 0, 1, 0, 1])
    towards = (linear.weight[1] - linear.weight[0]).detach().view(3, 2, 2).flip(0)  # as BGR
    sign = torch.where(labels == 0, 1., -1.).view(-1, 1, 1, 1) * towards.sign()
    expected = (pixels + 3 * sign).clamp(0, 255)
    found = perturb(linear, pixels, labels, kind, eps=3., steps=20)
    assert torch.allclose(found, expected, atol=1e-3)


# --- through the frozen backbone --------------------------------------------------------------


@pytest.mark.parametrize('lean', [False, True])
def test_input_gradients_reach_below_the_first_prompt(lean):
    """They equal those of a plain copy of the model in which everything trains."""
    def make(lean):
        with classification_scope():
            return build(classifier_cfg(dict(
                type='mmprotune.PromptedBackbone', backbone=copy.deepcopy(RESNET18), freeze='all',
                lean=lean)))

    model = make(lean)
    train(model, steps=3)
    plain = make(False)
    own, others = (dict(m.named_parameters()) | dict(m.named_buffers()) for m in (plain, model))
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(others[name])
    plain.eval()
    for parameter in plain.parameters():
        parameter.requires_grad_(True)

    pixels, labels = batch(8)
    gradients = []
    for m in (model, plain):
        x = pixels.clone().requires_grad_()
        nn.functional.cross_entropy(PixelClassifier(m)(x), labels).backward()
        gradients.append(x.grad)
    assert gradients[0].abs().min() >= 0 and gradients[0].abs().max() > 0
    assert torch.allclose(*gradients, rtol=1e-3, atol=1e-4 * gradients[1].abs().max().item())


def test_attack_leaves_the_model_as_it_was(prompted):
    prompted.train()
    wanted = {n: p.requires_grad for n, p in prompted.named_parameters()}
    before = {n: t.clone() for n, t in
              [*prompted.named_parameters(), *prompted.named_buffers()]}
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    with torch.no_grad():  # as in a test loop
        attacked = perturb(prompted, *batch(), kind='pgd', eps=2., steps=3)
    assert torch.equal(torch.rand(1), expected)
    assert not attacked.requires_grad
    assert {n: p.requires_grad for n, p in prompted.named_parameters()} == wanted
    assert all(p.grad is None for p in prompted.parameters())
    assert prompted.training
    tensors = dict([*prompted.named_parameters(), *prompted.named_buffers()])
    assert all(torch.equal(tensors[n], t) for n, t in before.items())
    prompted.eval()


def test_gradient_flags_come_back_after_an_error(prompted):
    wanted = [p.requires_grad for p in prompted.parameters()]
    with pytest.raises(RuntimeError, match='inside'), input_gradients(prompted):
        raise RuntimeError('inside')
    assert [p.requires_grad for p in prompted.parameters()] == wanted


# --- is it an attack? -------------------------------------------------------------------------


@pytest.mark.parametrize('kind', ['fgsm', 'pgd', 'noise'])
def test_stays_within_eps_and_bounds(prompted, kind):
    pixels, labels = batch()
    pixels[:, :, :4] = 0.
    pixels[:, :, 4:8] = 255.
    for eps in (0.5, 3.):
        attacked = perturb(prompted, pixels, labels, kind, eps, steps=5)
        assert (attacked - pixels).abs().max() <= eps + 1e-4
        assert (attacked - pixels).abs().max() > 0.9 * eps
        assert attacked.min() >= 0 and attacked.max() <= 255
    assert torch.equal(perturb(prompted, pixels, labels, kind, 0), pixels)


def test_the_attack_really_is_one(prompted):
    """Accuracy falls with epsilon; PGD beats FGSM, and noise by far; 50 steps are no weaker than
    10, and a large epsilon leaves nothing, so gradients are not masked."""
    pixels, labels = batch(32)
    clean = accuracy(prompted, pixels, labels)
    assert clean == 100
    epsilons = (2., 4., 8., 16.)
    curves = {
        name: [accuracy(prompted, perturb(prompted, pixels, labels, kind, eps, steps=steps),
                        labels) for eps in epsilons]
        for name, kind, steps in (('noise', 'noise', 1), ('fgsm', 'fgsm', 1),
                                  ('pgd-10', 'pgd', 10), ('pgd-50', 'pgd', 50))
    }
    for name in ('fgsm', 'pgd-10', 'pgd-50'):
        assert curves[name] == sorted(curves[name], reverse=True), name
    assert curves['pgd-10'][-1] == 0
    assert all(a <= b + 3 for a, b in zip(curves['pgd-50'], curves['pgd-10']))
    assert all(a <= b for a, b in zip(curves['pgd-10'], curves['fgsm']))
    # Where PGD leaves little, noise of the same size does nearly nothing.
    half = next(i for i, value in enumerate(curves['pgd-10']) if value < 50)
    assert curves['noise'][half] > 90


def test_random_starts_repeat(prompted):
    arguments = dict(kind='pgd', eps=2., steps=2)
    first = perturb(prompted, *batch(), **arguments)
    assert torch.equal(perturb(prompted, *batch(), **arguments), first)
    assert not torch.equal(perturb(prompted, *batch(), **arguments, seed=1), first)


def test_autoattack_where_its_first_attack_does(prompted):
    pytest.importorskip('pyautoattack')
    pixels, labels = batch(8)
    attacked = perturb(prompted, pixels, labels, 'autoattack', 16.)
    assert (attacked - pixels).abs().max() <= 16 + 1e-3
    assert attacked.min() >= 0 and attacked.max() <= 255
    assert accuracy(prompted, attacked, labels) == 0


@pytest.mark.slow
def test_all_four_of_autoattack_are_no_weaker_than_pgd(prompted):
    """An epsilon that some images survive, and fewer classes than the nine targets it is set to."""
    pytest.importorskip('pyautoattack')
    pixels, labels = batch(8)
    pgd = accuracy(prompted, perturb(prompted, pixels, labels, 'pgd', 3., steps=20), labels)
    attacked = perturb(prompted, pixels, labels, 'autoattack', 3.)
    assert (attacked - pixels).abs().max() <= 3 + 1e-3
    assert accuracy(prompted, attacked, labels) <= pgd


def test_autoattack_needs_four_classes(linear):
    pytest.importorskip('pyautoattack')
    with pytest.raises(OptionError, match='at least 4 classes, got 2'):
        perturb(linear, torch.rand(2, 3, 2, 2), torch.tensor([0, 1]), 'autoattack', 1.)


# --- in a test loop ---------------------------------------------------------------------------


def data(pixels, labels) -> dict:
    return dict(inputs=pixels.to(torch.uint8),
                data_samples=[DataSample().set_gt_label(int(label)) for label in labels])


def test_wrapper_predicts_for_attacked_images(prompted):
    pixels, labels = batch()
    attacked = AttackedClassifier(prompted, dict(kind='pgd', eps=16., steps=5))
    with torch.no_grad():
        predicted = attacked.test_step(data(pixels, labels))
        clean = prompted.test_step(data(pixels, labels))
    hits = [int(s.pred_label) == int(s.gt_label) for s in predicted]
    assert sum(hits) < 0.5 * len(hits)
    assert all(int(s.pred_label) == int(s.gt_label) for s in clean)


def test_wrapper_loads_the_classifiers_checkpoint(prompted):
    from mmengine.runner.checkpoint import load_state_dict
    with classification_scope():
        wrapper = AttackedClassifier(classifier_cfg(), dict(kind='fgsm', eps=1.))
        # The frozen backbone was drawn at random: the same one is needed for the slim state dict.
        wrapper.module.backbone.backbone.load_state_dict(prompted.backbone.backbone.state_dict())
        wrapper.module.backbone.refresh_fingerprint()
    pixels, labels = batch()
    assert accuracy(wrapper.module, pixels, labels) < 100
    load_state_dict(wrapper, prompted.state_dict(), strict=True)
    assert accuracy(wrapper.module.eval(), pixels, labels) == 100
    assert all(key.startswith('module.') for key in wrapper.state_dict())
    wrapper.load_state_dict(wrapper.state_dict())


@pytest.mark.parametrize(('arguments', 'message'), [
    (dict(kind='pgd', eps=-1), 'eps must be between 0 and 255 .*, got -1'),
    (dict(kind='pgd', eps=256), 'eps must be between 0 and 255'),
    (dict(kind='pgd', eps=float('nan')), 'eps must be between 0 and 255'),
    (dict(kind='pdg', eps=1), "attack must be one of fgsm, pgd, autoattack, noise; got 'pdg'"),
    (dict(kind='pgd', eps=1, steps=0), 'steps must be at least 1, got 0'),
])
def test_wrong_attacks(prompted, arguments, message):
    with pytest.raises(OptionError, match=message):
        perturb(prompted, *batch(), **arguments)
    with pytest.raises(OptionError, match=message):
        AttackedClassifier(prompted, arguments)


def test_normalised_images_are_refused(prompted):
    pixels, labels = batch()
    with pytest.raises(OptionError, match='expected pixels between 0 and 255, got -'):
        perturb(prompted, pixels / 100 - 1, labels, 'fgsm', 1)
