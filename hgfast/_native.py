"""The one door to the compiled module hgfast._C.

Without it hgfast still works, through plain PyTorch. So a module that is missing, broken, or
built for another torch is never an error here: `load()` returns None, and `reason` says in one
line what is wrong and what to do about it.
"""

import importlib
import importlib.machinery
import mmap
import os
import re
import threading
from pathlib import Path
from types import ModuleType

import torch  # first: the module finds torch's libraries already in the process

from hgfast._version import __version__

#: The environment variable that switches everything off; asked for at every call.
DISABLE = "HGFAST_DISABLE"

_FOLDER = Path(__file__).resolve().parent
_BUILT_FOR = re.compile(rb"hgfast was built for torch=([\w.+-]+);")  # csrc/build_info.cpp

reason: str | None = None
"""Why `load()` gave None; None before its first call, and where the module is loaded."""

_lock = threading.Lock()
_tried = False
_module: ModuleType | None = None


def load() -> ModuleType | None:
    """The compiled module, or None where there is none that works here (see `reason`).

    Loads it at the first call; later calls return the same answer. Never raises.
    """
    global _tried, _module, reason
    if not _tried:
        with _lock:
            if not _tried:
                _module, trouble = _load()
                reason = f"no compiled kernels: {trouble}. {_remedy()}" if trouble else None
                _tried = True
    return _module


def is_disabled() -> bool:
    """Whether plain PyTorch is to run in place of every kernel."""
    return os.environ.get(DISABLE, "0") not in ("", "0")


def built_for(file: Path) -> str | None:
    """The torch version that a compiled module was built for, read without loading it."""
    with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        found = _BUILT_FOR.search(data)
        return found.group(1).decode() if found else None


def _load() -> tuple[ModuleType | None, str]:
    """The module and an empty string, or None and what is wrong."""
    file = _find()
    if file is None:
        others = sorted(other.name for other in _FOLDER.glob("_C.*") if other.suffix != ".pyi")
        if others:
            return None, f"{others[0]} was built for another Python"
        return None, "hgfast/_C was not built (was there a C++ compiler?)"
    try:
        # Between minor versions of torch the layout of its classes changes: such a module may
        # load and then crash. So look before loading.
        target = built_for(file)
        if target and _minor(target) != _minor(torch.__version__):
            return None, f"{file.name} was built for torch {target}, this is {torch.__version__}"
        module = importlib.import_module("hgfast._C")
        version = module.build_info()["version"]
    except Exception as error:  # whatever a broken file does, eager PyTorch still works
        lines = str(error).splitlines() or [type(error).__name__]
        return None, f"{file.name} does not load ({lines[0]})"
    if version != __version__:
        return None, f"{file.name} belongs to hgfast {version}, this is {__version__}"
    return module, ""


def _find() -> Path | None:
    candidates = (_FOLDER / f"_C{suffix}" for suffix in importlib.machinery.EXTENSION_SUFFIXES)
    return next(filter(Path.is_file, candidates), None)


def _minor(version: str) -> list[str]:
    return version.split(".")[:2]


def _remedy() -> str:
    if (_FOLDER.parent / "CMakeLists.txt").is_file():  # a source tree
        return f"Build them in {_FOLDER.parent}: python setup.py build_ext --inplace"
    return (
        "With a C++ compiler on PATH, reinstall from hgfast's sources: "
        "pip install --force-reinstall --no-deps ."
    )
