"""What a module must not have, to be traced, and what tracing must not leave behind."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from hgfast.trace.graph import TraceError


def check_untouched(module: nn.Module) -> None:
    """Refuse modules whose calls do more, or other, than their class's forward says.

    The module's own instance may have another forward: it is the class's that is traced.
    """
    if isinstance(module, torch.jit.ScriptModule):
        raise TraceError("it is a TorchScript module")
    for name, child in module.named_modules():
        where = name or "the module itself"
        if any(map(is_lazy, child.parameters(recurse=False))):
            raise TraceError(f"{where} is lazy and has no weights yet")
        if child._forward_hooks or child._forward_pre_hooks:
            raise TraceError(f"{where} has a forward hook")
        if parametrize.is_parametrized(child):
            raise TraceError(f"{where} has a parametrisation")
        if "forward" in child.__dict__ and child is not module:
            raise TraceError(f"{where} has a forward of its own, set on the instance")


def with_its_class_forward(module: nn.Module) -> nn.Module:
    """The module, or a shallow copy without the forward that its instance has of its own.

    A copy, because other threads may be calling the module.
    """
    if "forward" not in module.__dict__:
        return module
    bare: nn.Module = module.__new__(type(module))
    bare.__dict__.update({k: v for k, v in module.__dict__.items() if k != "forward"})
    return bare


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    # Not module.eval(): some models override it (and return None, or freeze things).
    modes = [(child, child.training) for child in module.modules()]
    for child, _ in modes:
        child.training = False
    try:
        yield
    finally:
        for child, mode in modes:
            child.training = mode


@contextmanager
def attributes_kept(module: nn.Module) -> Iterator[None]:
    """Put back what a traced forward wrote to its modules, and refuse to trust such a forward."""
    before = [(child, dict(child.__dict__)) for child in module.modules()]
    held = [(item, copy.copy(item)) for _, old in before for item in old.values() if _holds(item)]
    changed: object = None
    try:
        yield
    finally:
        for item, was in held:
            if not _same_items(item, was):
                item.clear()
                (item.extend if isinstance(item, list) else item.update)(was)
                changed = item
        for child, old in before:
            new = child.__dict__
            if new.keys() != old.keys() or any(new[key] is not old[key] for key in old):
                changed = child
                new.clear()
                new.update(old)
    if changed is not None:
        raise TraceError("its forward, or that of a module in it, sets attributes")


def _holds(item: object) -> bool:
    return isinstance(item, (list, dict, set))


def _same_items(now: Any, before: Any) -> bool:
    if isinstance(now, dict):
        now, before = [*now, *now.values()], [*before, *before.values()]
    return len(now) == len(before) and all(a is b for a, b in zip(now, before, strict=True))
