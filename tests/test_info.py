"""`python -m hgfast info` and the rest of the command line."""

import os
import platform
import subprocess
import sys

import numpy
import pytest
import torch

import hgfast
from hgfast import _native, info
from hgfast.cli import main
from hgfast.runtime import evidence


def compiled():
    module = _native.load()
    if module is None:
        pytest.skip(str(_native.reason))
    return module


def run(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "hgfast", *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )


def rows(text):
    return dict(line.split(": ", 1) for line in text.splitlines() if ": " in line)


def test_versions_are_those_in_use():
    versions = info.collect()["versions"]
    assert versions["hgfast"] == hgfast.__version__
    assert versions["torch"] == torch.__version__
    assert versions["numpy"] == numpy.__version__
    assert versions["python"] == platform.python_version()


def test_without_triton_it_says_what_that_means(monkeypatch):
    def missing(name):
        raise info.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(info.metadata, "version", missing)
    assert "decoded by plain PyTorch" in info.collect()["versions"]["triton"]
    monkeypatch.setattr(info.metadata, "version", lambda name: f"{name} 3.6")
    assert info.collect()["versions"]["triton"] == "triton 3.6"


def test_the_compiled_module_is_described():
    module = compiled()
    shown = info.collect()["compiled module"]
    build = module.build_info()
    assert shown["state"] == f"loaded ({module.__file__})"
    assert build["version"] == hgfast.__version__
    assert shown["built with"].startswith(f"{build['compiler']}, for torch {build['torch']}")
    named = [entry.split(" ")[0] for entry in shown["CPU kernels"].split(", ")]
    assert named == [name for name, _ in module.isa_list()]
    assert sorted(named) == sorted(build["isa"].split())


def test_the_instruction_set_in_use_is_the_one_that_plans_pack_for():
    module = compiled()
    used = info.collect()["CPU"]["kernel set used"].split(" ")[0]
    assert used == module.CpuPlan("float32").path
    assert dict(module.isa_list())[used]


def test_without_a_compiled_module_one_line_says_why(monkeypatch):
    monkeypatch.setattr(_native, "_module", None)
    monkeypatch.setattr(_native, "_tried", True)
    monkeypatch.setattr(_native, "reason", "no compiled kernels: because")
    sections = info.collect()
    assert sections["compiled module"] == {"state": "no compiled kernels: because"}
    assert sections["CPU"]["kernel set used"] == "none: plain PyTorch"


def test_plain_lines_into_a_pipe():
    result = run("info")
    assert result.returncode == 0, result.stderr
    shown = rows(result.stdout)
    for section in info.collect().values():
        assert section.keys() <= shown.keys()
    assert result.stdout.isascii()


def test_a_table_on_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "120")
    assert main(["info"]) == 0
    shown = capsys.readouterr().out
    assert f"hgfast {hgfast.__version__}" in shown
    assert "│" in shown
    assert all(name in shown for section in info.collect().values() for name in section)


def test_a_forced_instruction_set_is_named():
    compiled()
    shown = rows(run("info", HGFAST_CPU_ISA="portable").stdout)
    assert shown["kernel set used"] == "portable (HGFAST_CPU_ISA=portable)"
    assert shown['products at "high"'] == "winograd"


def test_an_unknown_forced_instruction_set_is_explained():
    compiled()
    result = run("info", HGFAST_CPU_ISA="sse9")
    assert result.returncode == 0, result.stderr
    assert rows(result.stdout)["kernel set used"].startswith("none: ")
    assert "sse9" in rows(result.stdout)["kernel set used"]


def test_nvcc_that_does_not_run_is_said(monkeypatch):
    monkeypatch.setenv("CUDACXX", "/no/such/nvcc")
    assert info.collect()["GPU"]["nvcc"].startswith("/no/such/nvcc does not run")


def test_gpu_features_and_what_speaks_for_them(monkeypatch):
    monkeypatch.setitem(evidence.FEATURES, "head", evidence.Feature("a head", "gpu.json"))
    monkeypatch.setenv(evidence.UNPROVEN, "stem")
    shown = info.collect()["GPU features"]
    assert shown.keys() == evidence.FEATURES.keys()
    assert shown["head"] == "on; a head; measured, benchmarks/results/gpu.json"
    assert shown["stem"].startswith("on; the 7x7 stem")
    assert shown["stem"].endswith("; not yet run on a GPU; HGFAST_UNPROVEN names it")
    assert shown["graph"].startswith("off; ")
    assert shown["graph"].endswith("not yet run on a GPU (HGFAST_UNPROVEN=graph switches it on)")
    for name, value in shown.items():
        assert value.startswith("on") == evidence.is_enabled(name)


def test_an_unknown_gpu_feature_is_explained():
    result = run("info", HGFAST_UNPROVEN="hopper")
    assert result.returncode == 0, result.stderr
    assert "got 'hopper'" in rows(result.stdout)["HGFAST_UNPROVEN"]


def test_version(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"hgfast {hgfast.__version__}\n"


@pytest.mark.parametrize("arguments", [[], ["fly"], ["info", "--fast"]])
def test_wrong_arguments_end_in_usage(arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert "usage: hgfast" in capsys.readouterr().err
