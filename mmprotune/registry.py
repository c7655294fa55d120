"""Where MMEngine finds what the package has: components, and configs by ``mmprotune::…``.

The registries are children of MMEngine's roots, in the scope ``mmprotune``.

``locations`` lets a type written ``mmprotune.X`` import its module from any host's scope, so that
no config needs ``custom_imports``.
"""
from importlib.util import find_spec

from mmengine import registry as _roots
from mmengine.config.utils import MODULE2PACKAGE

from .version import is_distribution

# MMEngine looks `mmseg::…` up under the distribution's name, mmsegmentation. A host that comes from
# another distribution (a fork) or from a source tree is there all the same: by its module's name it
# is found, where MMEngine would refuse it, or go and install the other distribution over it.
for _module, _package in list(MODULE2PACKAGE.items()):
    if _module != _package and not is_distribution(_package) and find_spec(_module) is not None:
        MODULE2PACKAGE[_module] = _module

# The name of a distribution is expected. Where that is installed in editable mode, its place is not
# that of the module; of a module that is no distribution, MMEngine takes the folder.
MODULE2PACKAGE['mmprotune'] = 'mmprotune.registry'

MODELS = _roots.Registry(
    'model', parent=_roots.MODELS, scope='mmprotune',
    locations=['mmprotune.models', 'mmprotune.evaluation'])
HOOKS = _roots.Registry(
    'hook', parent=_roots.HOOKS, scope='mmprotune', locations=['mmprotune.engine.hooks'])
DATASETS = _roots.Registry(
    'dataset', parent=_roots.DATASETS, scope='mmprotune', locations=['mmprotune.datasets'])
TRANSFORMS = _roots.Registry(
    'transform', parent=_roots.TRANSFORMS, scope='mmprotune',
    locations=['mmprotune.datasets'])
METRICS = _roots.Registry(
    'metric', parent=_roots.METRICS, scope='mmprotune', locations=['mmprotune.evaluation'])
EVALUATOR = _roots.Registry(
    'evaluator', parent=_roots.EVALUATOR, scope='mmprotune', locations=['mmprotune.evaluation'])
OPTIM_WRAPPER_CONSTRUCTORS = _roots.Registry(
    'optimizer wrapper constructor', parent=_roots.OPTIM_WRAPPER_CONSTRUCTORS, scope='mmprotune',
    locations=['mmprotune.engine.optim'])
MODEL_WRAPPERS = _roots.Registry(
    'model_wrapper', parent=_roots.MODEL_WRAPPERS, scope='mmprotune',
    locations=['mmprotune.engine.processes'])
