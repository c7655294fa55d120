"""What Pro-tuning promises of a backbone, checked on one."""
from __future__ import annotations

import contextlib
import itertools
import re
import time
import traceback
from collections.abc import Iterator, Sequence

import torch
from mmengine.registry import DefaultScope
from torch import Tensor, nn

from mmprotune.errors import MMProtuneError, StageError
from mmprotune.lean import restore
from mmprotune.lean.base import LeanLayer
from mmprotune.lean.memory import KeptBytes
from mmprotune.models.insertion import INSERT
from mmprotune.registry import MODELS

from .backbones import arguments, backbones

SIZES = ((64, 64), (96, 64), (128, 128), (224, 224), (256, 256), (299, 299), (32, 32), (384, 384),
         (1024, 1024), (192, 192), (160, 192))


class _HostError(MMProtuneError):
    """The backbone itself does not build or run here; says nothing about prompts."""


def _tensors(output) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, dict):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, (tuple, list)):
        for value in output:
            yield from _tensors(value)


def _run(model: nn.Module, image: Tensor) -> list[Tensor]:
    return [t for t in _tensors(model(image)) if t.is_floating_point()]


def _plain(model: nn.Module, image: Tensor) -> list[Tensor]:
    """What the frozen backbone alone returns."""
    with model.without_prompts():
        return _run(model, image)


def _build(cfg: dict, library: str) -> nn.Module:
    with DefaultScope.overwrite_default_scope(library):
        return MODELS.build(cfg)


def check(name: str) -> dict:
    """Runs every check on one backbone.

    Args:
        name (str): ``library.Class``.

    Returns:
        dict: ``name``, ``verdict`` ('pass', 'fail' or 'host'), ``reason`` and what was measured.
    """
    torch.manual_seed(0)
    library = name.partition('.')[0]
    result = dict(name=name, verdict='fail', reason='')
    start = time.monotonic()
    try:
        cls = backbones()[name]
        kwargs = arguments(name, cls)
        result['arguments'] = {k: v for k, v in kwargs.items() if isinstance(v, (str, int))}
        try:
            plain = _build(dict(type=name, **kwargs), library)
            plain.eval()
            sizes = []
            for size in itertools.product((3, 1), SIZES):  # colour; grey where nothing else runs
                if len(sizes) == 2 or sizes and sizes[0][0] != size[0]:
                    break
                with torch.no_grad(), contextlib.suppress(Exception):
                    if _run(plain, torch.randn(2, size[0], *size[1])):
                        sizes.append((size[0], *size[1]))
            if not sizes:
                with torch.no_grad():
                    _run(plain, torch.randn(2, 3, *SIZES[3]))
        except Exception as error:
            raise _HostError(f'{type(error).__name__}: {error}') from error
        del plain
        _check_prompted(name, library, kwargs, sizes, result)
        _check_places(name, library, kwargs, sizes[0], result)
        result['verdict'] = 'pass'
    except _HostError as error:
        result.update(verdict='host', reason=first_line(error))
    except Exception as error:
        result['reason'] = first_line(f'{type(error).__name__}: {error}')
        result['traceback'] = traceback.format_exc()
    result['seconds'] = round(time.monotonic() - start, 1)
    return result


def _check_prompted(name: str, library: str, kwargs: dict, sizes: list, result: dict) -> None:
    model = _build(
        dict(type='mmprotune.PromptedBackbone', freeze='all', backbone=dict(type=name, **kwargs)),
        library)
    # Some layers (TridentConv) leave their weights as the memory was; nothing can be compared then.
    with torch.no_grad():
        for weight in model.backbone.parameters():
            if not weight.isfinite().all() or weight.abs().max() > 1e3:
                weight.normal_(std=0.02)
    model.refresh_fingerprint()
    result['stages'] = [
        dict(path=s.path, index=s.index, channels=s.channels, stride=s.stride, layout=s.layout.kind,
             extra_tokens=s.layout.extra_tokens) for s in model.stages
    ]
    backbone = sum(p.numel() for p in model.backbone.parameters())
    prompts = sum(p.numel() for p in model.prompts.parameters())
    result.update(parameters=backbone, prompt_parameters=prompts,
                  sizes=[list(size[1:]) for size in sizes])

    images = [torch.randn(2, *size) for size in sizes]
    model.eval()
    for image in images:
        torch.manual_seed(0)
        expected = _plain(model, image)
        torch.manual_seed(0)
        found = _run(model, image)
        _require(len(expected) == len(found), 'prompts change the number of outputs')
        _require(all(torch.equal(a, b) for a, b in zip(expected, found)),
                 f'not equal to the frozen backbone at the start, at {tuple(image.shape[2:])}')
    del expected, found

    # Prompts that start at zero would hide from the next checks.
    with torch.no_grad():
        for block in model.prompts.values():
            block.expand.weight.normal_(std=0.02)
        changed = _run(model, images[0])
        _require(any(not torch.equal(a, b) for a, b in zip(changed, _plain(model, images[0]))),
                 'prompts do not reach any output')

    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    before = {n: t.detach().clone() for n, t in (*model.named_parameters(),
                                                 *model.named_buffers())}
    loss = sum(out.float().pow(2).mean() for out in _run(model, images[0])
               if out.requires_grad)
    loss.backward()
    with_gradient = {n for n, p in model.named_parameters() if p.grad is not None}
    declared = {n for n, p in model.named_parameters() if p.requires_grad}
    _require(declared == {f'prompts.{n}' for n, _ in model.prompts.named_parameters()},
             'parameters other than the prompts require gradients')
    _require(with_gradient == declared,
             f'no gradient for {sorted(declared - with_gradient)[:3]}, '
             f'one for {sorted(with_gradient - declared)[:3]}')
    optimizer.step()
    moved = {n for n, t in (*model.named_parameters(), *model.named_buffers())
             if not torch.equal(t, before[n])}
    _require(moved <= declared, f'moved though frozen: {sorted(moved - declared)[:3]}')
    _require(any(n.endswith('expand.weight') for n in moved), 'no prompt moved')

    model.eval()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    _require(not any(k.startswith('backbone.') for k in state), 'the state dict is not slim')
    with torch.no_grad():
        torch.manual_seed(0)
        expected = _run(model, images[0])
        for block in model.prompts.values():
            block.reset_parameters()
        model.load_state_dict(state)
        torch.manual_seed(0)
        _require(all(torch.equal(a, b) for a, b in zip(expected, _run(model, images[0]))),
                 'a slim round trip changes the features')
    _check_lean(model, images[0], result)


def _check_places(name: str, library: str, kwargs: dict, size: tuple, result: dict) -> None:
    """Prompts at the other places; ``result['places']`` counts them, None where there are none."""
    places = result['places'] = {}
    image = torch.randn(2, *size)
    for insert in list(INSERT)[1:]:
        try:
            model = _build(dict(type='mmprotune.PromptedBackbone', freeze='all', insert=insert,
                                backbone=dict(type=name, **kwargs)), library).eval()
        except StageError:
            places[insert] = None
            continue
        places[insert] = len(model.prompts)
        with torch.no_grad():
            for weight in model.backbone.parameters():
                if not weight.isfinite().all() or weight.abs().max() > 1e3:
                    weight.normal_(std=0.02)
            torch.manual_seed(0)
            expected = _plain(model, image)
            torch.manual_seed(0)
            _require(all(map(torch.equal, expected, _run(model, image))),
                     f'insert={insert!r}: not equal to the frozen backbone at the start')
            for block in model.prompts.values():
                block.expand.weight.normal_(std=0.02)
        model.train()
        # Not the mean square, which a norm leaves as it is.
        sum((out.float() * torch.randn(out.shape)).sum()
            for out in _run(model, image) if out.requires_grad).backward()
        missing = [n for n, p in model.prompts.named_parameters() if p.grad is None]
        _require(not missing, f'insert={insert!r}: no gradient for {missing[:3]}')
        declared = {n for n, p in model.named_parameters() if p.requires_grad}
        _require(declared == {f'prompts.{n}' for n, _ in model.prompts.named_parameters()},
                 f'insert={insert!r}: parameters other than the prompts require gradients')


def _check_lean(model: nn.Module, image: Tensor, result: dict) -> None:
    """Compares the lean backbone with the ordinary one; the model is an ordinary one afterwards."""
    def step() -> tuple[list[Tensor], list[Tensor], int]:
        torch.manual_seed(0)
        model.zero_grad()
        with KeptBytes(model) as kept:
            outputs = _run(model, image)
        count = kept.total()
        # Random weights: the mean square of a LayerNorm's output has no gradient to compare.
        generator = torch.Generator().manual_seed(0)
        sum((out.float() * torch.randn(out.shape, generator=generator)).mean()
            for out in outputs if out.requires_grad).backward()
        return outputs, [p.grad for p in model.prompts.parameters()], count

    model.train()
    rounded, _, lean_bytes = step()
    with torch.no_grad():
        torch.manual_seed(0)
        inferred = _run(model, image)
    for layer in model.modules():
        if isinstance(layer, LeanLayer):
            layer.lean.rounds = False
    outputs, gradients, _ = step()
    restore(model)
    expected, exact, naive_bytes = step()
    result.update(lean_bytes=lean_bytes, naive_bytes=naive_bytes)
    _require(all(torch.equal(a, b) for a, b in zip(outputs, expected)),
             'lean layers change the features')
    _require(_distance(rounded, expected) < 1e-4, 'linear layers change the features')
    _require(_distance(inferred, expected) < 1e-4, 'features are others without a graph')
    distance = _distance(gradients, exact)
    _require(distance < 1e-5, f'gradients of lean layers are off by {distance:.1e}')
    _require(lean_bytes <= naive_bytes, f'lean layers keep {lean_bytes} bytes, ordinary ones '
                                        f'{naive_bytes}')


def _distance(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """How far some tensors are from others, relative to the norm of all."""
    difference = sum(float((a.detach().double() - b.detach().double()).square().sum())
                     for a, b in zip(found, expected))
    return (difference / max(1e-60, sum(float(b.detach().double().square().sum())
                                        for b in expected)))**0.5


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise AssertionError(message)


def first_line(text) -> str:
    """A text as one line of at most 240 characters."""
    return re.sub(r'\s+', ' ', str(text)).strip()[:240]
