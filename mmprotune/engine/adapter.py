"""Sharing what trained: a folder of an adapter, a config and a model card, and the way back."""
from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.registry import DefaultScope, init_default_scope
from torch import nn

from mmprotune.checkpoints.convert import build_model, verify
from mmprotune.checkpoints.loading import load as load_checkpoint
from mmprotune.checkpoints.meta import inspect
from mmprotune.checkpoints.plain import from_plain
from mmprotune.checkpoints.reading import read, state_dict_of, to_safetensors
from mmprotune.checkpoints.resuming import newest
from mmprotune.checkpoints.slim import prompted_parts
from mmprotune.checkpoints.untrusted import check_config
from mmprotune.checkpoints.writing import write_bytes
from mmprotune.config_nodes import (
    FILE_KEYS,
    file_of,
    nodes_in,
    parse_config,
    prompted_nodes,
    pull_in_files,
)
from mmprotune.errors import CheckpointError, PretrainedFileError, listed

from .adapter_files import (
    ADAPTER,
    CARD,
    CONFIG,
    check_fingerprint,
    folder_of,
    hub_client,
    hub_errors,
    read_config,
)
from .model_card import model_card, validation_metrics

# Of the meta of a checkpoint; the rest is of the run and its machine.
_KEPT = ('epoch', 'iter', 'seed', 'time', 'mmengine_version', 'dataset_meta', 'mmprotune')
# Where the run was, and how it was started.
_OF_THE_RUN = ('work_dir', 'load_from', 'resume', 'launcher')


def pack(run: str | os.PathLike, out: str | os.PathLike,
         config: Config | str | os.PathLike | None = None, license: str = 'unknown',
         name: str | None = None, force: bool = False) -> dict:
    """Makes a folder to share of a run: ``adapter.safetensors``, ``config.py``, ``README.md``.

    The adapter is the slim checkpoint without its optimizer. Of pre-trained files that the config
    names by a path, the folder keeps their names alone.

    Args:
        run (str | os.PathLike): Work directory, which stands for its newest checkpoint, or a slim
            checkpoint.
        out (str | os.PathLike): Folder to write.
        config (Config | str | os.PathLike, optional): Config of the model, or its file. Defaults to
            None: the one in the checkpoint.
        license (str): For the card, as hubs abbreviate it: 'apache-2.0'. Defaults to 'unknown'.
        name (str, optional): Title of the card. Defaults to None: the name of ``out``.
        force (bool): Whether files in ``out`` are replaced. Defaults to False.

    Returns:
        dict: :func:`~mmprotune.checkpoint.inspect` of the adapter.

    Raises:
        CheckpointError: There is no slim checkpoint, or it does not belong to the config's model.
        FileExistsError: ``out`` has one of the three files.
        PretrainedFileError: The pre-trained file is not there, by which the adapter is checked.
    """
    path, out = _checkpoint_of(run), Path(out)
    there = [file for file in (ADAPTER, CONFIG, CARD) if (out / file).exists()]
    if there and not force:
        raise FileExistsError(f'{out} has {listed(there)} already; nothing was written '
                              '(--force overwrites)')
    checkpoint = read(path)
    info = inspect(path)
    if info['kind'] != 'slim':
        raise CheckpointError(f'{path} is a {info["kind"]} checkpoint, expected a slim one; '
                              '`prompt_checkpoint.py extract` makes one')
    meta = checkpoint.get('meta') if 'state_dict' in checkpoint else None
    meta = meta if isinstance(meta, dict) else {}
    cfg = _config_of(path, meta, config)
    with DefaultScope.overwrite_default_scope(cfg.get('default_scope')):
        verify(path, cfg)
    for key in _OF_THE_RUN:
        cfg.pop(key, None)
    for holder, key in _files(cfg.model):
        holder[key] = _without_folder(holder[key])
    meta = _shared_meta(meta)
    adapter = to_safetensors(state_dict_of(checkpoint, path), meta)
    metrics = validation_metrics(os.path.dirname(os.path.abspath(path)), meta, cfg)
    card = model_card(name or out.resolve().name, license, cfg, dict(info, bytes=len(adapter)),
                      meta, metrics, _names_of_files(cfg))
    write_bytes(card.encode(), out / CARD)
    write_bytes(cfg.pretty_text.encode(), out / CONFIG)
    write_bytes(adapter, out / ADAPTER)  # last: without it, the folder is none yet
    return inspect(out / ADAPTER)


def load(source: str | os.PathLike, pretrained: str | Mapping[str, str] | None = None,
         device: str | torch.device | None = None, revision: str | None = None) -> nn.Module:
    """Builds the model of a packed adapter, with its weights, in eval mode.

    Nothing in it is run: the adapter is safetensors, the config is parsed, and only what is
    registered is built. A frozen backbone of another fingerprint is refused.

    Args:
        source (str | os.PathLike): A folder that :func:`pack` wrote, a ``.zip`` of one, or the id
            of a repository on the Hugging Face Hub, 'owner/name', which takes the extra ``hub``.
        pretrained (str | Mapping[str, str], optional): The backbone's pre-trained file here, or
            several by the names that the config has for them. Defaults to None: where the config
            says.
        device (str | torch.device, optional): Where the model goes. Defaults to None: the CPU.
        revision (str, optional): Of a hub's repository. Defaults to None: the newest.

    Returns:
        nn.Module: The host's model, as the host's inference functions want it; MMEngine's default
        scope is the host's from then on.

    Raises:
        CheckpointError: The source cannot be read, or does not fit.
        FingerprintMismatch: The pre-trained file is another one.
        PretrainedFileError: The pre-trained file cannot be had.
    """
    with folder_of(source, revision) as folder:
        cfg = read_config(folder, source)
        check_fingerprint(folder, source)
        _use_files(cfg, pretrained, source)
        # For good, as the hosts' own functions do: their pipelines are found by it.
        init_default_scope(cfg.default_scope)
        model = build_model(cfg)
        try:
            for _, part in prompted_parts(model):
                part.require_weights()
        except PretrainedFileError as error:
            raise PretrainedFileError(f"{source}: {error}. mmprotune.load(…, pretrained='FILE') "
                                      'names it here') from None
        checkpoint = load_checkpoint(model, folder / ADAPTER)
    dataset_meta = (checkpoint.get('meta') or {}).get('dataset_meta')
    if isinstance(dataset_meta, dict):
        model.dataset_meta = {str(key).lower(): value for key, value in dataset_meta.items()}
        model._dataset_meta = model.dataset_meta
    model.cfg = model._config = cfg  # mmdet's and mmseg's name, and mmpretrain's
    return model.to(device).eval() if device is not None else model.eval()


def push(folder: str | os.PathLike, repository: str, private: bool = False) -> str:
    """Uploads a packed folder to the Hugging Face Hub, whose client finds the token by itself.

    Args:
        folder (str | os.PathLike): Of :func:`pack`; its three files go, and nothing else in it.
        repository (str): 'owner/name'; made where there is none.
        private (bool): Whether a new one is private. Defaults to False.

    Returns:
        str: Address of the repository.

    Raises:
        CheckpointError: The folder is incomplete, or the hub says no.
    """
    hub = hub_client()
    with folder_of(folder, None, local=True) as found:
        if not (found / CARD).is_file():
            raise CheckpointError(f'{folder}: expected a {CARD}, the model card')
        read_config(found, folder)
        check_fingerprint(found, folder)
        with hub_errors(repository):
            url = hub.create_repo(repository, private=private, exist_ok=True)
            hub.upload_folder(repo_id=repository, folder_path=str(found),
                              allow_patterns=[ADAPTER, CONFIG, CARD],
                              commit_message='Adapter, config and card')
    return str(url)


# --- packing ------------------------------------------------------------------------------------


def _checkpoint_of(run: str | os.PathLike) -> str:
    run = os.path.expanduser(os.fspath(run))
    if not os.path.isdir(run):
        return run
    found = newest(run, to_resume=False)
    if found is None:
        raise CheckpointError(f'{run}: expected a work directory with a checkpoint, found none')
    return found


def _config_of(path: str, meta: dict, config: Config | str | os.PathLike | None) -> Config:
    """A config of plain values alone, not the caller's own object."""
    if config is None and not isinstance(meta.get('cfg'), str):
        raise CheckpointError(f'{path} holds no config (meta.cfg): name one (--config FILE)')
    if config is not None and not isinstance(config, Config):
        config = Config.fromfile(os.fspath(config))
    try:
        cfg = parse_config(meta['cfg'] if config is None else config.pretty_text)
    except (SyntaxError, ValueError) as error:
        raise CheckpointError(f'{path}: its config cannot be written as plain values, '
                              f'{error}') from None
    check_config(cfg)
    pull_in_files(cfg.get('model'))  # a model's own `pretrained` is deleted by inferencers
    return cfg


def _files(root: object) -> list[tuple[dict, str]]:
    """Where a config names pre-trained files, anywhere inside: the dicts and their keys."""
    found = []
    for _, node in nodes_in(root):
        keys = [*FILE_KEYS, 'frozen_from', *(['checkpoint'] if file_of(node) else [])]
        found += [(node, key) for key in keys if isinstance(node.get(key), str)]
    return found


def _files_of_backbones(cfg: Config) -> list[tuple[dict, str]]:
    """Those that a model is filled from as it is built; an adapter has everything else."""
    return [found for _, node in prompted_nodes(cfg.model) for found in _files(node)]


def _names_of_files(cfg: Config) -> list[str]:
    return sorted({holder[key] for holder, key in _files_of_backbones(cfg)})


def _without_folder(file: str) -> str:
    return file if '://' in file else re.split(r'[/\\]', file)[-1]


def _shared_meta(meta: dict) -> dict:
    kept = {key: meta[key] for key in _KEPT if key in meta}
    kept = from_plain(kept, 'meta')
    for known in (kept.get('mmprotune') or {}).get('backbones', {}).values():
        for key in ('pretrained', 'frozen_from'):
            if known.get(key) is not None:
                known[key] = _without_folder(str(known[key]))
    return _for_json(kept)


def _for_json(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _for_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_for_json(item) for item in value]
    return value.tolist() if hasattr(value, 'tolist') else value


# --- unpacking ----------------------------------------------------------------------------------


def _use_files(cfg: Config, pretrained: str | Mapping[str, str] | None, source: object) -> None:
    """Puts the caller's own files where a config names its pre-trained ones."""
    names = _names_of_files(cfg)
    for name in names:
        if '://' in name and not re.match(
                r'https?://|torchvision://|modelzoo://|open-?mmlab://|mmcls://', name):
            raise CheckpointError(f'{source}: {CONFIG} names {name!r}: expected a file, or an '
                                  'address of http(s), torchvision or open-mmlab')
    if pretrained is None:
        return
    if not isinstance(pretrained, Mapping):
        if len(names) != 1:
            raise PretrainedFileError(
                f'{source}: pretrained is one file, and the config names {len(names)} '
                f'({listed(names)}): pretrained={{name: file, …}} says which is which')
        pretrained = {names[0]: pretrained}
    unknown = sorted(set(pretrained) - set(names))
    if unknown:
        raise PretrainedFileError(f'{source}: pretrained names {listed(unknown)}, and the config '
                                  f'{listed(names)}')
    for holder, key in _files_of_backbones(cfg):
        if holder[key] in pretrained:
            holder[key] = os.fspath(pretrained[holder[key]])
