"""Broken images and annotation files: errors that name the file."""
from __future__ import annotations

import json
import os
from collections.abc import Sequence

from mmcv.transforms import BaseTransform
from mmengine.dataset import Compose
from PIL import Image

from mmprotune.errors import DataError, listed
from mmprotune.registry import TRANSFORMS

# Formats that OpenCV decodes when their end is missing, and what stands there.
_ENDS = {b'\xff\xd8': b'\xff\xd9', b'\x89P': b'IEND'}
_TAIL = 4096  # bytes; some cameras append a little after the end


@TRANSFORMS.register_module()
class CheckedPipeline(BaseTransform):
    """Runs transforms so that what goes wrong names the image.

    Image files are also looked at first: OpenCV decodes a JPEG that was cut off to a picture whose
    rest is grey, and training would go on with it.

    Args:
        transforms (Sequence): Configs or transforms.

    Raises:
        DataError: A file is empty or cut off, or a transform failed on it.
    """

    def __init__(self, transforms: Sequence) -> None:
        self.steps = Compose(transforms)

    def transform(self, results: dict) -> dict | None:
        files = [results[key] for key in ('img_path', 'seg_map_path')
                 if isinstance(results.get(key), str)]
        for path in files:
            check_image_file(path)
        name = ', '.join(files) or f'sample {results.get("sample_idx", "of unknown number")}'
        for step in self.steps.transforms:
            try:
                results = step(results)
            except DataError:
                raise
            except Exception as error:
                kind = type(step).__name__
                raise DataError(f'{name}: {kind} failed: {_brief(error)}') from error
            if results is None:
                return None
        return results


def _brief(error: Exception) -> str:
    return f'{type(error).__name__}: {" ".join(str(error).split())[:300]}'


def check_image_file(path: str) -> None:
    """Checks that a local image file is not empty and not cut off.

    Args:
        path (str): Any path; what is no local file is left to its backend.

    Raises:
        DataError: It is.
    """
    if not os.path.isfile(path):
        return
    size = os.path.getsize(path)
    if not size:
        raise DataError(f'{path}: the file is empty')
    with open(path, 'rb') as file:
        end = _ENDS.get(file.read(2))
        file.seek(max(0, size - _TAIL))
        if end is None or end in file.read():
            return
    try:  # much may have been appended; decoding tells
        with Image.open(path) as image:
            image.load()
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(f'{path} ({size} bytes) is cut off or damaged: {error}') from error


def _nothing_left(path: str, dataset: object) -> str:
    """Why a data set whose annotations were read has no image."""
    wanted = (getattr(dataset, 'metainfo', None) or {}).get('classes') or ()
    content = _coco(path)
    if content is not None and not content.get('images'):
        return f'{path} cannot be read as annotations: it lists no images'
    has = None if content is None else [str(c['name']) for c in content['categories']]
    if has is not None and not {*has} & {*wanted}:
        return (f'{path} has objects of the classes {listed(has, 8, repr)}, none of which the '
                f'config names: metainfo=dict(classes=…) of the data set is '
                f'{listed(wanted, 8, repr)}')
    return (f'{path} was read, but leaves no image for {type(dataset).__name__}: none has an '
            f'object of the classes that the config names ({listed(wanted, 8, repr)}), or '
            f'filter_cfg ({getattr(dataset, "filter_cfg", None)}) drops them all')


def _coco(path: str) -> dict | None:
    """What a COCO-format file holds; None for another format."""
    try:
        with open(path, encoding='utf-8') as file:
            content = json.load(file)
        return content if all('name' in c for c in content['categories']) else None
    except (ValueError, KeyError, TypeError):
        return None


def dataset_error(error: Exception) -> DataError | None:
    """Names the file of a data set that could not be read, or was not there.

    Args:
        error (Exception): With its traceback.

    Returns:
        DataError, optional: None when none was being read, or the error is about something else.
    """
    path, loads, dataset, traceback = None, '', None, error.__traceback__
    while traceback is not None:
        names = traceback.tb_frame.f_locals
        found = names.get('annotation_file') or names.get('ann_file')
        if traceback.tb_frame.f_code.co_name in ('load_data_list', 'full_init'):
            loads, dataset = traceback.tb_frame.f_code.co_name, names.get('self')
            found = found or getattr(dataset, 'ann_file', None)
        path = found if isinstance(found, str) and found else path
        traceback = traceback.tb_next
    if loads and isinstance(error, FileNotFoundError) and error.filename:
        return DataError(f'{error.filename} does not exist; the data set looks for it by its '
                         'data_root, ann_file and data_prefix')
    empty = loads == 'full_init' and getattr(dataset, 'data_list', None) == []
    if empty and (path is None or not os.path.isfile(path)):
        keys = {key: value for key in ('data_prefix', 'img_suffix', 'seg_map_suffix', 'extensions')
                if (value := getattr(dataset, key, None)) is not None}
        return DataError(f'{type(dataset).__name__} found no image: looked with '
                         + ', '.join(f'{key}={value!r}' for key, value in keys.items()))
    if path is None or path in str(error) or not os.path.isfile(path):
        return None
    # Read to its end, and nothing of it was kept.
    if empty:
        return DataError(_nothing_left(path, dataset))
    return DataError(f'{path} ({os.path.getsize(path)} bytes) cannot be read as annotations: '
                     f'{_brief(error)}')
