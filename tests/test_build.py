"""The build, and life without a build."""

import fnmatch
import importlib.machinery
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
import torch

from hgfast import _native

ROOT = Path(__file__).resolve().parents[1]
SUFFIX = importlib.machinery.EXTENSION_SUFFIXES[0]


def built_file():
    module = _native.load()
    if module is None:
        pytest.skip(str(_native.reason))
    return Path(module.__file__)


# ---- A module that is missing or broken ----------------------------------------------------------


@pytest.fixture
def package(tmp_path):
    """hgfast/_native.py alone, beside a torch that is only a version: looking before loading and
    explaining need no more, and a process starts in no time."""
    (tmp_path / "torch.py").write_text(f"__version__ = {torch.__version__!r}\n")
    folder = tmp_path / "hgfast"
    folder.mkdir()
    (folder / "__init__.py").touch()
    for name in ("_native.py", "_version.py"):
        shutil.copy(ROOT / "hgfast" / name, folder)
    return folder


def reason(package):
    code = (
        "from hgfast import _native\n"
        "assert _native.reason is None\n"
        "assert _native.load() is None\n"
        "first = _native.reason\n"
        "assert _native.load() is None and _native.reason is first\n"
        "print(first)"
    )
    run = [sys.executable, "-S", "-c", code]
    result = subprocess.run(run, cwd=package.parent, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("no compiled kernels: ")
    return lines[0]


def test_a_missing_module_is_one_line_with_the_remedy(package):
    line = reason(package)
    assert "hgfast/_C was not built" in line
    assert "pip install" in line


def test_in_a_source_tree_the_remedy_is_to_build_there(package):
    shutil.copy(ROOT / "CMakeLists.txt", package.parent)
    assert reason(package).endswith("python setup.py build_ext --inplace")


def test_a_module_for_another_python_is_named(package):
    (package / "_C.cpython-36m-x86_64-linux-gnu.so").touch()
    assert "_C.cpython-36m-x86_64-linux-gnu.so was built for another Python" in reason(package)


@pytest.mark.parametrize("content", [b"", b"not a library", b"\x7fELF" + bytes(200)])
def test_a_corrupt_module_is_one_line(package, content):
    (package / f"_C{SUFFIX}").write_bytes(content)
    assert f"_C{SUFFIX} does not load (" in reason(package)


def test_a_module_that_lacks_its_libraries_is_one_line(package):
    shutil.copy(built_file(), package / f"_C{SUFFIX}")  # that torch.py brings none
    line = reason(package)
    assert "does not load (" in line
    assert "torch" in line


def test_a_module_for_another_torch_is_refused_before_it_is_loaded(package):
    content = built_file().read_bytes()
    own = _native.built_for(built_file())
    assert own == _native.load().build_info()["torch"]
    other = "1.9" + "x" * (len(own) - 3)
    content = content.replace(f"torch={own};".encode(), f"torch={other};".encode())
    (package / f"_C{SUFFIX}").write_bytes(content)
    assert f"built for torch {other}, this is {torch.__version__}" in reason(package)


def test_the_package_works_without_a_module(tmp_path):
    ignore = shutil.ignore_patterns("_C.*", "__pycache__")
    shutil.copytree(ROOT / "hgfast", tmp_path / "hgfast", ignore=ignore)
    code = """
import torch, hgfast, hgfast.ops
from hgfast import _native
assert _native.load() is None
torch.manual_seed(0)
model = hgfast.models.hourglass(stacks=1, features=16, blocks=1, depth=2, joints=4).eval()
x = torch.randn(1, 3, 64, 64)
with torch.inference_mode():
    fast = hgfast.optimize(model)
    torch.testing.assert_close(fast(x), model(x))
    coords, scores = hgfast.decode(fast(x)[-1])
print(tuple(coords.shape), tuple(scores.shape))
"""
    run = [sys.executable, "-c", code]
    result = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "(1, 4, 2) (1, 4)\n"


# ---- setup.py ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory):
    """An interpreter without torch. setuptools reaches it through PYTHONPATH, as in pip's
    isolated builds."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder, with_pip=False, symlinks=True)
    return folder


def setup_py(bare_python):
    return subprocess.run(
        [bare_python / "bin" / "python", ROOT / "setup.py", "--version"],
        env=os.environ | {"PYTHONPATH": sysconfig.get_path("purelib")},
        capture_output=True,
        text=True,
    )


def test_setup_without_torch_stops_with_one_line(bare_python):
    pytest.importorskip("setuptools")
    result = setup_py(bare_python)
    assert result.returncode != 0
    assert len(result.stderr.splitlines()) == 1
    assert "has no torch. Install torch >= 2.11 first" in result.stderr


@pytest.mark.parametrize(("version", "fine"), [("2.10.2+cu128", False), ("2.11.0", True)])
def test_setup_looks_at_the_version_of_the_torch_it_builds_for(bare_python, version, fine):
    pytest.importorskip("setuptools")
    (site,) = bare_python.glob("lib/python*/site-packages")
    entry = site / "torch-0.dist-info"
    entry.mkdir()
    (entry / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n")
    try:
        result = setup_py(bare_python)
    finally:
        shutil.rmtree(entry)
    if fine:
        assert result.returncode == 0, result.stderr
    else:
        assert result.returncode != 0
        assert result.stderr == (
            f"hgfast: torch {version} is too old. Install torch >= 2.11 first.\n"
        )


def test_every_data_file_is_in_the_wheel():
    tomllib = pytest.importorskip("tomllib", reason="tomllib came with Python 3.11")
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    patterns = [
        f"{package.replace('.', '/')}/{pattern}"
        for package, patterns in setuptools["package-data"].items()
        for pattern in patterns
    ]
    listed = subprocess.run(
        ["git", "ls-files", "hgfast"], cwd=ROOT, capture_output=True, text=True
    ).stdout.splitlines()
    data = [name for name in listed if not name.endswith(".py")]
    if not data:
        pytest.skip("not a git checkout: the files that belong to hgfast are not known")
    assert [name for name in data if not any(fnmatch.fnmatch(name, p) for p in patterns)] == []


# ---- What was compiled ---------------------------------------------------------------------------


def test_no_second_thread_pool():
    """One OpenMP runtime in the process, or at::parallel_for would start threads of its own."""
    built_file()
    if not sys.platform.startswith("linux"):
        pytest.skip("reads Linux's /proc")
    libraries = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines()}
    runtimes = [path for path in libraries if re.search(r"lib(g|i)omp", Path(path).name)]
    assert len(runtimes) <= 1, runtimes


def test_kernels_share_no_code_between_instruction_sets():
    """Of an inline function or a template that two object files hold, the linker keeps one copy.
    Outside its instruction set's namespace that may be the AVX-512 one, for every machine."""
    objects = sorted(ROOT.glob("build/temp.*/CMakeFiles/hgfast_*.dir/csrc/cpu/*.o"))
    nm = shutil.which("nm")
    if not objects or not nm:
        pytest.skip("needs nm and the build folder of `make build`")
    foreign = []
    for file in objects:
        isa = re.search(r"hgfast_(\w+)\.dir", str(file)).group(1)
        if isa == "dispatch":
            continue
        symbols = subprocess.run([nm, "-C", file], capture_output=True, text=True, check=True)
        for line in symbols.stdout.splitlines():
            kind, name = line[17:].split(" ", 1)
            if kind in "WVu" and f"hgfast::cpu::{isa}::" not in name:
                foreign.append(f"{isa} {file.name}: {name}")
    assert foreign == []
