"""The results of configs as a line and as a page."""
from mmprotune.matrix.config_report import markdown, summary
from tests.test_matrix.conftest import result_of

SETTINGS = dict(memory=9, seconds=180, insert=None, mmprotune='1', torch='2+cpu', mmdet='3',
                mmseg='1', mmpretrain='0')


def test_the_table():
    results = [
        result_of('b'), dict(result_of('a', file='none'), configs=['mmseg::a.py', 'mmseg::c.py'],
                             size=64, prompts=4),
        result_of('d', 'fail', reason='no | gradient'), result_of('e', 'host', reason='too large')
    ]
    line = summary(results)
    assert line == ('3 of 4 configs whose stock model runs here pass (75.0%): 1 of 2 of those that '
                    'name a pre-trained file, 2 of 2 of those that name no pre-trained file; '
                    '1 more do not run here')
    assert summary([]).startswith('0 of 0 configs whose stock model runs here pass: ')
    text = markdown(results, SETTINGS, 'make')
    assert line in text and '--protune` runs it, with 9 GB of address space and 180 s of' in text
    narrow = markdown(results, dict(SETTINGS, insert='narrow'), 'make')
    assert "--protune` runs it with `insert='narrow'`, with 9 GB" in narrow
    assert '| mmdet | 3 | 3 | 1 | 1 | 1 |' in text and '| mmseg | 2 | 1 | 2 | 0 | 0 |' in text
    assert '| mmdet::d.py | 1 | init_cfg | no / gradient |' in text
    assert '| mmseg::a.py | 2 | none | 64 | 4 | 1.5 | pass |' in text
    assert '| mmdet::e.py | 1 | init_cfg |  |  | 1.5 | host: too large |' in text
