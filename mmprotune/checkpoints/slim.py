"""Slim prompt checkpoints, as seen by one prompted backbone.

A slim checkpoint leaves out the frozen tensors and carries a fingerprint of them per prompted
backbone. It is an ordinary MMEngine checkpoint otherwise. The fingerprint ties it to one frozen
backbone: on another one it does not load.
"""
from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from mmengine.logging import print_log
from torch import Tensor, nn

from mmprotune.errors import FingerprintMismatch, FunctionMismatch, IncompleteCheckpoint, listed
from mmprotune.freezing.fingerprint import fingerprint, identity

FINGERPRINT = 'frozen_fingerprint'
FUNCTION = 'frozen_function'
# Rounding on another machine or in TF32 moves outputs less; what a setting changes, more.
FUNCTION_TOLERANCE = 0.005


def prompted_parts(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The prompted backbones in a model, with their dotted paths."""
    return [(path, m) for path, m in model.named_modules() if FINGERPRINT in m._buffers]


def prompt_parameters(model: nn.Module) -> dict[str, dict[str, nn.Parameter]]:
    """What trains inside the prompted backbones of a model.

    Args:
        model (nn.Module): Any model; one without prompted backbones has none.

    Returns:
        dict[str, dict[str, nn.Parameter]]: Parameters that require a gradient, by their dotted
        names in the model, in two groups: 'prompts', and 'backbone' for what the pre-trained file
        left to train or ``trainable`` names.
    """
    groups: dict[str, dict[str, nn.Parameter]] = dict(prompts={}, backbone={})
    for path, part in prompted_parts(model):
        prompts = {id(param) for param in part.prompts.parameters()}
        for name, param in part.named_parameters(prefix=path):
            if param.requires_grad:
                groups['prompts' if id(param) in prompts else 'backbone'][name] = param
    return groups


def training_names(part: nn.Module) -> list[str]:
    """Dotted names of the parameters of a prompted backbone's frozen network that train."""
    return [name for name, _ in part.backbone.named_parameters() if name not in part.frozen_names]


def hex_of(sha: Tensor) -> str:
    """A fingerprint as text."""
    return bytes(int(byte) % 256 for byte in sha.flatten().tolist()).hex()


def short(sha: Tensor) -> str:
    """The beginning of a fingerprint, for a message."""
    return f'{hex_of(sha)[:16]}…'


@dataclass
class _FullLoad:
    """A state dict that brings the frozen tensors too.

    Attributes:
        frozen (dict[str, Tensor]): Those that make the backbone the same one, as they are to be
            loaded, by dotted name in the backbone.
        has_function (bool): Whether it says what the network computes.
        checked (bool): Whether they came with a fingerprint, and what arrives is to be checked.
        cast (bool): Whether the model was cast as a whole since it was built (``model.half()``).
    """
    frozen: dict[str, Tensor]
    has_function: bool
    checked: bool
    cast: bool

    def verify(self, module: nn.Module) -> None:
        before = module.own_fingerprint
        module.refresh_fingerprint()
        if not self.has_function and module.own_fingerprint == before:
            module.refresh_function()
        if self.checked:
            arrived = module.frozen_tensors()
            expected = fingerprint({n: t.to(arrived[n].dtype) for n, t in self.frozen.items()})
            if not torch.equal(expected, module.frozen_fingerprint.cpu()):
                raise FingerprintMismatch(
                    'the frozen tensors are not what the checkpoint holds after loading it: '
                    f'expected {short(expected)}, got {short(module.frozen_fingerprint)}')
        if self.cast:
            # The identity stays that of the weights before the cast, as for one that was built
            # with them: slim files of it load before the cast and after.
            sha = fingerprint(self.frozen)
            module.frozen_fingerprint.copy_(sha)
            module.own_fingerprint = hex_of(sha)


def _check_together(where: str, sha: Tensor, own: Mapping[str, Tensor],
                    frozen: Mapping[str, Tensor]) -> bool:
    """Raises when the frozen tensors that came do not have the fingerprint that came with them.

    They are looked at as they came, in their own precision.

    Returns:
        bool: Whether the file's model froze the same ones.
    """
    found = fingerprint({name: own.get(f'backbone.{name}', tensor)
                         for name, tensor in identity(frozen).items()})
    if torch.equal(sha.cpu(), found):
        return True
    # Where the file's model froze everything and this one does not, the file is whole too.
    inner = {key.partition('.')[2]: t for key, t in own.items() if key.startswith('backbone.')}
    if not torch.equal(sha.cpu(), fingerprint(identity(inner))):
        raise FingerprintMismatch(
            f'{where}: the frozen tensors in the checkpoint do not match the fingerprint in it: '
            f'expected {short(sha)}, got {short(found)}; the file is damaged or was put '
            'together from two, or `freeze` and `trainable` were others')
    return False


def _prepare(where: str, backbone: nn.Module, own: dict[str, Tensor]) -> None:
    """Lets the backbone's own load hooks have their way with a state dict; they resize tables.

    Hosts run them too late: when the shapes have been compared. Those that find nothing to do,
    as after this, change nothing.

    Args:
        where (str): For the error.
        backbone (nn.Module): The wrapped backbone.
        own (dict[str, Tensor]): State dict of the prompted one; changed in place.
    """
    inner = {key.partition('.')[2]: t for key, t in own.items() if key.startswith('backbone.')}
    before = dict(inner)
    try:
        for path, module in backbone.named_modules():
            for hook in module._load_state_dict_pre_hooks.values():
                hook(inner, f'{path}.' if path else '', {}, True, [], [], [])
    except Exception as error:  # a stranger's shapes
        first = (str(error).strip().splitlines() or [''])[0]
        raise IncompleteCheckpoint(f'{where}: the checkpoint does not fit: '
                                   f'{type(error).__name__}: {first}') from error
    # What hooks leave out is computed by the backbone: it stays as it is, and is not missing.
    present = backbone.state_dict()
    inner.update((key, present[key]) for key in before if key not in inner and key in present)
    for key in before:
        if key not in inner:
            del own[f'backbone.{key}']
    own.update((f'backbone.{key}', tensor) for key, tensor in inner.items())


def _check_sizes(where: str, module: nn.Module, own: Mapping[str, Tensor], prefix: str) -> None:
    """Raises where prompts of the same names have other shapes."""
    other = [f'prompts.{name}: expected {tuple(tensor.shape)}, got {tuple(came.shape)}'
             for name, tensor in module.prompts.state_dict().items()
             if isinstance(came := own.get(f'prompts.{name}'), Tensor)
             and came.shape != tensor.shape]
    if other:
        raise IncompleteCheckpoint(
            f'{where}: the prompts in the checkpoint have other shapes: {listed(other)}; set '
            f'{_key("prompt", prefix)} to what they were trained with (reduction, hidden, '
            'kernel_size, …)')


def _key(name: str, prefix: str) -> str:
    """A key of the backbone, named from the top of the config."""
    return f'model.{prefix}{name}' if prefix else name


def _check_function(where: str, module: nn.Module, found: Tensor, own: Tensor,
                    frozen: Mapping[str, Tensor] | None = None) -> None:
    """Raises where a network of the same weights, or of those in ``frozen``, computes something
    else."""
    if found.shape != own.shape:
        raise IncompleteCheckpoint(f'{where}: {FUNCTION}: expected {tuple(own.shape)}, '
                                   f'got {tuple(found.shape)}')
    plain, prompted = module.function_distance(found, own)
    # Stored in 16 bits, weights round.
    lowest = min((t.element_size() for t in module.frozen_tensors().values()
                  if t.is_floating_point()), default=4)
    tolerance = FUNCTION_TOLERANCE * (1 if lowest >= 4 else 6)
    if max(plain, prompted) > tolerance:
        # Older versions took an image of another size for some backbones.
        former = module.function_of(frozen, former=True)
        if former.any():
            plain, prompted = module.function_distance(found, former)
    if plain > tolerance:
        raise FunctionMismatch(
            f'{where}: the checkpoint has the weights of this backbone, but was trained with one '
            f'that computes something else (outputs differ by {plain:.2g} of their size): check '
            'what backbone sets besides its weights (strides, dilations, style, activations, …)')
    if prompted > tolerance:
        raise FunctionMismatch(
            f'{where}: the prompts in the checkpoint were trained to act in another way (outputs '
            f'differ by {prompted:.2g} of their size): check prompt, insert, stages, stem and '
            f'last_stage; here last_stage={module.last_stage!r}, '
            f'stages={[s.path for s in module.stages]}')


def _check_places(where: str, module: nn.Module, own: Mapping[str, Tensor], prefix: str) -> None:
    """Raises where prompts stand at places of another kind, which their names tell."""
    came = {key.split('.')[1] for key in own if key.startswith('prompts.')} - {'stem'}
    here = set(module.prompts) - {'stem'}
    kinds = {name.rstrip('0123456789_') for name in came}
    if not came or not here or kinds & {name.rstrip('0123456789_') for name in here}:
        return
    from mmprotune.models.insertion import INSERT  # models import this module
    values = [repr(value) for value, kind in INSERT.items() if kind in kinds]
    hint = f'; set {_key("insert", prefix)}={" or ".join(values)}' if values else ''
    raise IncompleteCheckpoint(
        f'{where}: the checkpoint has prompts at {listed(sorted(came))}, this model, with '
        f'insert={module.insert!r}, at {listed(sorted(here))}{hint}')


def check_incoming(module: nn.Module, state_dict: dict[str, Tensor], prefix: str,
                   quiet: bool = False) -> None:
    """Checks a state dict before a prompted backbone loads it; called by the backbone.

    Three kinds come: slim (prompts and a fingerprint), full (the frozen tensors as well) and stock
    (the keys of the plain backbone, which are renamed in place). Each is checked to the last key,
    whatever the caller's ``strict``: a backbone that is half another one is never what was meant.

    Args:
        module (nn.Module): The prompted backbone.
        state_dict (dict[str, Tensor]): What is about to be loaded; renamed keys are changed in it.
        prefix (str): Prefix of the backbone's keys.
        quiet (bool): Whether to say nothing in the log. Defaults to False.

    Raises:
        FingerprintMismatch: A slim file of another frozen backbone.
        FunctionMismatch: One of a network that computes something else.
        IncompleteCheckpoint: Keys are missing or have other shapes.
    """
    own = {k[len(prefix):]: v for k, v in state_dict.items() if k.startswith(prefix)}
    if not own:
        return
    where = f'{prefix[:-1] or "the model"} ({type(module.backbone).__name__})'
    inner = {n: t for n, t in module.backbone.state_dict().items() if isinstance(t, Tensor)}
    prompted = FINGERPRINT in own or any(
        k.startswith('prompts.') or k.partition('.')[2] in inner and k.startswith('backbone.')
        for k in own)
    if not prompted:
        matching = [k for k in own if k in inner]
        if not matching:
            return  # nothing of this backbone; the host reports missing and unexpected keys
        for key in matching:
            state_dict[f'{prefix}backbone.{key}'] = state_dict.pop(prefix + key)
            own[f'backbone.{key}'] = own.pop(key)
        # A stock file brings no prompts: they stay as they are, and are not missing.
        for key, tensor in module.prompts.state_dict().items():
            own[f'prompts.{key}'] = state_dict[f'{prefix}prompts.{key}'] = tensor
        own[FINGERPRINT] = state_dict[prefix + FINGERPRINT] = module.frozen_fingerprint
        if not quiet:
            print_log(f'{where}: a stock checkpoint fills the backbone, prompts keep their weights',
                      logger='current')
    function = own.get(FUNCTION)
    if function is None:
        state_dict[prefix + FUNCTION] = module.frozen_function
        if prompted and not quiet:
            print_log(f'{where}: the checkpoint is of an older version, which did not note what '
                      'the network computes: whether settings besides the weights (insert, stages, '
                      'last_stage, prompt, strides, …) are those of its training is not checked',
                      logger='current', level=logging.WARNING)

    wanted = {f'backbone.{n}': t for n, t in inner.items()}
    wanted.update((f'prompts.{n}', t) for n, t in module.prompts.state_dict().items())
    frozen = {f'backbone.{n}' for n in module.frozen_names if f'backbone.{n}' in wanted}
    full = any(k in own for k in frozen)
    if not full:
        module.require_weights()
        if FINGERPRINT not in own:
            raise IncompleteCheckpoint(
                f'{where}: the checkpoint holds neither the frozen backbone nor its fingerprint, '
                'so it cannot be told which backbone it belongs to; its keys: '
                f'{listed(sorted(own))}')
        if own[FINGERPRINT].shape != (32, ) or not torch.equal(
                own[FINGERPRINT].cpu(), module.frozen_fingerprint.cpu()):
            raise FingerprintMismatch(
                f'{where}: the checkpoint was trained on another frozen backbone: expected '
                f'fingerprint {short(module.frozen_fingerprint)}, got '
                f'{short(own[FINGERPRINT].flatten())}; check backbone.init_cfg and '
                'frozen_from')
        wanted = {k: t for k, t in wanted.items() if k not in frozen}
    _check_places(where, module, own, prefix)
    _check_sizes(where, module, own, prefix)
    if not full and function is not None:
        _check_function(where, module, function, module.frozen_function)
    came = dict(own)
    if full:
        _prepare(where, module.backbone, own)
        for key in set(came) - set(own):
            del state_dict[prefix + key]
        state_dict.update((prefix + key, tensor) for key, tensor in own.items())
    compare(where, wanted, {k: v for k, v in own.items() if k not in (FINGERPRINT, FUNCTION)})
    full_load = None
    if full:
        present = {n: inner[n] for n in module.frozen_names if n in inner}
        # Which tensors were frozen is not known where the pre-trained file was not to be had.
        known = prompted and not module.lacks_weights
        checked = known and FINGERPRINT in own
        coming = {n: own.get(f'backbone.{n}', present[n]) for n in identity(present)}
        # Before anything is loaded; _FullLoad looks once more at what has arrived.
        same = checked and _check_together(where, own[FINGERPRINT], came, {
            # Without what load hooks have made of it, scales of weights that are to be in 8 bits.
            n: t for n, t in present.items()
            if f'backbone.{n}' in came or f'backbone.{n}' not in own})
        # What was resized, or trained there and not here, computes something else.
        has_function = same and function is not None and all(
            own.get(key) is tensor for key, tensor in came.items())
        if has_function:
            _check_function(where, module, function, module.function_of(coming), coming)
        full_load = _FullLoad(coming, has_function=has_function, checked=checked,
                              cast=_was_cast(module, present, coming))
    module.__dict__['_incoming'] = prefix, full_load


def _was_cast(module: nn.Module, present: Mapping[str, Tensor],
              coming: Mapping[str, Tensor]) -> bool:
    """Whether a model's frozen tensors are in another precision than their fingerprint is of."""
    return any(present[name].dtype != tensor.dtype for name, tensor in coming.items()) and \
        bool(module.frozen_fingerprint.any()) and not torch.equal(
            module.frozen_fingerprint.cpu(), fingerprint({n: present[n] for n in coming}))


def compare(where: str, wanted: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    """Raises when ``found`` lacks a key of ``wanted``, has others, or has other shapes."""
    optional = {k for k in wanted if k.endswith('num_batches_tracked')}
    missing = set(wanted) - set(found) - optional
    left_over = {k for k in set(found) - set(wanted) if not k.endswith('num_batches_tracked')}
    both = [(k, wanted[k], found[k]) for k in wanted if isinstance(found.get(k), Tensor)]
    shapes = [f'{k}: expected {tuple(a.shape)}, got {tuple(b.shape)}'
              for k, a, b in both if a.shape != b.shape]
    kinds = [f'{k}: expected {a.dtype}, got {b.dtype}' for k, a, b in both
             if a.is_floating_point() != b.is_floating_point() or a.is_complex() != b.is_complex()]
    parts = []
    if missing:
        parts.append(f'missing: {listed(sorted(missing))}')
    if left_over:
        parts.append(f'not expected: {listed(sorted(left_over))}')
    if shapes:
        parts.append(f'other shapes: {listed(sorted(shapes))}')
    if kinds:
        parts.append(f'other types: {listed(sorted(kinds))}')
    if parts:
        raise IncompleteCheckpoint(f'{where}: the checkpoint does not fit: ' + '; '.join(parts))
