"""Prompted models as files for other runtimes: ONNX, and PyTorch's exported programs (``.pt2``).

Lean layers hand autograd less than ordinary ones and mean nothing to other runtimes: models are
built without them here, and norms stay as they are. Prompts are part of what is written.
"""
from __future__ import annotations

import contextlib
import importlib
import io
import json
import logging
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, init_default_scope
from torch import Tensor, nn

from mmprotune.checkpoints.slim import prompted_parts
from mmprotune.config_nodes import prompted_nodes
from mmprotune.engine.export_network import Network
from mmprotune.engine.inference import check_host
from mmprotune.errors import ExportError, LaunchError
from mmprotune.lean.dry_run import own_sizes

LIMIT = 1e-4  # of the largest value of an output, and of 1 where all are smaller
SUFFIXES = ('.onnx', '.pt2')
NEEDED = ('onnx', 'onnxscript', 'onnxruntime')  # by the first
MOST = 2**31 - 2**20  # bytes that one ONNX file holds
# Images (H, W) tried in turn, before those that the model says it was built for: not square, and
# large enough for every map of a pyramid to be more than a point.
SIZES = ((192, 256), (512, 512), (224, 224))
DIMENSIONS = {0: 'batch', 2: 'height', 3: 'width'}


@dataclass
class Exported:
    """What was written.

    Attributes:
        kind (str): Of the model: classifier, segmentor or detector.
        free (list[str]): Of batch, height and width those that may vary.
        size (tuple[int, int]): Height and width that it was traced with, and is fixed at where
            they may not vary.
        outputs (dict[str, list[int]]): Shapes at two images of ``size``, by name.
        difference (float): Largest one from PyTorch, as a part of the output's largest value.
        inputs (int): How many inputs were compared.
        description (dict): What the file itself says of its input, outputs and classes.
    """
    kind: str
    free: list[str]
    size: tuple[int, int]
    outputs: dict[str, list[int]]
    difference: float
    inputs: int
    description: dict


def check_target(out: str | os.PathLike, force: bool = False) -> Path:
    """Checks a file's name, and that what writing it takes is installed.

    Args:
        out (str | os.PathLike): Where to write.
        force (bool): Whether an existing file is replaced. Defaults to False.

    Raises:
        LaunchError: It cannot be written here.
    """
    out = Path(out)
    if out.suffix not in SUFFIXES:
        raise LaunchError(f'{out}: expected a name that ends with {" or ".join(SUFFIXES)}')
    if out.exists() and not force:
        raise LaunchError(f'{out} exists; nothing was written (--force overwrites)')
    if not hasattr(getattr(getattr(torch, 'export', None), 'Dim', None), 'AUTO'):
        raise LaunchError(f'exporting needs torch 2.6 or newer, this is {torch.__version__}')
    if out.suffix == '.onnx':
        for name in NEEDED:
            try:
                importlib.import_module(name)
            except ImportError as error:
                raise LaunchError(f"ONNX needs {name} ({error}), which the extra 'export' "
                                  "installs: pip install '.[export]'") from error
    return out


def build(cfg: Config) -> nn.Module:
    """The model of a config with ordinary layers, in eval mode.

    Args:
        cfg (Config): The config; changed in place.

    Raises:
        LaunchError: It has no prompted backbone, or one whose weights are stored in 16 or 8 bits.
        TrunkError: ``default_scope`` is none of the three hosts.
    """
    scope = check_host(cfg)
    nodes = prompted_nodes(cfg.get('model'))
    if not nodes:
        raise LaunchError("the config holds no PromptedBackbone; a stock model's own tools export "
                          'it')
    for path, node in nodes:
        if node.get('backbone_dtype'):
            raise LaunchError(f'model.{path}.backbone_dtype={node["backbone_dtype"]!r}: weights in '
                              '16 or 8 bits need lean layers, which are not exported')
        node['lean'] = False
    if cfg.model.get('data_preprocessor') is None and cfg.get('data_preprocessor'):
        cfg.model.data_preprocessor = cfg.data_preprocessor
    init_default_scope(scope)
    return revert_sync_batchnorm(MODELS.build(cfg.model)).eval()


# --- exporting --------------------------------------------------------------------------------


def export(model: nn.Module, cfg: Config, out: str | os.PathLike,
           sizes: Sequence[tuple[int, int]] | None = None, boxes: bool = False) -> Exported:
    """Writes a model, and compares what was written with PyTorch; whole or not at all.

    Batch, height and width may vary where the model lets them; what does not is said.

    Args:
        model (nn.Module): Of :func:`build`, with its weights; float32, on the CPU.
        cfg (Config): Its config.
        out (str | os.PathLike): Of :func:`check_target`.
        sizes (Sequence[tuple[int, int]], optional): Image sizes (H, W) to trace with, tried in
            turn. Defaults to None: usual ones.
        boxes (bool): Whether a one-stage detector gives boxes and scores, in place of its head's
            raw outputs. Defaults to False.

    Returns:
        Exported: What was written.

    Raises:
        ExportError: The model does not export, or the file computes something else.
    """
    out = Path(out)
    network = Network(model, cfg.default_scope, boxes)
    if out.suffix == '.onnx' and sum(t.nbytes for t in model.state_dict().values()) > MOST:
        raise ExportError('its weights do not fit into one ONNX file (2 GiB); write a .pt2')
    with torch.no_grad(), _quiet():
        size, outputs = _first_size(network, sizes or (*SIZES, *own_sizes(model)))
        description = _describe(model, network, outputs)
        reasons = []
        for dims in ((0, 2, 3), (0, ), ()):
            try:
                return _attempt(network, out, size, dims, description)
            except Exception as error:  # whatever tracing, conversion and other runtimes raise
                reasons.append(error)
    if isinstance(reasons[-1], ExportError):
        raise reasons[-1]
    raise ExportError(f'{type(model).__name__} does not export to {out.suffix}: '
                      f'{_first_line(reasons[-1])}') from reasons[-1]


def _first_size(network: Network, sizes: Sequence[tuple[int, int]],
                ) -> tuple[tuple[int, int], dict[str, Tensor]]:
    first = None
    for size in sizes:
        try:
            return tuple(size), network.named(_noise(2, size))
        except Exception as error:  # whatever a model raises at a size that is not its own
            first = first or error
    raise ExportError(f'the model does not run on images alone, tried at {sizes}: '
                      f'{_first_line(first)}') from first


def _noise(batch: int, size: tuple[int, int]) -> Tensor:
    generator = torch.Generator().manual_seed(batch)
    return torch.randn(batch, 3, *size, generator=generator)


def _attempt(network: Network, out: Path, size: tuple[int, int], dims: tuple[int, ...],
             description: dict) -> Exported:
    """Exports with some dimensions free; those that turn out to be fixed are."""
    from torch.export import Dim
    program = torch.export.export(network, (_noise(2, size), ), strict=False,
                                  dynamic_shapes=(dict.fromkeys(dims, Dim.AUTO), ))
    shape = next(node for node in program.graph.nodes
                 if node.op == 'placeholder' and node.name == 'image').meta['val'].shape
    free = [name for dim, name in DIMENSIONS.items() if not isinstance(shape[dim], int)]
    description = dict(description, free=free, size=list(size))
    inputs = [_noise(2, size)]
    if 'batch' in free:
        inputs += [_noise(1, size), _noise(3, size)]
    # By one pixel of a map of stride 32: a program may hold for even numbers of them alone.
    other = (size[0] + 32 * ('height' in free), size[1] - 32 * ('width' in free))
    if other != size:
        inputs.append(_noise(2, other))
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        file = Path(folder) / out.name
        write, load = FORMATS[out.suffix]
        write(program, file, [str(dim) for dim in shape], description)
        run = load(file)
        difference = 0.0
        for image in inputs:
            expected, found = network(image), run(image)
            for name, a, b in zip(description['outputs'], expected, found):
                if a.shape != b.shape:
                    raise ExportError(f'{name}: the file returns {tuple(b.shape)} for an input of '
                                      f'{tuple(image.shape)}, PyTorch {tuple(a.shape)}')
                apart = float((a.double() - b.double()).abs().max())
                apart /= max(1.0, float(a.abs().max()))
                if not apart <= LIMIT:
                    raise ExportError(f'{name} is {apart:.1e} of its largest value off what '
                                      f'PyTorch computes (limit {LIMIT:g}); nothing was written')
                difference = max(difference, apart)
        os.replace(file, out)
    return Exported(network.kind, free, size, description['outputs'], difference, len(inputs),
                    description)


def _describe(model: nn.Module, network: Network, outputs: dict[str, Tensor]) -> dict:
    """What somebody with the file alone has to know."""
    preprocessor = getattr(model, 'data_preprocessor', None)
    rgb = any(getattr(preprocessor, name, None)
              for name in ('_channel_conversion', 'channel_conversion', 'to_rgb'))
    described = dict(kind=network.kind, channels='RGB' if rgb else 'BGR', note=network.note,
                     outputs={name: list(t.shape) for name, t in outputs.items()})
    for name in ('mean', 'std'):
        values = getattr(preprocessor, name, None)
        if isinstance(values, Tensor):
            described[name] = [round(value, 4) for value in values.flatten().tolist()]
    meta = getattr(model, 'dataset_meta', None) or {}
    described['classes'] = [str(name) for name in meta.get('classes') or ()]
    if network.kind == 'detector':
        described['test_cfg'] = json.loads(
            json.dumps(getattr(model, 'test_cfg', None), default=str))
    described['fingerprints'] = [part.own_fingerprint for _, part in prompted_parts(model)]
    return described


# --- formats ----------------------------------------------------------------------------------


def _write_onnx(program, file: Path, shape: list[str], description: dict) -> None:
    import onnx
    with contextlib.redirect_stdout(io.StringIO()):
        torch.onnx.export(program, f=str(file), dynamo=True, external_data=False, verbose=False,
                          input_names=['image'], output_names=list(description['outputs']))
    model = onnx.load(str(file))
    # PyTorch calls them s40 and the like.
    names = {symbol: DIMENSIONS[dim] for dim, symbol in enumerate(shape)
             if dim in DIMENSIONS and not symbol.isdigit()}
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_param = re.sub(r'\w+', lambda m: names.get(m[0], m[0]), dim.dim_param)
    onnx.helper.set_model_props(model, dict(mmprotune=json.dumps(description)))
    onnx.checker.check_model(model)
    onnx.save(model, str(file))


def _load_onnx(file: Path) -> Callable[[Tensor], list[Tensor]]:
    import onnxruntime
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(file), options, providers=['CPUExecutionProvider'])
    return lambda image: [torch.from_numpy(value)
                          for value in session.run(None, dict(image=image.numpy()))]


def _write_program(program, file: Path, shape: list[str], description: dict) -> None:
    torch.export.save(program, str(file),
                      extra_files={'mmprotune.json': json.dumps(description)})


def _load_program(file: Path) -> Callable[[Tensor], Sequence[Tensor]]:
    return torch.export.load(str(file)).module()


FORMATS = {'.onnx': (_write_onnx, _load_onnx), '.pt2': (_write_program, _load_program)}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """While open, PyTorch's exporters keep what they think about the model to themselves."""
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        before = logging.root.manager.disable
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(before)


def _first_line(error: BaseException) -> str:
    """What an exporter raised: its cause, where it only tells what was tried."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f'{type(error).__name__}: {(lines or [""])[0][:240]}'
