"""Checks Pro-tuning on every backbone class that mmdet, mmseg and mmpretrain register.

Each backbone is checked in a process of its own, in its smallest architecture, with random weights
and ``freeze='all'``: it builds, its stages are found, prompts at their start change nothing
(bitwise), gradients reach exactly the prompts, one AdamW step moves prompts and nothing else
(bitwise), a slim state dict restores the features, two image sizes run, and lean layers give the
features (bitwise with rounds=False) and gradients of ordinary ones while keeping less. With prompts
at the other places (``insert``), where the backbone has them, it builds, starts as the frozen
backbone, and gradients reach every prompt.
"""
from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import importlib
import inspect
import itertools
import json
import os
import re
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from mmprotune.lean.memory import KeptBytes

LIBRARIES = ('mmdet', 'mmseg', 'mmpretrain')
# Classes that live beside the backbones without being one.
NOT_A_BACKBONE = {
    'mmseg.InterpConv': 'an up-sampling layer of UNet',
    'mmseg.DeconvModule': 'an up-sampling layer of UNet',
}
# Arguments that have no default and no list of architectures to take the smallest from.
_RESNET18 = dict(type='mmseg.ResNetV1c', depth=18, in_channels=3, num_stages=4,
                 out_indices=(0, 1, 2, 3), dilations=(1, 1, 1, 1), strides=(1, 2, 2, 2),
                 norm_cfg=dict(type='BN'))
_STDC = dict(stdc_type='STDCNet1', in_channels=3, channels=(32, 64, 256, 512, 1024),
             bottleneck_type='cat', num_convs=4, norm_cfg=dict(type='BN'),
             act_cfg=dict(type='ReLU'))
ARGUMENTS = {
    'mmdet.TridentResNet': dict(depth=50, num_branch=3, test_branch_idx=1, num_stages=3,
                                strides=(1, 2, 2), dilations=(1, 1, 1),
                                trident_dilations=(1, 2, 3), out_indices=(2, )),
    'mmdet.SSDVGG': dict(depth=16, with_last_pool=False, ceil_mode=True),
    'mmseg.STDCNet': _STDC,
    'mmseg.STDCContextPathNet': dict(
        backbone_cfg=dict(type='mmseg.STDCNet', **_STDC),
        ffm_cfg=dict(in_channels=384, out_channels=256, scale_factor=4)),
    'mmseg.BiSeNetV1': dict(backbone_cfg=_RESNET18, spatial_channels=(64, 64, 64, 128),
                            context_channels=(128, 256, 512)),
    'mmseg.ICNet': dict(backbone_cfg=_RESNET18, in_channels=3, layer_channels=(128, 512),
                        light_branch_middle_channels=32, psp_out_channels=512),
    'mmseg.TIMMBackbone': dict(model_name='resnet18', features_only=True, pretrained=False),
    'mmpretrain.TIMMBackbone': dict(model_name='vit_tiny_patch16_224', pretrained=False),
}
SIZES = ((64, 64), (96, 64), (128, 128), (224, 224), (256, 256), (299, 299), (32, 32), (384, 384),
         (1024, 1024), (192, 192), (160, 192))


def arguments(name: str, cls: type) -> dict:
    """Arguments of the smallest architecture.

    Args:
        name (str): ``library.Class``.
        cls (type): The class.

    Returns:
        dict: Keyword arguments.
    """
    if name in ARGUMENTS:
        return dict(ARGUMENTS[name])
    parameters = {}
    for base in cls.__mro__:
        own = inspect.signature(base.__init__).parameters
        parameters = {**own, **parameters}
        if not any(p.kind is p.VAR_KEYWORD for p in own.values()):
            break  # else it hands the rest on to the next class
    kwargs = {}
    for attribute in ('arch_zoo', 'arch_settings'):
        zoo = getattr(cls, attribute, None)
        if isinstance(zoo, dict) and 'arch' in parameters:
            kwargs['arch'] = min(zoo, key=lambda arch: _weight(zoo[arch]))
            break
        if isinstance(zoo, dict) and 'depth' in parameters:
            kwargs['depth'] = min(zoo)
    if 'extra' in parameters and parameters['extra'].default is inspect.Parameter.empty:
        # The same network in mmpretrain knows its architectures by name.
        keys = ('num_modules', 'num_branches', 'block', 'num_blocks', 'num_channels')
        stages = importlib.import_module('mmpretrain.models').HRNet.arch_zoo['w18']
        kwargs['extra'] = {f'stage{i}': dict(zip(keys, s)) for i, s in enumerate(stages, start=1)}
    return kwargs


def _weight(architecture) -> float:
    """A number that grows with an architecture: the sum of the numbers that describe it."""
    if isinstance(architecture, dict):
        return sum(_weight(v) for v in architecture.values())
    if isinstance(architecture, (list, tuple)):
        return sum(map(_weight, architecture))
    if isinstance(architecture, bool) or not isinstance(architecture, (int, float)):
        return 0
    return architecture


def backbones() -> dict[str, type]:
    """Every registered backbone class by ``library.Class``."""
    found = {}
    for library in LIBRARIES:
        importlib.import_module(f'{library}.models')
        registry = importlib.import_module(f'{library}.registry').MODELS
        for name, cls in sorted(registry.module_dict.items()):
            full = f'{library}.{name}'
            if '.backbones.' in cls.__module__ and full not in NOT_A_BACKBONE:
                found[full] = cls
    return found


# --- one backbone ----------------------------------------------------------------------------


class _HostError(Exception):
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
    from mmengine.registry import DefaultScope

    from mmprotune.registry import MODELS
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
        result.update(verdict='host', reason=_first_line(error))
    except Exception as error:
        result['reason'] = _first_line(f'{type(error).__name__}: {error}')
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
    from mmprotune.errors import StageError
    from mmprotune.models.insertion import INSERT
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
    from mmprotune.lean import restore
    from mmprotune.lean.base import LeanLayer

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


def _first_line(text) -> str:
    return re.sub(r'\s+', ' ', str(text)).strip()[:240]


# --- all of them -----------------------------------------------------------------------------


def _check_in_a_process(name: str, seconds: float) -> dict:
    command = [sys.executable, '-W', 'ignore', __file__, '--one', name]
    env = dict(os.environ, OMP_NUM_THREADS=os.environ.get('OMP_NUM_THREADS', '1'))
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=seconds, env=env, check=False)
    except subprocess.TimeoutExpired:
        return dict(name=name, verdict='fail', reason=f'took longer than {seconds:g} s')
    try:
        return json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        return dict(name=name, verdict='fail',
                    reason=f'the process ended with {done.returncode}: '
                    f'{_first_line(done.stderr[-240:])}')


def markdown(results: Sequence[dict], command: str) -> str:
    """The page ``docs/backbones.md``.

    Args:
        results (Sequence[dict]): Of :func:`check`.
        command (str): What made them.

    Returns:
        str: Markdown.
    """
    import mmdet
    import mmpretrain
    import mmseg

    from mmprotune import __version__
    run = [r for r in results if r['verdict'] != 'host']
    passed = [r for r in run if r['verdict'] == 'pass']
    lines = [
        '# Backbones', '',
        f'{len(passed)} of the {len(run)} backbone classes that build and run here pass every '
        f'check ({len(results)} are registered). Written by `{command}` with mmprotune '
        f'{__version__}, torch {torch.__version__.partition("+")[0]}, '
        f'mmdet {mmdet.__version__}, mmseg {mmseg.__version__}, '
        f'mmpretrain {mmpretrain.__version__}, on a CPU.', '',
        "The checks, each on the smallest architecture with random weights and `freeze='all'`: "
        'stages found; equal to the frozen backbone at the start, bitwise; gradients for exactly '
        'the prompts; one AdamW step moves prompts and nothing else, bitwise; a slim state dict '
        'restores the features; two image sizes (one where the backbone itself takes only one); '
        'lean layers give the features (bitwise with `rounds=False`, else and in inference within '
        '1e-4) and the gradients (1e-5) of ordinary ones. With `insert=` each of the other places: '
        'equal to the frozen backbone at the start, gradients for all prompts and nothing else.',
        '',
        'Prompts are the default block (bottleneck of 4) at every stage; their share is of the '
        "backbone's parameters. `kept` are the bytes that autograd keeps with lean layers, "
        'prompts included, as a share of those with ordinary ones; on images this small a little '
        'more than on large ones. The columns of the other places count their prompts; – where the '
        'backbone has no such place, which is an error that names the others. `host` means that '
        'the backbone itself does not build or run here.', '',
        '| backbone | arguments | stages | channels | prompt parameters | share | kept | blocks | '
        'branches | narrow | outputs | verdict |',
        '|---|---|---|---|---|---|---|---|---|---|---|---|'
    ]
    for r in results:
        stages = r.get('stages', [])
        paths = ', '.join(s['path'] + ('' if s['index'] is None else f"[{s['index']}]")
                          for s in stages[:6]) + (f' … ({len(stages)})' if len(stages) > 6 else '')
        channels = ', '.join(str(s['channels']) for s in stages[:6])
        prompts = r.get('prompt_parameters')
        share = f"{prompts / r['parameters']:.1%}" if prompts else ''
        kept = f"{r['lean_bytes'] / r['naive_bytes']:.0%}" if r.get('naive_bytes') else ''
        kwargs = ', '.join(f'{k}={v}' for k, v in r.get('arguments', {}).items())
        verdict = r['verdict'] + (f": {r['reason']}" if r['reason'] else '')
        places = ' | '.join('–' if count is None else str(count) for count in (
            r.get('places', {}).get(insert, '') for insert in (
                'blocks', 'branches', 'narrow', 'outputs')))
        lines.append(f"| {r['name']} | {kwargs} | {paths} | {channels} | "
                     f"{'' if prompts is None else format(prompts, ',')} | {share} | {kept} | "
                     f"{places} | {verdict.replace('|', '/')} |")
    lines += ['', 'Registered beside the backbones, and none: '
              + '; '.join(f'{k} ({v})' for k, v in NOT_A_BACKBONE.items()) + '.', '']
    return '\n'.join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the tool; returns the exit status: 1 when a backbone fails."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--only', metavar='REGEX', default='', help='names to check')
    parser.add_argument('--jobs', type=int, default=os.cpu_count(), help='processes at a time')
    parser.add_argument('--seconds', type=float, default=300, help='time limit of one backbone')
    parser.add_argument('--out', type=Path, help='write the table here (docs/backbones.md)')
    parser.add_argument('--json', action='store_true', help='print the results on one last line')
    parser.add_argument('--one', metavar='NAME', help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    warnings.simplefilter('ignore')
    if args.one:
        print(json.dumps(check(args.one), default=str))
        return 0
    names = [n for n in backbones() if re.search(args.only, n)]
    if not names:
        parser.error(f'--only: {args.only!r} matches none of the registered backbones')
    with concurrent.futures.ThreadPoolExecutor(max(args.jobs, 1)) as pool:
        pending = {pool.submit(_check_in_a_process, n, args.seconds): n for n in names}
        results = {}
        for done in concurrent.futures.as_completed(pending):
            result = results[pending[done]] = done.result()
            print(f"[{len(results)}/{len(names)}] {result['name']}: {result['verdict']} "
                  f"({result.get('seconds', '?')} s) {result['reason']}", flush=True)
    ordered = [results[n] for n in names]
    run = [r for r in ordered if r['verdict'] != 'host']
    passed = sum(r['verdict'] == 'pass' for r in run)
    print(f'{passed} of {len(run)} backbones that run here pass')
    if args.out:
        command = 'python tools/analysis_tools/backbone_matrix.py' + (
            f" --only '{args.only}'" if args.only else '') + f' --out {args.out}'
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(markdown(ordered, command), encoding='utf-8')
    if args.json:
        print(json.dumps(ordered, default=str))
    return 0 if passed == len(run) else 1


if __name__ == '__main__':
    sys.exit(main())
