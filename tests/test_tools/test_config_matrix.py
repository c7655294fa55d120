"""The matrix of stock configs: twenty of them here, sixty drawn ones under -m matrix."""
import importlib.util
import json
import sys

import pytest
import torch
from mmengine.config import Config

from tests.test_tools.conftest import REPO

spec = importlib.util.spec_from_file_location(
    'config_matrix', REPO / 'tools/analysis_tools/config_matrix.py')
matrix = importlib.util.module_from_spec(spec)
sys.modules['config_matrix'] = matrix
spec.loader.exec_module(matrix)

TWENTY = [
    'mmdet::retinanet/retinanet_r18_fpn_1x_coco.py',
    'mmdet::swin/retinanet_swin-t-p4-w7_fpn_1x_coco.py',
    'mmdet::pvt/retinanet_pvtv2-b0_fpn_1x_coco.py',
    'mmdet::rtmdet/rtmdet_tiny_8xb32-300e_coco.py',
    'mmdet::yolox/yolox_nano_8xb8-300e_coco.py',
    # The backbone's rate is a tenth.
    'mmdet::detr/detr_r18_8xb2-500e_coco.py',
    # The rate decays from layer to layer.
    'mmdet::convnext/mask-rcnn_convnext-t-p4-w7_fpn_amp-ms-crop-3x_coco.py',
    # The detector is part of a tracker, of a teacher and a student.
    'mmdet::qdtrack/qdtrack_faster-rcnn_r50_fpn_4e_base.py',
    'mmdet::soft_teacher/soft-teacher_faster-rcnn_r50-caffe_fpn_180k_semi-0.1-coco.py',
    # No pre-trained file but load_from.
    'mmdet::cityscapes/faster-rcnn_r50_fpn_1x_cityscapes.py',
    'mmseg::segformer/segformer_mit-b0_8xb2-160k_ade20k-512x512.py',
    'mmseg::segmenter/segmenter_vit-t_mask_8xb1-160k_ade20k-512x512.py',
    'mmseg::pidnet/pidnet-s_2xb6-120k_1024x1024-cityscapes.py',
    'mmseg::bisenetv1/bisenetv1_r18-d32-in1k-pre_4xb4-160k_coco-stuff164k-512x512.py',
    'mmseg::mobilenet_v3/mobilenet-v3-d8-s_lraspp_4xb4-320k_cityscapes-512x1024.py',
    # The classifier's own init_cfg draws linear layers anew.
    'mmpretrain::swin_transformer/swin-tiny_16xb64_in1k.py',
    'mmpretrain::deit/deit-tiny_4xb256_in1k.py',
    'mmpretrain::convnext_v2/convnext-v2-atto_32xb32_in1k.py',
    'mmpretrain::resnet/resnet18_8xb16_cifar10.py',
    'mmpretrain::simsiam/simsiam_resnet50_8xb32-coslr-100e_in1k.py',
]
