import contextlib

from .long_tailed import LongTailedDataset

__all__ = ['LongTailedDataset']

# Needs mmseg, which users of other hosts may not have.
with contextlib.suppress(ImportError):
    from .camvid import CamVidDataset

    __all__ += ['CamVidDataset']
