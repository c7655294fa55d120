import contextlib

from .checked import CheckedPipeline
from .corrupt import Corrupt
from .long_tailed import LongTailedDataset
from .numpy_images import NumpyImages

__all__ = ['CheckedPipeline', 'Corrupt', 'LongTailedDataset', 'NumpyImages']

# Needs mmseg, which users of other hosts may not have.
with contextlib.suppress(ImportError):
    from .camvid import CamVidDataset

    __all__ += ['CamVidDataset']
