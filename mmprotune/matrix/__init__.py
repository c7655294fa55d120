"""Checks of every config and backbone of the three hosts: what ``config_matrix.py`` and
``backbone_matrix.py`` stand on."""

LIBRARIES = ('mmdet', 'mmseg', 'mmpretrain')
