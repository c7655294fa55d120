"""Writes docs/commands.md, what the tools print for ``--help``: python docs/site/commands.py."""
from __future__ import annotations

import contextlib
import io
import os
import runpy
import sys
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / 'docs' / 'commands.md'
# Tool: its subcommands.
TOOLS = {
    'train.py': (), 'test.py': (), 'prompt_checkpoint.py': (
        'info', 'verify', 'extract', 'merge', 'pack', 'push'),
    'predict.py': (), 'export.py': (), 'demo.py': (), 'test_robustness.py': (),
    'benchmark_methods.py': (), 'quickstart.py': (),
    'analysis_tools/show_prompts.py': (), 'analysis_tools/count_params.py': (),
    'analysis_tools/benchmark_training.py': (), 'analysis_tools/benchmark_trunk.py': (),
    'analysis_tools/benchmark_build.py': (), 'analysis_tools/benchmark_reducing.py': (),
    'analysis_tools/config_matrix.py': (),
    'analysis_tools/backbone_matrix.py': (), 'analysis_tools/export_matrix.py': (),
}
HEAD = """# Command lines

What each Python tool prints for `--help`, written by `python docs/site/commands.py`. The shell
scripts start them: `tools/dist_train.sh CONFIG PROCESSES`, `tools/dist_test.sh CONFIG CHECKPOINT
PROCESSES` and their Slurm forms hand further arguments on, see [GPUs and machines](distributed.md).
"""


def help_of(tool: str, command: str | None = None) -> str:
    """What ``python tools/TOOL [COMMAND] --help`` prints, 100 columns wide."""
    path = ROOT / 'tools' / tool
    words = [command] if command else []
    printed = io.StringIO()
    with mock.patch.object(sys, 'argv', [path.name, *words, '--help']), \
            mock.patch.object(sys, 'path', [str(path.parent), *sys.path]), \
            mock.patch.dict(os.environ, COLUMNS='100', NO_COLOR='1'), \
            contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        runpy.run_path(str(path), run_name='__main__')
    return printed.getvalue().rstrip()


def page() -> str:
    """The whole page."""
    parts = [HEAD]
    for tool, commands in TOOLS.items():
        parts.append(f'## tools/{tool}\n')
        for command in (None, *commands):
            if command:
                parts.append(f'### {Path(tool).stem} {command}\n')
            parts.append(f'```text\n{help_of(tool, command)}\n```\n')
    return '\n'.join(parts)


if __name__ == '__main__':
    PAGE.write_text(page(), encoding='utf-8')
