"""Version of the package, and the versions it needs."""
import torch
from mmengine import __version__ as mmengine_version
from mmengine.utils import digit_version

__version__ = '0.1.0'

MINIMUM_TORCH = '2.1.0'
MINIMUM_MMENGINE = '0.10.0'


def check_environment() -> None:
    """Refuses versions that lack what the package calls.

    Gated by what is needed, not by distribution names: forks of the OpenMMLab libraries under the
    same import names pass.

    Raises:
        ImportError: torch or mmengine is too old.
    """
    for name, found, minimum in (('torch', torch.__version__, MINIMUM_TORCH),
                                 ('mmengine', mmengine_version, MINIMUM_MMENGINE)):
        if digit_version(found) < digit_version(minimum):
            raise ImportError(f'mmprotune needs {name}>={minimum}, found {name}=={found}')
