import cv2
import numpy as np
import pytest
import torch

from mmprotune import PromptMapHook
from mmprotune.visualization import as_images, draw_prompt_maps
from tests.conftest import build, wake
from tests.detection import detector_cfg, draw_coco, run
from tests.test_models.test_layouts import VIT


def test_pictures_of_validation(prompted_cfg, tmp_path):
    (tmp_path / 'data').mkdir()
    draw_coco(tmp_path / 'data')
    cfg = detector_cfg(prompted_cfg, tmp_path / 'data', tmp_path / 'run', **{
        'train_cfg.max_epochs': 1, 'train_cfg.val_interval': 1,
        'default_hooks.checkpoint.interval': 10})
    cfg.custom_hooks = [dict(type='mmprotune.PromptMapHook', images=2)]
    runner = run(cfg)
    files = sorted((tmp_path / 'run').rglob('vis_image/prompt_map_*.png'))
    assert {file.name.rpartition('_')[0] for file in files} == {
        f'prompt_map_{image}_stage{stage}' for image in (0, 1) for stage in (1, 2, 3, 4)}
    # As large as what the network saw of the image.
    item = runner.val_dataloader.dataset[0]['inputs']
    pictures = [cv2.imread(str(file)) for file in files]
    assert pictures[0].shape == (*item.shape[1:], 3)
    assert len({picture.tobytes() for picture in pictures}) == len(pictures)


@pytest.mark.parametrize('value', [0, 'all', 1.5])
def test_a_number_of_images_that_is_none(value):
    with pytest.raises(ValueError, match='images must be a positive int'):
        PromptMapHook(value)


def test_a_map_is_red_where_its_prompt_acts():
    """Tokens too; the network's input is padded, the picture is not."""
    model = build(dict(type='mmprotune.PromptedBackbone', backbone=VIT, freeze='all')).eval()
    wake(model)
    with torch.no_grad(), model.record_maps() as recorded:
        model(torch.randn(2, 3, 80, 112))
    prompt, feature, size = recorded['stage1']
    assert prompt.shape == feature.shape == (2, 80 // model.stages[0].stride,
                                             112 // model.stages[0].stride)
    assert size == (80, 112) and prompt.min() > 0
    prompt, feature = torch.zeros(1, 10, 14), torch.ones(1, 10, 14)
    prompt[0, 2, 3] = 0.5
    grey = np.full((72, 100, 3), 128, np.uint8)
    (index, name, strongest, picture), = draw_prompt_maps(
        [grey], dict(stage1=(prompt, feature, (80, 112))))
    assert (index, name) == (0, 'stage1') and picture.shape == grey.shape
    assert strongest == pytest.approx(0.5, rel=0.1)
    red = picture[..., 0].astype(int) - picture[..., 2]
    row, column = np.unravel_index(red.argmax(), red.shape)
    assert (row // 8, column // 8) == (2, 3) and red[60, 90] < 0


def test_images_as_they_are_loaded():
    bgr = torch.tensor([10., 20., 300.]).view(3, 1, 1).expand(3, 2, 4)

    class Swaps:
        channel_conversion = True

    image, = as_images([bgr], Swaps())
    assert image.shape == (2, 4, 3) and image[0, 0].tolist() == [255, 20, 10]
    image, = as_images([bgr], object())
    assert image[0, 0].tolist() == [10, 20, 255]
