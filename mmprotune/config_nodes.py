"""Looking through configs: nested dicts and lists whose types are names, or classes themselves."""
from __future__ import annotations

from collections.abc import Iterator


def type_name(node: object) -> str:
    """The bare name of a type: 'ResNet' for 'mmdet.ResNet', for the class, and for a config of it.

    Args:
        node (object): A config dict, the value of its ``type``, or None.

    Returns:
        str: The name without scope or module; '' where there is no type.
    """
    kind = node.get('type') if isinstance(node, dict) else node
    if kind is None:
        return ''
    return getattr(kind, '__name__', str(kind)).rpartition('.')[2]


def dicts_in(node: object) -> Iterator[dict]:
    """Every dict inside nested dicts, lists and tuples, outermost first."""
    if isinstance(node, dict):
        yield node
        node = list(node.values())
    if isinstance(node, (list, tuple)):
        for child in node:
            yield from dicts_in(child)


def names_file(init_cfg: object) -> bool:
    """Whether an ``init_cfg`` (one dict, not a list) is of the kind that loads a file."""
    return isinstance(init_cfg, dict) and type_name(init_cfg) in ('Pretrained', 'PretrainedInit')


def find_backbones(model: object) -> list[tuple[str, list[dict]]]:
    """The backbones in the config of a model, wherever they are.

    Args:
        model (object): Config of a model.

    Returns:
        list[tuple[str, list[dict]]]: For each, its dotted path (a list's items are numbered) and
        the dicts around it, outermost first; the last one has it under the key ``backbone``.
        What a backbone itself holds is not looked at.
    """
    found = []

    def visit(node: object, path: str, around: list[dict]) -> None:
        if isinstance(node, dict):
            around = [*around, node]
            for key, child in node.items():
                inner = f'{path}.{key}' if path else str(key)
                if key == 'backbone' and isinstance(child, dict) and 'type' in child:
                    found.append((inner, around))
                else:
                    visit(child, inner, around)
        elif isinstance(node, (list, tuple)):
            for i, child in enumerate(node):
                visit(child, f'{path}.{i}', around)

    visit(model, '', [])
    return found
