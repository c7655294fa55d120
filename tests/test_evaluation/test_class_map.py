from __future__ import annotations

import json

import pytest
import torch
from mmpretrain.structures import DataSample

from mmprotune.errors import ClassMapError
from mmprotune.evaluation import ClassMap, ClassMapEvaluator
from mmprotune.evaluation.scenarios import inverse_map

from ..classification import classification_scope

MODEL = ('cat', 'dog', 'truck', 'ship')


def test_several_of_the_sets_classes_for_one_of_the_models():
    """By hand: fire engines and vans are trucks, boats ships; the model also knows cats."""
    found = ClassMap(
        {'fire engine': 'truck', 'van': 'truck', 'boat': 'ship', 'tree': None},
        ('boat', 'fire engine', 'tree', 'van'), MODEL)
    assert found.concept_of == [0, 1, None, 1]
    assert found.members == [[3], [2]]
    scores = found.scores(torch.tensor([[0.5, 0.1, 0.3, 0.1], [0.2, 0.2, 0.0, 0.6]]))
    assert torch.allclose(scores, torch.tensor([[0.25, 0.75], [1., 0.]]))


def test_several_of_the_models_classes_for_one_of_the_sets():
    found = ClassMap(dict(animal=['cat', 1], vehicle=[2, 'ship']), ('animal', 'vehicle'), MODEL)
    assert torch.allclose(
        found.scores(torch.tensor([0.3, 0.3, 0.4, 0.])), torch.tensor([0.6, 0.4]))


def test_unmapped_classes_compete_if_asked():
    kwargs = dict(class_map=dict(cat='cat', boat='ship'), target=('cat', 'boat'), source=MODEL)
    probabilities = torch.tensor([0.2, 0.5, 0.2, 0.1])
    assert ClassMap(**kwargs).scores(probabilities).argmax() == 0
    scores = ClassMap(**kwargs, restrict=False).scores(probabilities)
    assert torch.allclose(scores, torch.tensor([0.2, 0.1, 0.5, 0.2]))


def test_named_maps():
    assert ClassMap('names', ('ship', 'cat'), MODEL).members == [[3], [0]]
    # Folders 0, 1, 10, 2, as sorted names of ImageNet-V2's come.
    source = [f'class {i}' for i in range(11)]
    assert ClassMap('indices', ('0', '1', '10', '2'), source).members == [[0], [1], [10], [2]]


def test_wordnet_ids():
    """ImageNet-A and -R have folders named by WordNet ids; these are their first and last."""
    pytest.importorskip('timm')
    from mmpretrain.datasets.categories import IMAGENET_CATEGORIES
    found = ClassMap('wordnet', ('n01440764', 'n01498041', 'n12267677'), IMAGENET_CATEGORIES)
    names = [IMAGENET_CATEGORIES[i] for (i, ) in found.members]
    assert [name.split(',')[0] for name in names] == ['tench', 'stingray', 'acorn']
    with pytest.raises(ClassMapError, match="ImageNet's 1000 classes, got 4"):
        ClassMap('wordnet', ('n01440764', ), MODEL)


def test_map_from_a_file(tmp_path):
    (tmp_path / 'map.json').write_text(json.dumps(dict(kitten='cat', boat=3)))
    found = ClassMap(str(tmp_path / 'map.json'), ('boat', 'kitten'), MODEL)
    assert found.members == [[3], [0]]


@pytest.mark.parametrize(('class_map', 'message'), [
    (dict(boat='ship'), "no entry for 'kitten' of the evaluated set"),
    (dict(boat='ship', kitten='cat', bus='truck'), "entries for 'bus', which the evaluated set"),
    (dict(boat='ship', kitten='kat'), r"class_map\['kitten'\] is 'kat', which is no class of the"),
    (dict(boat='ship', kitten=4), r"class_map\['kitten'\] is 4, but the model has 4 classes"),
    (dict(boat='ship', kitten=-1), r"class_map\['kitten'\] is -1"),
    (dict(boat='ship', kitten=[]), r"class_map\['kitten'\] is empty"),
    (dict(boat='ship', kitten=0.5), 'expected a name or an index, got 0.5'),
    (dict(boat=['ship', 'cat'], kitten='cat'), "'kitten' and 'boat' share the class 'cat'"),
    (dict(boat=None, kitten=None), 'nothing is left'),
    ('names', "'boat', which is no class of the model"),
    ('indices', "expects class names like '17', got 'boat'"),
    (7, 'class_map must be one of'),
])
def test_wrong_maps(class_map, message):
    with pytest.raises(ClassMapError, match=message):
        ClassMap(class_map, ('boat', 'kitten'), MODEL)


def test_model_with_another_number_of_outputs():
    found = ClassMap('names', ('cat', ), MODEL)
    with pytest.raises(ClassMapError, match='the model has 10 outputs, but .* for 4 classes'):
        found.scores(torch.ones(10))


def sample(scores, label) -> DataSample:
    return DataSample().set_gt_label(label).set_pred_score(torch.tensor(scores)).set_pred_label(
        int(torch.tensor(scores).argmax()))


def test_evaluator_feeds_any_metric():
    """Four images by hand: one is left out, one is right only among the mapped classes."""
    with classification_scope():
        evaluator = ClassMapEvaluator(
            [dict(type='Accuracy', topk=(1, )), dict(type='mmprotune.CalibrationError', bins=1)],
            class_map=dict(boat='ship', kitten='cat', tree=None), source=MODEL)
    with pytest.raises(ClassMapError, match='dataset_meta has to be set'):
        evaluator.process([sample([1., 0., 0., 0.], 0)])
    evaluator.dataset_meta = dict(classes=('boat', 'kitten', 'tree'))
    evaluator.process([
        sample([0.1, 0.7, 0.0, 0.2], 0),  # a boat, taken for a dog; ship beats cat with 2/3
        sample([0.8, 0.0, 0.0, 0.2], 1),  # a kitten, 0.8
        sample([0.8, 0.0, 0.0, 0.2], 0),  # a boat, taken for a cat with 0.8
        sample([0.0, 0.0, 1.0, 0.0], 2),  # a tree: left out
    ])
    result = evaluator.evaluate(4)
    assert result['accuracy/top1'] == pytest.approx(200 / 3)
    assert result['calibration/ece'] == pytest.approx(100 * (2 / 3 + 1.6 - 2) / 3, abs=1e-4)


def test_evaluator_needs_class_names():
    with classification_scope():
        evaluator = ClassMapEvaluator([], class_map='names', source=MODEL)
    with pytest.raises(ClassMapError, match='names no classes'):
        evaluator.dataset_meta = {}


def test_inverse_map():
    """The model's own test set, cut down to what the shifted set has."""
    own = inverse_map({'boat': 'ship', 'pet': ['cat', 'dog']}, ('boat', 'pet'), MODEL, MODEL, True)
    assert own == dict(cat=[0, 1], dog=[0, 1], truck=None, ship=[3])
    found = ClassMap(own, MODEL, MODEL)
    assert found.members == [[0, 1], [3]]
    assert found.concept_of == [0, 0, None, 1]
