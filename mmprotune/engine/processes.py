"""Processes and devices: what a run is on, and what a config needs for it."""
from __future__ import annotations

import datetime
import os
import subprocess

import torch
import torch.distributed as torch_dist
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.dist import is_distributed
from mmengine.model import MMDistributedDataParallel, is_model_wrapper, revert_sync_batchnorm
from torch import nn
from torch.distributed import PrefixStore
from torch.distributed.rendezvous import rendezvous

from mmprotune.config_nodes import dicts_in, type_name
from mmprotune.errors import LaunchError
from mmprotune.registry import MODEL_WRAPPERS

# mmcv's names of the layer that synchronises batch statistics between processes.
SYNC_BN_TYPES = ('SyncBN', 'MMSyncBN')
CPU_WRAPPER = 'mmprotune.CPUDistributedDataParallel'


def prepare_processes(cfg: Config) -> list[str]:
    """Makes a config run on the devices and processes that are there.

    * Several processes without an accelerator: the gloo group is initialised here, as MMEngine
      would set a CUDA device first, and the model gets :class:`CPUDistributedDataParallel`.
    * SyncBN outside a group of GPU processes: the Runner (one process) or the wrapper (several)
      reverts the layers to BatchNorm. ``MMSyncBN`` cannot even be built without a group, and
      becomes ``SyncBN`` in the config.

    Args:
        cfg (Config): The config; changed in place.

    Returns:
        list[str]: What the user should be told, a sentence each.
    """
    notices = []
    alone = cfg.get('launcher', 'none') == 'none'
    on_cpu = get_device() == 'cpu'
    wrapper = dict(cfg.get('model_wrapper_cfg') or {})
    if type_name(wrapper) == type_name(CPU_WRAPPER):
        # The config was written by a run on CPU processes; this one may have GPUs.
        wrapper = {}
        cfg.model_wrapper_cfg = None
    if not alone and (on_cpu or _attempt() > 0):
        _init_group(cfg, 'gloo' if on_cpu else None)
    if not alone and on_cpu:
        if type_name(wrapper) in ('', 'MMDistributedDataParallel'):
            wrapper['type'] = CPU_WRAPPER
            wrapper.setdefault('broadcast_buffers', False)
            wrapper.setdefault('find_unused_parameters', cfg.get('find_unused_parameters', False))
        # Present, so that the Runner does not put the local rank there.
        wrapper['device_ids'] = None
        cfg.model_wrapper_cfg = wrapper
        notices.append('no GPU: the processes run on the CPU and talk over gloo')

    if alone or on_cpu:
        found = {_norm_name(node) for node in dicts_in(cfg.get('model'))} & {*SYNC_BN_TYPES}
        if cfg.get('sync_bn') is not None and not alone:
            found.add(f'sync_bn={cfg.sync_bn}')
            cfg.sync_bn = None
        if found:
            reason = 'one process' if alone else 'CPU processes'
            notices.append(f'{", ".join(sorted(found))} in the config: reverted to BatchNorm '
                           f'for this run, as {reason} cannot synchronise batch statistics')
    if alone:
        for node in dicts_in(cfg.get('model')):
            if _norm_name(node) == 'MMSyncBN':
                node['type'] = 'SyncBN'
                node.pop('group', None)
                node.pop('stats_mode', None)
    return notices


def _norm_name(node: dict) -> str:
    """The registered name of a config's type, where that is one of the classes of SyncBN."""
    kind = node.get('type')
    if isinstance(kind, type) and kind.__name__ == 'SyncBatchNorm':  # mmcv's and PyTorch's
        return 'MMSyncBN' if kind.__module__.startswith('mmcv') else 'SyncBN'
    return type_name(kind)


@MODEL_WRAPPERS.register_module()
class CPUDistributedDataParallel(MMDistributedDataParallel):
    """MMEngine's data-parallel wrapper for CPU processes: no device ids, and no SyncBN.

    Args:
        module (nn.Module): The model; its SyncBN layers are reverted to BatchNorm.
        kwargs: See :class:`mmengine.model.MMDistributedDataParallel`.
    """

    def __init__(self, module, **kwargs) -> None:
        kwargs['device_ids'] = None
        super().__init__(module=revert_sync_batchnorm(module), **kwargs)


def _attempt() -> int:
    """How often torchrun has restarted the processes of this machine, where it is the only one."""
    one_machine = os.environ.get('GROUP_WORLD_SIZE') == '1'
    return int(os.environ.get('TORCHELASTIC_RESTART_COUNT') or 0) if one_machine else 0


def _init_group(cfg: Config, backend: str | None) -> None:
    """Initialises the process group from the launcher's environment variables.

    Args:
        cfg (Config): The config.
        backend (str, optional): None means the config's, for GPUs.
    """
    if is_distributed():
        return
    dist_cfg = (cfg.get('env_cfg') or {}).get('dist_cfg') or {}
    env = os.environ
    if cfg.launcher == 'slurm':
        names = dict(RANK='SLURM_PROCID', WORLD_SIZE='SLURM_NTASKS', LOCAL_RANK='SLURM_LOCALID')
    elif cfg.launcher == 'mpi':
        names = dict(
            RANK='OMPI_COMM_WORLD_RANK',
            WORLD_SIZE='OMPI_COMM_WORLD_SIZE',
            LOCAL_RANK='OMPI_COMM_WORLD_LOCAL_RANK')
    else:
        names = dict(RANK='RANK', WORLD_SIZE='WORLD_SIZE', LOCAL_RANK='LOCAL_RANK')
    missing = [name for name in names.values() if name not in env]
    if missing:
        raise LaunchError(f'--launcher {cfg.launcher}: {", ".join(missing)} not set; was the '
                          'process started by that launcher (tools/dist_*.sh, tools/slurm_*.sh)?')
    env.update({ours: env[theirs] for ours, theirs in names.items()})

    env.setdefault('MASTER_PORT', str(dist_cfg.get('port') or 29500))
    if 'MASTER_ADDR' not in env:
        if cfg.launcher != 'slurm':
            raise LaunchError(f'--launcher {cfg.launcher}: MASTER_ADDR not set')
        env['MASTER_ADDR'] = subprocess.run(
            ['scontrol', 'show', 'hostnames', env['SLURM_NODELIST']],
            check=True, capture_output=True, text=True).stdout.split()[0]
    kwargs = {}
    if dist_cfg.get('timeout') is not None:
        kwargs['timeout'] = datetime.timedelta(seconds=dist_cfg['timeout'])
    if backend is None:
        backend = dist_cfg.get('backend', 'nccl')
        torch.cuda.set_device(int(env['LOCAL_RANK']) % torch.cuda.device_count())
    if _attempt() > 0:
        # torchrun's store lives on, with the addresses of the processes that died. Each attempt
        # needs keys of its own, or it may wait for them for ever.
        store, kwargs['rank'], kwargs['world_size'] = next(rendezvous('env://'))
        kwargs['store'] = PrefixStore(f'attempt_{_attempt()}', store)
    torch_dist.init_process_group(backend, **kwargs)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model in the wrapper that a Runner with several processes puts around it."""
    return model.module if is_model_wrapper(model) else model
