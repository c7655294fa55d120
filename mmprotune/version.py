"""Version of the package, and the versions it needs."""
import warnings
from importlib import metadata

import torch
from mmengine import __version__ as mmengine_version
from mmengine.utils import digit_version

__version__ = '0.1.0'

MINIMUM_TORCH = '2.1.0'
MINIMUM_MMENGINE = '0.10.0'
# Distributions of the same modules: pip does not know that it writes one over the other.
FORKS = {'mmengine': 'onedl-mmengine', 'mmcv': 'onedl-mmcv', 'mmdet': 'onedl-mmdetection',
         'mmsegmentation': 'onedl-mmsegmentation', 'mmpretrain': 'onedl-mmpretrain'}


def is_distribution(name: str) -> bool:
    """Whether something is installed under this name, which need not be a module's."""
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def check_environment() -> None:
    """Refuses versions that lack what the package calls.

    Gated by what is needed, not by distribution names: forks of the OpenMMLab libraries under the
    same import names pass. A fork and its original at once are warned of.

    Raises:
        ImportError: torch or mmengine is too old.
    """
    for name, found, minimum in (('torch', torch.__version__, MINIMUM_TORCH),
                                 ('mmengine', mmengine_version, MINIMUM_MMENGINE)):
        if digit_version(found) < digit_version(minimum):
            raise ImportError(f'mmprotune needs {name}>={minimum}, found {name}=={found}')
    for original, fork in FORKS.items():
        if is_distribution(original) and is_distribution(fork):
            warnings.warn(f'{original} and {fork} are both installed, and have the same files: '
                          'what is there is a mixture; uninstall both, then install one of them',
                          stacklevel=3)
