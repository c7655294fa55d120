"""Registries: children of MMEngine's roots, in the scope ``mmprotune``.

``locations`` lets a type written ``mmprotune.X`` import its module from any host's scope, so that
no config needs ``custom_imports``.
"""
from mmengine import registry as _roots

MODELS = _roots.Registry(
    'model', parent=_roots.MODELS, scope='mmprotune', locations=['mmprotune.models'])
HOOKS = _roots.Registry(
    'hook', parent=_roots.HOOKS, scope='mmprotune', locations=['mmprotune.engine.hooks'])
