"""Evaluation on a set whose classes are not quite those that the model was trained on."""
from __future__ import annotations

from collections.abc import Mapping, Sequence

import mmengine
import torch
from mmengine.dist import get_world_size
from mmengine.evaluator import Evaluator
from mmengine.structures import BaseDataElement
from torch import Tensor

from mmprotune.errors import ClassMapError, listed
from mmprotune.registry import EVALUATOR

MAPS = ('names', 'indices', 'wordnet')


class ClassMap:
    """Which of the model's classes are right for each class of a shifted set.

    Both sides may be coarser than the other: a class of the set may stand for several of the
    model's (an image of "dog" for an ImageNet model), and several of the set's for one of the
    model's ("fire engine" and "moving van" for a CIFAR-10 model's "truck"). Classes of the set with
    the same counterpart become one *concept*.

    Args:
        class_map (str | Mapping): 'names' (the sides share names), 'indices' (names of the set's
            classes are the model's indices: the folders of ImageNet-V2), 'wordnet' (they are
            WordNet ids of ImageNet's classes: the folders of ImageNet-A, -R and -Sketch; needs
            timm, which has the list), a mapping or a json, yaml or pickle file of one. Its keys are
            names of the set's classes; its values are a name or an index of the model's classes, a
            list of them, or None for classes that the model does not know, whose images are left
            out.
        target (Sequence[str]): Classes of the shifted set, by label.
        source (Sequence[str]): Classes of the model, by index.
        restrict (bool): Whether only the model's classes that occur in the map compete, as
            ImageNet-A and -R are evaluated. Defaults to True.

    Attributes:
        concept_of (list[int | None]): Concept of each class of the set.
        members (list[list[int]]): The model's classes of each concept.

    Raises:
        ClassMapError: A class has no entry, an entry has no class, or concepts overlap.
    """

    def __init__(self,
                 class_map: str | Mapping,
                 target: Sequence[str],
                 source: Sequence[str],
                 restrict: bool = True) -> None:
        target = [str(name) for name in target]
        source = [str(name) for name in source]
        if class_map == 'names':
            class_map = {name: name for name in target}
        elif class_map == 'indices':
            class_map = {name: _as_index(name) for name in target}
        elif class_map == 'wordnet':
            class_map, source = {name: name for name in target}, _wordnet_ids(len(source))
        elif isinstance(class_map, str):
            class_map = mmengine.load(class_map)
        if not isinstance(class_map, Mapping):
            raise ClassMapError(f'class_map must be one of {MAPS}, a mapping or a file of one, got '
                                f'{class_map!r}')
        class_map = {str(name): value for name, value in class_map.items()}
        missing = [name for name in target if name not in class_map]
        if missing:
            raise ClassMapError(f'class_map has no entry for {listed(missing, 8, repr)} of the '
                                'evaluated set; None leaves its images out')
        unknown = [name for name in class_map if name not in target]
        if unknown:
            raise ClassMapError(f'class_map has entries for {listed(unknown, 8, repr)}, which the '
                                f'evaluated set does not have; it has {listed(target, 8, repr)}')

        index_of = {name: i for i, name in enumerate(source)}
        self.members: list[list[int]] = []
        self.concept_of: list[int | None] = []
        owner: dict[int, str] = {}
        known: dict[tuple, int] = {}
        for name in target:
            value = class_map[name]
            if value is None:
                self.concept_of.append(None)
                continue
            values = value if isinstance(value, (list, tuple)) else [value]
            indices = tuple(sorted({_lookup(v, name, index_of, source) for v in values}))
            if not indices:
                raise ClassMapError(f'class_map[{name!r}] is empty; None leaves its images out')
            if indices not in known:
                for i in indices:
                    if i in owner:
                        raise ClassMapError(
                            f'class_map: {name!r} and {owner[i]!r} share the class {source[i]!r} '
                            'of the model, but not all of their classes')
                    owner[i] = name
                known[indices] = len(self.members)
                self.members.append(list(indices))
            self.concept_of.append(known[indices])
        if not self.members:
            raise ClassMapError('class_map maps every class to None: nothing is left to evaluate')
        self.num_source = len(source)
        rest = [i for i in range(len(source)) if i not in owner]
        # Unmapped classes of the model are concepts that are never right.
        groups = self.members if restrict else self.members + [[i] for i in rest]
        self._matrix = torch.zeros(len(source), len(groups))
        for concept, indices in enumerate(groups):
            self._matrix[indices, concept] = 1

    def scores(self, probabilities: Tensor) -> Tensor:
        """Probabilities of the concepts.

        Args:
            probabilities (Tensor): Of the model's classes, shape (K, ) or (N, K).

        Returns:
            Tensor: Shape (C, ) or (N, C), summing to 1.
        """
        if probabilities.shape[-1] != self.num_source:
            raise ClassMapError(f'the model has {probabilities.shape[-1]} outputs, but class_map '
                                f'was made for {self.num_source} classes')
        scores = probabilities.float() @ self._matrix.to(probabilities.device)
        return scores / scores.sum(-1, keepdim=True).clamp_min(1e-12)


def _as_index(name: str) -> int:
    if not name.isdigit():
        raise ClassMapError(f"class_map='indices' expects class names like '17', got {name!r}")
    return int(name)


def _lookup(value, name: str, index_of: Mapping[str, int], source: Sequence[str]) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise ClassMapError(f'class_map[{name!r}]: expected a name or an index, got {value!r}')
    if isinstance(value, int):
        if not 0 <= value < len(source):
            raise ClassMapError(f'class_map[{name!r}] is {value}, but the model has '
                                f'{len(source)} classes')
        return value
    if value not in index_of:
        raise ClassMapError(f'class_map[{name!r}] is {value!r}, which is no class of the model; '
                            f'its classes are {listed(source, 8, repr)}')
    return index_of[value]


def _wordnet_ids(num_source: int) -> list[str]:
    try:
        from timm.data import ImageNetInfo
    except ImportError as error:
        raise ImportError(f"{error}; class_map='wordnet' needs timm's list of ids: "
                          'pip install timm') from error
    names = ImageNetInfo('imagenet-1k').label_names()
    if num_source != len(names):
        raise ClassMapError(f"class_map='wordnet' is for models with ImageNet's {len(names)} "
                            f'classes, got {num_source}')
    return names


@EVALUATOR.register_module()
class ClassMapEvaluator(Evaluator):
    """MMEngine's evaluator, behind a :class:`ClassMap`: any classification metric, on concepts.

    Metrics see the concepts' scores as ``pred_score``, their best as ``pred_label`` and the true
    concept as ``gt_label``.

    Args:
        metrics (dict | BaseMetric | Sequence): As in :class:`mmengine.evaluator.Evaluator`.
        class_map (str | Mapping): See :class:`ClassMap`. The evaluated set's classes are those of
            its ``metainfo``.
        source (Sequence[str]): Classes of the model, by index.
        restrict (bool): See :class:`ClassMap`. Defaults to True.
    """

    def __init__(self,
                 metrics,
                 class_map: str | Mapping,
                 source: Sequence[str],
                 restrict: bool = True) -> None:
        super().__init__(metrics)
        self.class_map = class_map
        self.source = source
        self.restrict = restrict
        self._map: ClassMap | None = None

    @property
    def dataset_meta(self) -> dict | None:
        """dict, optional: Meta information of the evaluated set."""
        return self._dataset_meta

    @dataset_meta.setter
    def dataset_meta(self, dataset_meta: dict) -> None:
        classes = (dataset_meta or {}).get('classes')
        if not classes:
            raise ClassMapError('the evaluated set names no classes in its metainfo')
        self._map = ClassMap(self.class_map, classes, self.source, self.restrict)
        if None in self._map.concept_of and get_world_size() > 1:
            raise ClassMapError('class_map leaves classes out, which several processes cannot do: '
                                'evaluate with one')
        self._dataset_meta = dataset_meta
        for metric in self.metrics:
            metric.dataset_meta = dataset_meta

    def process(self, data_samples: Sequence, data_batch=None) -> None:
        """Maps a batch of predictions, and hands it to the metrics."""
        if self._map is None:
            raise ClassMapError('dataset_meta has to be set before predictions come')
        mapped = []
        for sample in data_samples:
            if isinstance(sample, BaseDataElement):
                sample = sample.to_dict()
            concept = self._map.concept_of[int(sample['gt_label'])]
            if concept is None:
                continue
            score = self._map.scores(sample['pred_score'])
            mapped.append(
                dict(pred_score=score, pred_label=score.argmax(-1, keepdim=True),
                     gt_label=torch.tensor([concept], device=score.device)))
        super().process(mapped, data_batch)
