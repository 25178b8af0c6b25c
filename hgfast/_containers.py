"""What models take and return: tensors in any nesting of containers.

Lists, tuples, named tuples, dicts and dataclasses are looked into; everything else is a leaf.
(torch.utils._pytree knows dataclasses only once somebody has registered each class.)
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any


def children(value: Any) -> list[tuple[str, Any]] | None:
    """What a container holds, each with the text that follows the container's name in code
    (``[0]``, ``['heatmaps']``, ``.offsets``); None for a leaf."""
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return [(f".{name}", item) for name, item in zip(value._fields, value, strict=True)]
    if isinstance(value, (list, tuple)):
        return [(f"[{index}]", item) for index, item in enumerate(value)]
    # Before dataclasses: what is both (a model output of transformers) holds its items as a dict.
    if isinstance(value, Mapping):
        return [(f"[{key!r}]", item) for key, item in value.items()]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [(f".{field.name}", getattr(value, field.name)) for field in _fields(value)]
    return None


def leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """(name, leaf) of every leaf, in order; a leaf that stands alone has the name ""."""
    held = children(value)
    if held is None:
        yield name, value
        return
    for key, item in held:
        yield from leaves(item, name + key)


def structure(value: Any) -> Any:
    """Equal for two values whose containers are of the same types and hold the same keys."""
    held = children(value)
    if held is None:
        return None
    items = {key: structure(item) for key, item in held}
    # A dict is the same whatever the order of its keys; of the others the keys are an order.
    return type(value), items


def convert(function: Callable[[Any], Any], value: Any) -> Any:
    """The same containers anew, each leaf replaced by what ``function`` makes of it."""
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(convert(function, item) for item in value))
    if isinstance(value, (list, tuple)):
        return type(value)(convert(function, item) for item in value)
    if isinstance(value, Mapping):
        items = {key: convert(function, item) for key, item in value.items()}
        if type(value) is dict:
            return items
        fresh: Any = copy.copy(value)  # a defaultdict keeps its factory, an OrderedDict its class
        for key, item in items.items():
            fresh[key] = item
        return fresh
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fresh = copy.copy(value)  # __init__ may take other arguments than the fields
        for field in _fields(value):
            object.__setattr__(fresh, field.name, convert(function, getattr(value, field.name)))
        return fresh
    return function(value)


def _fields(value: Any) -> list[dataclasses.Field[Any]]:
    return [field for field in dataclasses.fields(value) if hasattr(value, field.name)]
