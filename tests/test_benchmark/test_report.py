"""The figures of a benchmark as text."""
from mmprotune.benchmark.report import MIB, table


def figures(kept: int, **timed) -> dict:
    return dict(kept_total=kept * MIB, allocated=None, peak=None, optimizer_state=0, gradients=0,
                **timed)


def test_table():
    timed = dict(forward=.5, backward=1., optimizer=.5, step=2., fastest=1.5, slowest=3.)
    text = table(dict(config='a.py', variants=dict(
        frozen=figures(10, **timed), lean=figures(20, **dict(timed, step=3.)),
        full=figures(40))))
    lines = text.splitlines()
    assert lines[0] == 'a.py'
    rows = {line.split('  ')[0]: line.split()[2:] for line in lines[2:5]}
    assert rows['head only'] == ['10.0', '-', '-', '2.000', '1.50-3.00', '0.500', '1.000', '0.500',
                                 '-', '-', '0.0', '0.0']
    assert rows['full fine-tuning'][:5] == ['40.0', '-', '-', '-', '-']
    # What was not measured has no ratio.
    assert lines[5:] == ['lean of full fine-tuning: kept 0.500',
                         'lean of head only: kept 2.000, step 1.500']
