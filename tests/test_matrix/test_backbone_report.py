"""The results of backbones as a page."""
from mmprotune.matrix.backbone_report import markdown


def test_the_table():
    results = [
        dict(name='a.B', verdict='pass', reason='', arguments=dict(arch='s'), parameters=100,
             prompt_parameters=10, lean_bytes=1, naive_bytes=4,
             stages=[dict(path='x', index=1, channels=8)],
             places=dict(blocks=3, branches=None, narrow=None, outputs=1)),
        dict(name='a.C', verdict='host', reason='wants | more'),
        dict(name='a.D', verdict='fail', reason='AssertionError: no')
    ]
    text = markdown(results, 'make')
    assert '1 of the 2 backbone classes' in text and '(3 are registered)' in text
    assert '| a.B | arch=s | x[1] | 8 | 10 | 10.0% | 25% | 3 | – | – | 1 | pass |' in text
    assert '| a.C |  |  |  |  |  |  |  |  |  |  | host: wants / more |' in text
