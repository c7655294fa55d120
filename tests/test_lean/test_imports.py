"""The lean backward pass and freezing stand on PyTorch alone, and name nothing above them."""
import ast
from pathlib import Path

import pytest

import mmprotune

PACKAGE = Path(mmprotune.__file__).parent
HOSTS = {'mmengine', 'mmcv', 'mmdet', 'mmseg', 'mmpretrain', 'timm'}
BELOW = {'mmprotune.errors', 'mmprotune.lean', 'mmprotune.freezing'}


@pytest.mark.parametrize('room', ['lean', 'freezing'])
def test_what_a_room_imports_and_names(room):
    for file in sorted((PACKAGE / room).rglob('*.py')):
        package = ('mmprotune', *file.relative_to(PACKAGE).parent.parts)
        for node in ast.walk(ast.parse(file.read_text(encoding='utf-8'))):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                start = package[:len(package) - node.level + 1] if node.level else ()
                names = ['.'.join((*start, *filter(None, [node.module])))]
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert not node.value.startswith(('mmprotune.models', 'mmprotune.engine')), file
                continue
            else:
                continue
            for name in names:
                top, *rest = name.split('.')
                assert top not in HOSTS, (file, name)
                assert top != 'mmprotune' or f'{top}.{rest[0]}' in BELOW, (file, name)
