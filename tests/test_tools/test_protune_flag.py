"""``tools/train.py --protune`` on configs as mmseg and mmpretrain ship them; only data are ours."""
import cv2
import numpy as np
import pytest
import torch

from mmprotune import checkpoint

from .conftest import load_tool

SIZE = 64  # pixels


@pytest.fixture
def segmentation(tmp_path) -> list[str]:
    """Options for an ADE20K-like folder with two images."""
    rng = np.random.default_rng(0)
    for part in ('training', 'validation'):
        for folder, shape, suffix, top in (('images', (SIZE, SIZE, 3), 'jpg', 256),
                                           ('annotations', (SIZE, SIZE), 'png', 151)):
            path = tmp_path / folder / part
            path.mkdir(parents=True)
            for i in range(2):
                picture = rng.integers(0, top, shape, dtype=np.uint8)
                cv2.imwrite(str(path / f'{i}.{suffix}'), picture)
    return [
        *(f'{part}_dataloader.dataset.data_root={tmp_path}' for part in ('train', 'val', 'test')),
        f'train_dataloader.dataset.pipeline.2.scale=({2 * SIZE},{SIZE})',
        f'train_dataloader.dataset.pipeline.3.crop_size=({SIZE},{SIZE})',
        f'model.data_preprocessor.size=({SIZE},{SIZE})', 'train_cfg.max_iters=2',
        'train_cfg.val_interval=2', 'default_hooks.checkpoint.interval=2',
        f'val_dataloader.dataset.pipeline.1.scale=({2 * SIZE},{SIZE})',
    ]


@pytest.fixture
def classification(tmp_path) -> list[str]:
    """Options for a folder with two classes of two images each."""
    rng = np.random.default_rng(0)
    for part in ('train', 'val'):
        for name in 'ab':
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(2):
                picture = rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
                cv2.imwrite(str(tmp_path / part / name / f'{i}.png'), picture)
    return [
        *(f'{part}_dataloader.dataset.{option}' for part in ('train', 'val', 'test')
          for option in ('metainfo.classes=a,b', f'data_root={tmp_path}')),
        *(f'{part}_dataloader.batch_size=2' for part in ('train', 'val', 'test')),
        f'train_dataloader.dataset.pipeline.1.scale={SIZE}', 'model.head.num_classes=2',
        f'val_dataloader.dataset.pipeline.1.scale={SIZE}',
        f'val_dataloader.dataset.pipeline.2.crop_size={SIZE}', 'model.head.topk=1,',
        'val_evaluator.topk=1,', 'train_cfg.max_epochs=1',
    ]


@pytest.mark.parametrize('config, data, saved', [
    ('mmseg::segformer/segformer_mit-b0_8xb2-160k_ade20k-512x512.py', 'segmentation', 'iter_2'),
    ('mmpretrain::mobilenet_v2/mobilenet-v2_8xb32_in1k.py', 'classification', 'epoch_1'),
])
def test_a_stock_config_trains_prompts_and_head(config, data, saved, tmp_path, request):
    options = request.getfixturevalue(data)
    loaders = (f'{part}_dataloader.{option}' for part in ('train', 'val')
               for option in ('num_workers=0', 'persistent_workers=False'))
    load_tool('train.py').main([
        config, '--protune', '--work-dir', str(tmp_path / 'run'), '--cfg-options',
        'model.backbone.freeze=all', 'model.backbone.backbone.init_cfg=None', 'randomness.seed=0',
        *loaders, *options])
    content = checkpoint.read(tmp_path / 'run' / f'{saved}.pth')
    names = content['state_dict'].keys()
    prompts = [n for n in names if n.startswith('backbone.prompts.') and n.endswith('weight')]
    assert prompts and not any(n.startswith('backbone.backbone.') for n in names)
    assert any('head.' in n for n in names)
    # Prompts started at zero, and moved.
    assert any(torch.any(content['state_dict'][n] != 0) for n in prompts if '.expand.' in n)
    assert content['meta']['mmprotune']['backbones'].keys() == {'backbone'}
