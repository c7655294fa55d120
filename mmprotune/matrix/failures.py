"""How a failure is told, and whether memory ran out."""
from __future__ import annotations

import re


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there was no more memory."""
    return isinstance(error, MemoryError) or bool(
        re.search(r"can't allocate memory|Cannot allocate memory|out of memory|bad_alloc",
                  str(error)))


def one_line(error: BaseException | str) -> str:
    """An error, or what a process said last, in at most 300 characters."""
    text = error if isinstance(error, str) else f'{type(error).__name__}: {error}'
    text = re.sub(r'/\S*/(?:site-packages|config_matrix_\w+)/', '', text)  # this machine's folders
    return re.sub(r'\s+', ' ', text).strip()[:300]
