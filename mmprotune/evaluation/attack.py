"""Adversarial attacks in pixel space, on any classifier of MMPretrain."""
from __future__ import annotations

import contextlib
import math

import torch
from mmengine.model import BaseModel
from torch import Tensor, nn

from mmprotune.errors import OptionError
from mmprotune.registry import MODELS

ATTACKS = ('fgsm', 'pgd', 'autoattack', 'noise')
MAXIMUM = 255.


class PixelClassifier(nn.Module):
    """A classifier's logits as a function of pixels.

    The data preprocessor (channel order, normalisation, padding) is the model's own and part of the
    function, so that a step in the input is a step in pixels.

    Args:
        model (BaseModel): Classifier with ``data_preprocessor`` and ``forward(mode='tensor')``.
        scale (float): Value of the input that stands for 255. Defaults to 255.
    """

    def __init__(self, model: BaseModel, scale: float = MAXIMUM) -> None:
        super().__init__()
        self.model = model
        self.scale = scale

    def forward(self, pixels: Tensor) -> Tensor:
        """Computes the logits.

        Args:
            pixels (Tensor): Images as the pipeline gives them, of shape (N, 3, H, W).

        Returns:
            Tensor: Logits of shape (N, classes).
        """
        if self.scale != MAXIMUM:
            pixels = pixels * (MAXIMUM / self.scale)
        data = self.model.data_preprocessor(dict(inputs=pixels), False)
        return self.model(data['inputs'], mode='tensor')


@contextlib.contextmanager
def input_gradients(model: nn.Module):
    """While open, the model is in eval mode and only inputs get gradients.

    Parameters would collect gradients that nobody asked for; frozen backbones do not build a graph
    below their first trainable part, unless the input asks for it, as it does here.
    """
    training = model.training
    wanted = [p for p in model.parameters() if p.requires_grad]
    model.eval()
    try:
        for parameter in wanted:
            parameter.requires_grad_(False)
        with torch.enable_grad():
            yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)
        model.train(training)


def perturb(model: BaseModel,
            images: Tensor,
            labels: Tensor,
            kind: str,
            eps: float,
            steps: int = 10,
            seed: int = 0,
            version: str = 'standard') -> Tensor:
    """Images within ``eps`` of the given ones (in each pixel) that the model should get wrong.

    FGSM and PGD are foolbox's: it takes bounds of 0 to 255 and eps in the same unit, and any
    function of pixels, so no normalisation is assumed. AutoAttack is its authors' own package,
    pyautoattack. (torchattacks has all three, but asks for a requests of 2021 and installs a
    package named robustbench; foolbox has no AutoAttack.)

    Args:
        model (BaseModel): Classifier with a data preprocessor.
        images (Tensor): Pixels as the pipeline gives them, of shape (N, 3, H, W), 0 to 255.
        labels (Tensor): True labels, shape (N, ).
        kind (str): 'fgsm'; 'pgd', with a random start, cross entropy and steps of
            ``2.5 * eps / steps`` (Madry et al., https://arxiv.org/abs/1706.06083); 'autoattack'
            (Croce and Hein, https://arxiv.org/abs/2003.01690); 'noise': random signs times eps, no
            attack at all, to compare with.
        eps (float): Largest change of a pixel's value, on a scale of 0 to 255.
        steps (int): Steps of PGD. Defaults to 10.
        seed (int): Seed of random starts and noise. Defaults to 0.
        version (str): 'standard' (all four attacks) or 'rand' of AutoAttack. Defaults to
            'standard'.

    Returns:
        Tensor: float32 of shape (N, 3, H, W), within 0 to 255, not rounded.

    Raises:
        ImportError: The package that has the attack is missing.
        OptionError: An argument is out of range, or images are not in 0 to 255.
    """
    check_attack(kind, eps, steps)
    # pyautoattack cannot take other strides.
    images = images.float().contiguous()
    if images.min() < 0 or images.max() > MAXIMUM:
        raise OptionError(f'expected pixels between 0 and 255, got {images.min().item():g} to '
                          f'{images.max().item():g}; normalisation belongs to the data '
                          'preprocessor, not to the pipeline')
    if eps == 0:
        return images
    devices = [images.device] if images.is_cuda else []
    # No draw of an attack may shift what others draw from PyTorch's global generator.
    with torch.random.fork_rng(devices), input_gradients(model):
        torch.manual_seed(seed)
        if kind == 'noise':
            result = images + eps * torch.randint_like(images, 0, 2).mul_(2).sub_(1)
        elif kind == 'autoattack':
            result = _autoattack(model, images, labels, eps, seed, version)
        else:
            result = _foolbox(model, images, labels, kind, eps, steps)
    # float32 rounding of x + eps can end up a hair outside.
    result = torch.minimum(torch.maximum(result.detach(), images - eps), images + eps)
    return result.clamp(0, MAXIMUM)


def _foolbox(model: BaseModel, images: Tensor, labels: Tensor, kind: str, eps: float,
             steps: int) -> Tensor:
    try:
        import foolbox
    except ImportError as error:
        raise ImportError(f'{error}; attack {kind!r} needs: pip install foolbox') from error
    target = foolbox.PyTorchModel(
        PixelClassifier(model).eval(), bounds=(0, MAXIMUM), device=images.device)
    if kind == 'fgsm':
        attack = foolbox.attacks.LinfFastGradientAttack()
    else:
        attack = foolbox.attacks.LinfPGD(abs_stepsize=2.5 * eps / steps, steps=steps)
    # `run`, not the call: the latter gives images back that were wrong before, and checks twice.
    return attack.run(target, images, foolbox.Misclassification(labels), epsilon=eps)


def _autoattack(model: BaseModel, images: Tensor, labels: Tensor, eps: float, seed: int,
                version: str) -> Tensor:
    try:
        from pyautoattack import AutoAttack
    except ImportError as error:
        raise ImportError(f"{error}; attack 'autoattack' needs: pip install pyautoattack "
                          '(Python 3.10 or newer)') from error
    # Made for images in 0 to 1.
    target = PixelClassifier(model, scale=1.).eval()
    with torch.no_grad():
        classes = target(images[:1] / MAXIMUM).size(1)
    if classes < 4:
        raise OptionError(f"attack 'autoattack' needs at least 4 classes, got {classes}: its "
                          'margin loss compares with the third best')
    attack = AutoAttack(
        target, eps=eps / MAXIMUM, norm='Linf', seed=seed, version=version, device=images.device)
    attack.verbose = False
    for targeted in (attack.apgd_targeted, attack.fab):
        targeted.n_target_classes = min(targeted.n_target_classes, classes - 1)
    attacked, _ = attack.run_standard_evaluation(
        images / MAXIMUM, labels, batch_size=len(images))
    return attacked * MAXIMUM


def check_attack(kind: str, eps: float, steps: int = 1) -> None:
    """Raises OptionError for an unknown attack, a negative eps or less than one step."""
    if kind not in ATTACKS:
        raise OptionError(f'attack must be one of {", ".join(ATTACKS)}; got {kind!r}')
    if not (isinstance(eps, (int, float)) and 0 <= eps <= MAXIMUM) or math.isnan(eps):
        raise OptionError(f'eps must be between 0 and 255 (pixel values), got {eps!r}')
    if steps < 1:
        raise OptionError(f'steps must be at least 1, got {steps!r}')


@MODELS.register_module()
class AttackedClassifier(BaseModel):
    """A classifier that is attacked before each test step. A wrapper, as TTA models are.

    Checkpoints of the classifier itself load into it.

    Args:
        module (dict | nn.Module): The classifier, or its config.
        attack (dict): Arguments of :func:`perturb` from ``kind`` on.
        data_preprocessor (dict, optional): Handed on to a classifier that has none; the Runner of
            MMPretrain sets it. Defaults to None.
    """

    def __init__(self,
                 module: dict | nn.Module,
                 attack: dict,
                 data_preprocessor: dict | None = None) -> None:
        super().__init__()
        if isinstance(module, dict):
            if data_preprocessor is not None and not module.get('data_preprocessor'):
                module = dict(module, data_preprocessor=data_preprocessor)
            module = MODELS.build(module)
        self.module = module
        check_attack(**{k: v for k, v in attack.items() if k in ('kind', 'eps', 'steps')})
        self.attack = dict(attack)
        self._batch = 0
        self._register_load_state_dict_pre_hook(_add_prefix)

    def forward(self, inputs, data_samples=None, mode: str = 'tensor'):
        """The classifier's own forward, without an attack."""
        return self.module(inputs, data_samples, mode=mode)

    def test_step(self, data: dict) -> list:
        """Attacks a batch and predicts.

        Args:
            data (dict): ``inputs``, images of one size, and ``data_samples`` with labels.

        Returns:
            list[DataSample]: Predictions for the attacked images.
        """
        inputs, samples = data['inputs'], data['data_samples']
        if not isinstance(inputs, Tensor):
            inputs = torch.stack(list(inputs))
        device = next(self.module.parameters()).device
        labels = torch.cat([sample.gt_label for sample in samples]).to(device)
        # Every batch starts elsewhere, but at the same place in every run.
        attack = dict(self.attack, seed=self.attack.get('seed', 0) + self._batch)
        self._batch += 1
        attacked = perturb(self.module, inputs.to(device), labels, **attack)
        return self.module.test_step(dict(inputs=attacked, data_samples=samples))

    val_step = test_step


def _add_prefix(state_dict: dict, prefix: str, *_) -> None:
    """Load hook: the classifier's keys, as they are in its checkpoints, become the wrapper's."""
    if any(key.startswith(f'{prefix}module.') for key in state_dict):
        return
    for key in [key for key in state_dict if key.startswith(prefix)]:
        state_dict[f'{prefix}module.{key[len(prefix):]}'] = state_dict.pop(key)
