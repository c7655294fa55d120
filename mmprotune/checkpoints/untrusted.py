"""Configs that strangers wrote: what may be built of them.

A config that is read without running it can still run things once it is built: MMEngine takes any
importable name as a ``type`` and calls it, ``dict(type='os.system', command='…')`` too.
"""
from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from importlib import import_module

from mmengine.config import Config
from mmengine.registry import Registry
from mmengine.utils import get_object_from_string

from mmprotune.config_nodes import nodes_in
from mmprotune.errors import CheckpointError

HOSTS = ('mmdet', 'mmseg', 'mmpretrain')
# Whose modules may be imported to find out what a dotted name is.
_PACKAGES = ('mmengine', 'mmcv', *HOSTS, 'mmprotune', 'torch', 'torchvision')
# Registered, and given to `eval` or to a loader that runs code of a download.
_RUN_THEIR_ARGUMENTS = ('CameraMotionCompensation', )
_RUN_DOWNLOADS = ('trust_remote_code', )


def check_config(cfg: Config) -> None:
    """Refuses a config by which anything would be called that is not registered.

    Args:
        cfg (Config): Of plain values, as :func:`~mmprotune.config_nodes.parse_config` reads it.

    Raises:
        CheckpointError: Says at which key, what came and what is expected.
    """
    scope = cfg.get('default_scope')
    if scope not in HOSTS:
        raise CheckpointError(f'default_scope must be one of {", ".join(HOSTS)}, got {scope!r}')
    scopes = {scope}
    found = list(nodes_in(cfg._cfg_dict))
    for path, node in found:
        inner = node.get('_scope_')
        if inner is not None and inner not in ('mmengine', 'mmprotune', *HOSTS):
            raise CheckpointError(f'{path}._scope_: expected a library of OpenMMLab, got {inner!r}')
        for key in _RUN_DOWNLOADS:
            if node.get(key):
                raise CheckpointError(f'{path}.{key}={node[key]!r} would run code of a download')
        for kind in (inner, str(node.get('type', '')).partition('.')[0]):
            if kind in HOSTS:
                scopes.add(kind)
    registered = _Registered(scopes)
    for path, node in found:
        kind = node.get('type')
        if kind is None or registered.allows(kind):
            continue
        raise CheckpointError(
            f'{path}.type: expected a registered name, got {kind!r}. Nothing was '
            'built. If it is of a package that you trust, import that package first')


class _Registered:
    """What is registered with the libraries of some scopes.

    Args:
        scopes (set[str]): Names of host libraries; MMEngine and this package come along.
    """

    def __init__(self, scopes: set[str]) -> None:
        self._by_scope: dict[str, dict[str, object]] = {}
        for scope in ('mmengine', 'mmprotune', *sorted(scopes)):
            try:
                module = import_module(f'{scope}.registry')
            except ImportError as error:
                raise CheckpointError(f'the config is of {scope}, which is not installed: '
                                      f'{error}') from error
            names = self._by_scope.setdefault(scope, {})
            for registry in _registries(module):
                registry.import_from_location()
                names.update(registry.module_dict)
        self._bare = {name for names in self._by_scope.values() for name in names}
        self._objects = {id(found) for names in self._by_scope.values()
                         for found in names.values()}

    def allows(self, kind: object) -> bool:
        """Whether a ``type`` leads to something registered, or to nothing that could be called."""
        if not isinstance(kind, str) or not re.fullmatch(r'\w+(\.\w+)*', kind):
            return False
        scope, _, name = kind.rpartition('.')
        if name in _RUN_THEIR_ARGUMENTS:
            return False
        if not scope:
            # Names that their owners look up themselves ('nms', 'RoIAlign', 'pool'). A registry
            # imports a module by that name where there is one.
            return kind in self._bare or importlib.util.find_spec(kind) is None
        if name in self._by_scope.get(scope, {}):
            return True
        # How MMEngine writes the classes of a config in its newer, pure Python style.
        return kind.partition('.')[0] in _PACKAGES and \
            id(get_object_from_string(kind)) in self._objects


def _registries(module: object) -> Iterator[Registry]:
    return (found for found in vars(module).values() if isinstance(found, Registry))
