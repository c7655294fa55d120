"""The model card of a packed adapter, of what the run has left behind."""
from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path

import yaml
from mmengine.config import Config

from mmprotune.config_nodes import nodes_in, type_name
from mmprotune.version import __version__

# As hubs call the tasks; of a host there may be others, and the first is what most of it is for.
_TASKS = dict(mmdet='object-detection', mmseg='image-segmentation',
              mmpretrain='image-classification')


def validation_metrics(work_dir: str | os.PathLike, meta: dict, cfg: Config) -> dict[str, float]:
    """What the logs of a run say of the validation of one checkpoint.

    Args:
        work_dir (str | os.PathLike): Folder with the time stamps' folders in it.
        meta (dict): Of the checkpoint.
        cfg (Config): Of the run.

    Returns:
        dict[str, float]: By name, of the newest log that has some; empty where none has.
    """
    by_epoch = (cfg.get('train_cfg') or {}).get('by_epoch', 'max_epochs' in (
        cfg.get('train_cfg') or {}))
    step = meta.get('epoch' if by_epoch else 'iter')
    for log in sorted(Path(work_dir).glob('*/vis_data/scalars.json'), reverse=True):
        found = {}
        for line in log.read_text(encoding='utf-8', errors='replace').splitlines():
            try:
                record = json.loads(line)
            except ValueError:  # cut off, as the run was
                continue
            # Records of training have a rate or a loss.
            if isinstance(record, dict) and record.get('step') == step and not any(
                    key in ('lr', 'loss') or key.startswith('prompt/') for key in record):
                found = {key: value for key, value in record.items()
                         if key not in ('step', 'time', 'data_time') and
                         isinstance(value, (int, float)) and math.isfinite(value) and
                         # What COCO's evaluation writes where there are no objects of a size.
                         not (key.startswith('coco/') and value == -1)}
        if found:
            return found
    return {}


def model_card(name: str, license: str, cfg: Config, info: dict, meta: dict,
               metrics: dict[str, float], files: list[str]) -> str:
    """The text of ``README.md``, with the front matter that hubs read.

    Args:
        name (str): Title.
        license (str): As hubs abbreviate it.
        cfg (Config): Of the model.
        info (dict): Of :func:`~mmprotune.checkpoint.inspect`.
        meta (dict): Of the checkpoint.
        metrics (dict[str, float]): Of its validation.
        files (list[str]): Pre-trained files that the backbone needs.
    """
    task = _TASKS[cfg.default_scope]
    front = dict(library_name='mmprotune', license=license, pipeline_tag=task,
                 tags=['mmprotune', 'pro-tuning', cfg.default_scope])
    tested = _data_set(cfg, ('val_dataloader', 'test_dataloader'))
    if metrics:
        front['model-index'] = [dict(name=name, results=[dict(
            task=dict(type=task), dataset=dict(type=tested or 'unknown', name=tested or 'unknown'),
            metrics=[dict(type=key, name=key, value=value) for key, value in metrics.items()])])]
    lines = ['---', yaml.safe_dump(front, sort_keys=False, allow_unicode=True).rstrip(), '---', '',
             f'# {name}', '',
             f'A {type_name(cfg.model)} tuned with [Pro-tuning](https://arxiv.org/abs/2207.14381): '
             'what trained, without the frozen backbone that it stands on.', '']
    lines += _table(['', ''], _facts(cfg, info, meta, files))
    if metrics:
        where = f' on {tested}' if tested else ''
        lines += ['', f'Validation{where}, as the log of the run has it:', '']
        lines += _table(['metric', 'value'], [(key, f'{v:g}') for key, v in metrics.items()])
    named = '' if all('://' in file for file in files) else ", pretrained='FILE'"
    lines += ['', '## Use', '', '```python', 'import mmprotune', '',
              f"model = mmprotune.load('FOLDER'{named})", '```', '',
              'FOLDER is this folder, a `.zip` of it, or the id of its repository. The frozen '
              'backbone is checked by its fingerprint: on another one the adapter does not load.',
              '', 'To train it again, in a checkout of mmprotune:', '', '```bash',
              'python tools/train.py config.py', '```', '']
    return '\n'.join(lines)


def _facts(cfg: Config, info: dict, meta: dict, files: list[str]) -> list[tuple[str, str]]:
    rows = []
    for place, fingerprint in info['fingerprints'].items():
        known = info['backbones'].get(place, {})
        rows += [('frozen backbone', known.get('type', 'unknown')),
                 ('its fingerprint', f'`{fingerprint}`')]
        if known:
            rows.append(('stages with prompts', ', '.join(s['name'] for s in known['stages'])))
    rows += [('its pre-trained file', f'`{file}`') for file in files]
    rows.append(('trained on', _data_set(cfg, ('train_dataloader', )) or 'unknown'))
    classes = (meta.get('dataset_meta') or {}).get('classes')
    if isinstance(classes, list):
        shown = ', '.join(map(str, classes[:20])) + (', …' if len(classes) > 20 else '')
        rows.append(('classes', f'{len(classes)}: {shown}'))
    if info['epoch'] is not None:
        rows.append(('trained for', f'{info["epoch"]} epochs, {info["iter"]} iterations'))
    rows.append(('values in the adapter', f'{info["values"]:,} ({info["bytes"]:,} bytes)'))
    known = meta.get('mmprotune') or {}
    # MMEngine writes its commit, or 'unknown', right behind its version.
    engine = re.sub(r'([0-9a-f]{40}|unknown)$', '', str(meta.get('mmengine_version') or ''))
    versions = [('mmprotune', known.get('version') or __version__),
                ('torch', known.get('torch_version')), ('mmengine', engine)]
    rows.append(('versions', ', '.join(f'{name} {value}' for name, value in versions if value)))
    return rows


def _data_set(cfg: Config, loaders: tuple[str, ...]) -> str | None:
    """The class of a data set, inside wrappers, and the last part of where it lies."""
    for key in loaders:
        for _, node in nodes_in((cfg.get(key) or {}).get('dataset')):
            if 'type' in node and 'dataset' not in node and 'datasets' not in node:
                root = str(node.get('data_root') or '').replace('\\', '/').rstrip('/')
                return type_name(node) + (f' ({root.rpartition("/")[2]})' if root else '')
    return None


def _table(head: list[str], rows: list[tuple[str, str]]) -> list[str]:
    clean = [[str(cell).replace('|', '\\|').replace('\n', ' ') for cell in row] for row in rows]
    return [f'| {" | ".join(row)} |' for row in (head, ['---'] * len(head), *clean)]
