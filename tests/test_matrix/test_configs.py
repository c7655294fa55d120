"""Stock configs are found, put together by their work, and made runnable."""
from mmengine.config import Config

from mmprotune.matrix.configs import config_names, runnable, runs_of, sample
from mmprotune.matrix.limits import check_all


def test_the_same_work_is_done_once(shipped):
    assert config_names() == shipped
    runs = runs_of(shipped)
    assert [run.configs for run in runs] == [['mmdet::a.py', 'mmdet::d.py'], ['mmdet::c.py'],
                                             ['mmdet::e.py']]
    assert 'SyntaxError' in runs[1].error
    result, = check_all(runs[1:2])
    assert result['verdict'] == 'host' and result['reason'].startswith('the config does not load')
    drawn = [sample(shipped, 3, seed) for seed in (1, 1)]
    assert [r.configs for r in drawn[0]] == [r.configs for r in drawn[1]]
    assert sum(len(r.configs) for r in drawn[0]) == 3


def test_a_config_becomes_one_that_a_cpu_can_run():
    cfg = runnable(Config(dict(
        model=dict(type='EncoderDecoder', backbone=dict(norm_cfg=dict(type='MMSyncBN')),
                   train_cfg=dict(num_points=12544, rpn=dict(sampler=dict(num=8)),
                                  rcnn=[dict(sampler=dict(num=512, pos_fraction=0.25))])),
        data_preprocessor=dict(type='SegDataPreProcessor', size=(512, 512)),
        optim_wrapper=dict(type='AmpOptimWrapper', loss_scale='dynamic', accumulative_counts=4,
                           optimizer=dict(type='SGD', lr=0.1)),
        default_scope='mmseg')))
    assert cfg.optim_wrapper == dict(type='OptimWrapper', accumulative_counts=1,
                                     optimizer=dict(type='SGD', lr=0.1))
    assert cfg.model.data_preprocessor == dict(type='SegDataPreProcessor', size_divisor=1)
    assert cfg.model.backbone.norm_cfg.type == 'SyncBN'
    assert cfg.model.train_cfg == dict(num_points=512, rpn=dict(sampler=dict(num=8)), rcnn=[
        dict(sampler=dict(num=32, pos_fraction=0.25))])
