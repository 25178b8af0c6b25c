"""Builds hgfast/_C with CMake and ninja, against the torch of the environment that gets hgfast.

Everything about sources and flags stands in CMakeLists.txt, everything else in pyproject.toml.
Environment: MAX_JOBS, HGFAST_AMX_MODEL=1, HGFAST_EMULATOR=1, and what CMakeLists.txt names (DEBUG,
USE_CUDA, ...).
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

OLDEST_TORCH = (2, 11)
ROOT = Path(__file__).resolve().parent


def require_torch() -> None:
    """Stop, in one line, where there is no torch: pip would otherwise download one of its own."""
    # Asked in a process of its own: in pip's isolated builds this one cannot see the target's
    # packages. Metadata only, so that it takes no time.
    code = "from importlib.metadata import version; print(version('torch'))"
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    ask = [sys.executable, "-E", "-c", code]
    found = subprocess.run(ask, env=environment, capture_output=True, text=True).stdout.strip()
    oldest = ".".join(map(str, OLDEST_TORCH))
    advice = " (PYTHONPATH does not count; under uv or build also pass --no-build-isolation)"
    if not found:
        raise SystemExit(
            f"hgfast: {sys.executable} has no torch. Install torch >= {oldest} first{advice}."
        )
    if tuple(int(part) for part in found.split(".")[:2]) < OLDEST_TORCH:
        raise SystemExit(f"hgfast: torch {found} is too old. Install torch >= {oldest} first.")


def tool(name: str) -> str:
    """The path of a build tool, also from an environment that is not activated."""
    places = os.pathsep.join([os.environ.get("PATH", ""), sysconfig.get_path("scripts")])
    path = shutil.which(name, path=places)
    if path is None:
        raise SystemExit(f"hgfast: {name} is missing. pip install cmake ninja, then try again.")
    return path


class CMakeBuild(build_ext):
    def run(self) -> None:
        if not (os.environ.get("CXX") or any(map(shutil.which, ("c++", "g++", "clang++")))):
            print("hgfast: WARNING: no C++ compiler found, installing without compiled kernels.")
            for extension in self.extensions:  # one left by an earlier build
                Path(self.get_ext_fullpath(extension.name)).unlink(missing_ok=True)
            self.extensions = []
        super().run()

    def build_extension(self, ext: Extension) -> None:
        build = Path(self.build_temp).resolve()
        output = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        settings = [
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}",
            f"-DHGFAST_OUTPUT_DIR={output}",
        ]
        for option in ("HGFAST_AMX_MODEL", "HGFAST_EMULATOR"):
            if value := os.environ.get(option):  # unset: as the build folder had it
                settings.append(f"-D{option}={value}")
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count())
        cmake = tool("cmake")
        for step in (
            [cmake, "-G", "Ninja", "-S", str(ROOT), "-B", str(build), *settings],
            [cmake, "--build", str(build), "--parallel", jobs],
        ):
            if subprocess.run(step).returncode != 0:
                raise SystemExit(f"hgfast: the build failed, see above. The step: {' '.join(step)}")


require_torch()
setup(ext_modules=[Extension("hgfast._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
