"""Parts of public packages, without what their `__init__` would import.

mmpose's networks lie beside others that need the compiled mmcv; face-alignment's beside detectors
that need a compiler of their own; timm's beside data sets that need torchvision. What the tests
want needs none of that. So the packages above it become empty ones with the real folders.
"""

from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from torch import nn

REASON = "needs the peer: pip install --no-deps -r requirements-peers.txt"


def hollow(*names: str) -> None:
    """Put empty packages with the real folders where these would be imported."""
    for name in names:
        if name in sys.modules:
            continue
        top, *rest = name.split(".")
        spec = importlib.util.find_spec(top) if top not in sys.modules else None
        locations = (
            spec.submodule_search_locations
            if spec
            else getattr(sys.modules.get(top), "__path__", None)
        )
        if not locations:
            pytest.skip(f"{top} {REASON}", allow_module_level=True)
        package = types.ModuleType(name)
        package.__path__ = [str(Path(next(iter(locations))).joinpath(*rest))]
        sys.modules[name] = package


def mmpose_backbone(module: str, name: str) -> Any:
    """A class out of mmpose.models.backbones."""
    pytest.importorskip("mmpose", reason=REASON)
    hollow("mmpose.models", "mmpose.models.backbones")
    return getattr(import_module(f"mmpose.models.backbones.{module}"), name)


def fan() -> Any:
    """face-alignment's FAN."""
    hollow("face_alignment")
    return import_module("face_alignment.models.fan").FAN


def timm_hrnet() -> Any:
    """The module timm.models.hrnet, with a function for each network."""
    hollow("timm", "timm.data", "timm.models")
    timm, data = sys.modules["timm"], sys.modules["timm.data"]
    constants = import_module("timm.data.constants")
    vars(data).update({k: v for k, v in vars(constants).items() if k.isupper()})
    timm.__version__ = import_module("timm.version").__version__
    with _without_torchvision():
        return import_module("timm.models.hrnet")


@contextmanager
def _without_torchvision() -> Iterator[None]:
    """timm asks torchvision for one class, to know its instances from others."""
    if importlib.util.find_spec("torchvision") is not None:
        yield
        return
    names = "torchvision", "torchvision.ops", "torchvision.ops.misc"
    for name in names:
        sys.modules[name] = types.ModuleType(name)
    sys.modules[names[-1]].FrozenBatchNorm2d = type("FrozenBatchNorm2d", (nn.Module,), {})
    try:
        yield
    finally:
        for name in names:
            del sys.modules[name]
