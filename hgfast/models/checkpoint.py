"""Public checkpoints of stacked hourglasses, read into :func:`hgfast.models.hourglass`.

Three layouts of names are known: this library's own, and two of public PyTorch hourglasses.
"bearpaw" is what Wei Yang's pytorch-pose and its descendants share:

    conv1, bn1, layer1.0, layer2.0, layer3.0             the stem
    hg.S.hg.L.P.B       stack S, level L counted from the bottom, place P, residual B;
                        places: 0 upper, 1 enter, 2 leave, 3 the bottom itself (L = 0 only)
    res.S.B  fc.S.0  fc.S.1  score.S                     residuals, conv, norm, heatmaps
    fc_.S  score_.S                                      the remerge after stack S
    bn1 conv1 bn2 conv2 bn3 conv3 downsample.0           inside a residual

"princeton" is that of princeton-vl/pytorch_stacked_hourglass, by the paper's own group:

    pre.0.conv  pre.0.bn  pre.1  pre.3  pre.4            the stem, "paper"
    hgs.S.0.PATH        stack S; PATH is up1, low1, low3, or low2. and a PATH one level
                        down; a low2 that holds no other place is the bottom
    features.S.0  features.S.1.conv  features.S.1.bn  outs.S.conv
                                                         residual, conv, norm, heatmaps
    merge_features.S.conv.conv  merge_preds.S.conv.conv  the remerge after stack S
    bn1 conv1.conv bn2 conv2.conv bn3 conv3.conv skip_layer.conv
                                                         inside a residual

There every residual has a skip_layer, and those that keep the width never use it: such weights
are left out. Every place has one residual. Not read are networks that widen on the way down
(``increase``, 0 in the published ones), and stems that are not a quarter and half as wide as the
rest (there they are 64 and 128 wide, whatever the rest is). That network takes images (B, H, W, 3)
and stacks its heatmaps; read into this library's it takes (B, 3, H, W) and lists them.
"""

from __future__ import annotations

import os
import pickle
import re
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hgfast.models.hourglass import StackedHourglass, hourglass

State = dict[str, Tensor]

# Where training scripts put the weights among epoch counters and optimizer states.
_CONTAINERS = ("state_dict", "model_state_dict", "model")
# Put before every name by DataParallel.
_PREFIXES = ("module.", "model.")
# Put by torch.compile before the name of whatever was compiled, so at any depth.
_COMPILED = "_orig_mod."

_PLACES = {"upper": 0, "enter": 1, "leave": 2, "inner": 3}

_BEARPAW_NAMES = (
    (re.compile(r"stem\.conv\."), "conv1."),
    (re.compile(r"stem\.norm\."), "bn1."),
    (re.compile(r"stem\.residual(\d)\."), r"layer\1.0."),
    (re.compile(r"heads\.(\d+)\.residuals\."), r"res.\1."),
    (re.compile(r"heads\.(\d+)\.conv\."), r"fc.\1.0."),
    (re.compile(r"heads\.(\d+)\.norm\."), r"fc.\1.1."),
    (re.compile(r"heads\.(\d+)\.heatmap\."), r"score.\1."),
    (re.compile(r"remerges\.(\d+)\.features\."), r"fc_.\1."),
    (re.compile(r"remerges\.(\d+)\.heatmap\."), r"score_.\1."),
    (re.compile(r"\.norm([123])\."), r".bn\1."),
    (re.compile(r"\.project\."), ".downsample.0."),
)
_HOURGLASS_NAME = re.compile(
    r"hourglasses\.(?P<stack>\d+)\.(?P<path>(?:inner\.)*?)(?P<place>upper|enter|leave|inner)\.(?=\d)"
)

_PRINCETON_NAMES = (
    (re.compile(r"stem\.(conv|norm)\."), r"pre.0.\1."),
    (re.compile(r"stem\.residual1\."), "pre.1."),
    (re.compile(r"stem\.residual2\."), "pre.3."),
    (re.compile(r"stem\.residual3\."), "pre.4."),
    (re.compile(r"hourglasses\.(\d+)\."), r"hgs.\1.0."),
    (re.compile(r"(upper|enter|leave|inner)\.0\."), r"\1."),
    (re.compile(r"\bupper\."), "up1."),
    (re.compile(r"\benter\."), "low1."),
    (re.compile(r"\binner\."), "low2."),
    (re.compile(r"\bleave\."), "low3."),
    (re.compile(r"heads\.(\d+)\.residuals\.0\."), r"features.\1.0."),
    (re.compile(r"heads\.(\d+)\.(conv|norm)\."), r"features.\1.1.\2."),
    (re.compile(r"heads\.(\d+)\.heatmap\."), r"outs.\1.conv."),
    (re.compile(r"remerges\.(\d+)\.features\."), r"merge_features.\1.conv.conv."),
    (re.compile(r"remerges\.(\d+)\.heatmap\."), r"merge_preds.\1.conv.conv."),
    (re.compile(r"\.norm\."), ".bn."),
    (re.compile(r"\.norm([123])\."), r".bn\1."),
    (re.compile(r"\.conv([123])\."), r".conv\1.conv."),
    (re.compile(r"\.project\."), ".skip_layer.conv."),
)
_UNUSED = re.compile(r"(.*)\.skip_layer\.conv\.(weight|bias)")


def bearpaw_name(name: str, depth: int) -> str:
    """The name in the bearpaw layout of what this library calls ``name``."""
    found = _HOURGLASS_NAME.match(name)
    if found:
        level = depth - 1 - found["path"].count("inner.")
        place = _PLACES[found["place"]]
        name = f"hg.{found['stack']}.hg.{level}.{place}.{name[found.end() :]}"
    for pattern, replacement in _BEARPAW_NAMES:
        name = pattern.sub(replacement, name)
    return name


def princeton_name(name: str) -> str:
    """The name in the princeton layout of what this library calls ``name``."""
    for pattern, replacement in _PRINCETON_NAMES:
        name = pattern.sub(replacement, name)
    return name


def load_checkpoint(
    model_or_path: str | os.PathLike[str] | nn.Module | Mapping[str, Any],
) -> StackedHourglass:
    """Rebuild a trained stacked hourglass as this library's reference network.

    Stacks, features, blocks, depth and joints are read off the names and shapes of the
    weights. Prefixes left by DataParallel (``module.``) and torch.compile (``_orig_mod.``)
    are looked through, and so is a training script's ``{"state_dict": ...}``.

    Args:
        model_or_path: a file (.pth, .pth.tar, .pt, .safetensors), a loaded checkpoint or
            state_dict, or a module; in the bearpaw or princeton layout or this library's own.

    Returns:
        A :func:`hgfast.models.hourglass` in eval mode, on the CPU, in float32, with weights
        of its own: the given module or mapping shares no memory with it. It takes images
        normalised the way the checkpoint was trained, and returns a list of heatmaps.

    Raises:
        ValueError: the file is no checkpoint, or is a pickle that wants to run code (only
            tensors, plain containers and NumPy scalars are read); or the weights are not
            those of a stacked hourglass: the first missing and first unexpected names, or
            the first wrong shape, are given.
        OSError: the file cannot be opened.
        TypeError: ``model_or_path`` is none of the above.
    """
    content: Mapping[str, Any]
    if isinstance(model_or_path, nn.Module):
        origin, content = type(model_or_path).__name__, model_or_path.state_dict()
    elif isinstance(model_or_path, Mapping):
        origin, content = "the given mapping", model_or_path
    elif isinstance(model_or_path, (str, os.PathLike)):
        origin, content = os.fspath(model_or_path), read_file(os.fspath(model_or_path))
    else:
        raise TypeError(
            "load_checkpoint expects a path, a state_dict or an nn.Module, "
            f"got {type(model_or_path).__name__}"
        )
    return _build(tensors_in(content, origin), origin)


def read_file(path: str) -> Mapping[str, Any]:
    """A checkpoint file's content, read without ever running code from it."""
    if path.endswith(".safetensors"):
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} is not a safetensors file: {error}") from error
    try:
        content = _load(path)
    except pickle.UnpicklingError as error:
        wanted = re.search(r"(?:GLOBAL|class|function) ([\w.]+\.\w+)", str(error))
        if wanted is None:
            raise ValueError(
                f"{path} is not a checkpoint that can be read without running code from it"
            ) from error
        raise ValueError(
            f"{path} refused: loading it would run code ({wanted[1]}), and a checkpoint needs "
            "only tensors. If you trust its source, load it yourself and pass its state_dict"
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError, IndexError, AttributeError) as error:
        raise ValueError(f"{path} is not a PyTorch checkpoint, or is damaged") from error
    if isinstance(content, Mapping):
        return content
    raise ValueError(f"{path} holds a {type(content).__name__}; a state_dict was expected")


def _load(path: str) -> Any:
    with torch.serialization.safe_globals(_numpy_scalars()):
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except UnicodeDecodeError:
            # Python 2 wrote a NumPy scalar's bytes as text, which only latin1 gives back.
            with warnings.catch_warnings():
                # PyTorch says that encoding has no effect here, but it has.
                warnings.filterwarnings("ignore", message="pickle_load_args")
                return torch.load(path, map_location="cpu", weights_only=True, encoding="latin1")


def _numpy_scalars() -> list[Any]:
    """What pickles of NumPy scalars (a training script's best accuracy) refer to."""
    scalar = np.float64(0).__reduce__()[0]
    # Before NumPy 2 the module was called numpy.core; files of both kinds exist.
    names = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")
    kinds = {type(np.dtype(code)) for code in np.typecodes["AllInteger"] + "?efd"}
    return [*((scalar, name) for name in names), np.dtype, *kinds]


def tensors_in(content: Mapping[str, Any], origin: str) -> State:
    """The named tensors of a checkpoint, out of its containers and without its prefixes."""
    for container in _CONTAINERS:
        if isinstance(content.get(container), Mapping):
            return tensors_in(content[container], origin)
    state = {
        str(name).replace(_COMPILED, ""): value
        for name, value in content.items()
        if isinstance(value, Tensor)
    }
    if not state:
        raise ValueError(f"{origin} holds no named tensors; a state_dict was expected")
    prefix = next((p for p in _PREFIXES if all(name.startswith(p) for name in state)), None)
    if prefix is not None:
        return tensors_in({name[len(prefix) :]: value for name, value in state.items()}, origin)
    return state


def _build(state: State, origin: str) -> StackedHourglass:
    rename: Callable[[str], str]
    if any(name.startswith(("stem.", "hourglasses.", "heads.")) for name in state):
        options, rename = _own_options(state), str
    elif any(name.startswith(("pre.", "hgs.", "outs.")) for name in state):
        options, rename = _princeton_options(state), princeton_name
        state = _without_unused(state)
    else:
        options = _bearpaw_options(state)
        rename = partial(bearpaw_name, depth=options["depth"])
    # On "meta" nothing is allocated or drawn from the random generator in vain.
    with torch.device("meta"):
        model = hourglass(**options)
    expected = {rename(name): (name, value) for name, value in model.state_dict().items()}
    _check({name: value for name, (_, value) in expected.items()}, state, origin, options)
    weights: State = {}
    for name, (own_name, value) in expected.items():
        given = state.get(name, torch.zeros(()))  # only a batch counter may be absent
        weights[own_name] = given.detach().to("cpu", value.dtype, copy=True).contiguous()
    model.load_state_dict(weights, assign=True)
    return model.eval()


def _own_options(state: State) -> dict[str, Any]:
    joints, features = _matrix(state, "heads.0.heatmap.weight")
    projects_last = "stem.residual3.project.weight" in state
    descents = [name.count("inner.") for name in state if name.startswith("hourglasses.0.")]
    return {
        "stacks": _count(state, r"heads\.(\d+)\."),
        "features": features,
        "blocks": _count(state, r"heads\.0\.residuals\.(\d+)\."),
        "depth": max([1, *descents]),
        "joints": joints,
        "stem": "paper" if projects_last else "bearpaw",
    }


def _bearpaw_options(state: State) -> dict[str, Any]:
    joints, features = _matrix(state, "score.0.weight")
    return {
        "stacks": _count(state, r"score\.(\d+)\."),
        "features": features,
        "blocks": _count(state, r"res\.0\.(\d+)\."),
        "depth": _count(state, r"hg\.0\.hg\.(\d+)\.", absent=4),
        "joints": joints,
        "stem": "bearpaw",
    }


def _princeton_options(state: State) -> dict[str, Any]:
    joints, features = _matrix(state, "outs.0.conv.weight")
    descents = [name.count("low2.") for name in state if name.startswith("hgs.0.")]
    return {
        "stacks": _count(state, r"outs\.(\d+)\."),
        "features": features,
        "blocks": 1,
        "depth": max([1, *descents]),
        "joints": joints,
        "stem": "paper",
    }


def _without_unused(state: State) -> State:
    """Without the projections of residuals that keep their width: they are never run."""

    def is_unused(name: str) -> bool:
        found = _UNUSED.fullmatch(name)
        if found is None:
            return False
        weight = state.get(f"{found[1]}.skip_layer.conv.weight")
        return weight is not None and weight.ndim == 4 and weight.shape[0] == weight.shape[1]

    return {name: value for name, value in state.items() if not is_unused(name)}


def _count(state: State, pattern: str, absent: int = 1) -> int:
    """How many different indices the names give at the pattern's group."""
    found = (re.match(pattern, name) for name in state)
    return len({match[1] for match in found if match}) or absent


def _matrix(state: State, name: str) -> tuple[int, int]:
    """Output and input channels of the convolution that makes heatmaps.

    The usual ones where there is no such weight: the comparison that follows will say so.
    """
    weight = state.get(name)
    usable = weight is not None and weight.ndim == 4 and weight.shape[1] % 4 == 0
    if weight is None or not usable or 0 in weight.shape:
        return 16, 256
    return weight.shape[0], weight.shape[1]


def _check(expected: State, given: State, origin: str, options: dict[str, Any]) -> None:
    # PyTorch before 0.4.1 wrote no batch counters; they play no part at inference.
    missing = [
        name for name in expected if name not in given and not name.endswith("num_batches_tracked")
    ]
    unexpected = [name for name in given if name not in expected]
    if missing or unexpected:
        faults = [
            f"{len(names)} {what} (first: {names[0]})"
            for what, names in (("missing", missing), ("unexpected", unexpected))
            if names
        ]
        raise ValueError(
            f"{origin} is not a stacked hourglass of a known layout: "
            f"{' and '.join(faults)}, when read as {_describe(options)}"
        )
    for name, value in expected.items():
        if name in given and given[name].shape != value.shape:
            raise ValueError(
                f"{origin}: {name} has shape {tuple(given[name].shape)}, "
                f"expected {tuple(value.shape)}, when read as {_describe(options)}"
            )


def _describe(options: dict[str, Any]) -> str:
    return f"hourglass({', '.join(f'{name}={value!r}' for name, value in options.items())})"
