"""What training leaves behind is packed, tested, used and trained on from."""
import json
import pathlib

import pytest
import torch
import yaml
from mmengine.runner import set_random_seed

import mmprotune
from mmprotune import checkpoint
from mmprotune.checkpoints import convert
from mmprotune.engine import adapter

from .conftest import load_tool

pytest.importorskip('safetensors')
tool = load_tool('prompt_checkpoint.py')


@pytest.fixture
def seeded(monkeypatch):
    """The project's backbone is frozen as it is drawn, with seed 0; in earnest a file fills it."""
    build = adapter.build_model

    def seed_and_build(cfg):
        set_random_seed(0)
        return build(cfg)

    for module in (adapter, convert):
        monkeypatch.setattr(module, 'build_model', seed_and_build)


def test_a_run_is_packed_tested_and_used(project, trained, tmp_path, seeded):
    from mmdet.apis import inference_detector
    out = tmp_path / 'squares'
    tool.main(['pack', str(pathlib.Path(trained).parent), str(out)])
    front = yaml.safe_load((out / 'README.md').read_text().split('---\n')[1])
    metrics = front['model-index'][0]['results'][0]['metrics']
    assert front['pipeline_tag'] == 'object-detection' and len(metrics) > 3

    load_tool('test.py').main([str(out / 'config.py'), str(out / 'adapter.safetensors'),
                               '--work-dir', str(tmp_path / 'test')])
    found = json.loads(next((tmp_path / 'test').glob('*/*.json')).read_text())
    assert {m['type']: m['value'] for m in metrics}.items() <= found.items()

    model = mmprotune.load(out)
    result = inference_detector(model, str(project.folder / '0.png'))
    assert len(result.pred_instances.scores)
    assert model.dataset_meta['classes'] == ['square', 'other']
    trunk = mmprotune.FrozenTrunk('cpu')
    set_random_seed(0)
    trunk.add('squares', out / 'adapter.safetensors', out / 'config.py')
    again = trunk(str(project.folder / '0.png'))['squares']
    assert torch.equal(again.pred_instances.scores, result.pred_instances.scores)


def test_prompts_alone_start_another_task(project, trained, tmp_path, seeded):
    prompts = tmp_path / 'prompts.pth'
    tool.main(['extract', project.prompted, trained, str(prompts), '--prompts-only'])
    load_tool('train.py').main([
        project.prompted, '--work-dir', str(tmp_path / 'run'), '--cfg-options',
        f'load_from={prompts}', 'custom_hooks.0.strict=False', 'optim_wrapper.optimizer.lr=0'])
    begun, ended = (checkpoint.read(path)['state_dict']
                    for path in (prompts, tmp_path / 'run' / 'epoch_1.pth'))
    assert 0 < len(begun) < len(ended)
    assert all(torch.equal(ended[key], tensor) for key, tensor in begun.items())
