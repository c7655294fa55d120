import pytest

from mmprotune.lean import LeanOptions


def test_rounds_has_a_former_name():
    for rounds in (True, False):
        expected = LeanOptions(rounds=rounds, recompute=0.5)
        for cfg in (dict(rounds=rounds), dict(fold=rounds), dict(fold=rounds, rounds=rounds)):
            given = dict(cfg, recompute=0.5)
            assert LeanOptions.parse(given) == expected
            assert given == dict(cfg, recompute=0.5)  # a config is not changed
        with pytest.raises(ValueError, match='lean.fold is the former name of lean.rounds, but '
                                             'they differ: remove lean.fold'):
            LeanOptions.parse(dict(fold=rounds, rounds=not rounds))
    with pytest.raises(TypeError, match='here.fold must be True or False, got None'):
        LeanOptions.parse(dict(fold=None), 'here')
