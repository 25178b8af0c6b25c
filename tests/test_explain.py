"""`python -m hgfast explain`: what is told of a network of one's own, and of wrong arguments."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import Foreign, PreactBlock, small_hourglass
from torch import Tensor, nn

import hgfast
from hgfast.cli import main
from hgfast.explain import ExplainError, explain, load
from hgfast.runtime import folding

SOURCE = """
import torch
from torch import nn
import hgfast

def build():
    return hgfast.models.hourglass(stacks=2, features=16, depth=2, joints=5)

class Plain(nn.Conv2d):
    def __init__(self):
        super().__init__(3, 4, 1)

class Space:
    ready = build()

def needs(argument):
    return build()

def gives_a_number():
    return 3

number = 3
"""


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module in the working directory."""
    (tmp_path / "own_networks.py").write_text(SOURCE)
    (tmp_path / "broken_networks.py").write_text("import hgfast\nraise OSError('no disk')\n")
    (tmp_path / "lacking_networks.py").write_text("import surely_not_installed\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    for name in ("own_networks", "broken_networks", "lacking_networks"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return "own_networks"


def command(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    status = main(["explain", *arguments])
    printed = capsys.readouterr()
    return status, printed.out, printed.err


# --- what it tells ---


def test_everything_is_told(source: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = command(capsys, f"{source}:build", "--input", "1,3,32,32")
    assert (status, err) == (0, "")
    assert out.startswith("StackedHourglass, input 1x3x32x32\n")
    for text in (
        'blocks replaced in 1 region, (the model), precision "highest"',
        "of the model's",
        'verify StackedHourglass, precision "highest": ok',
        "the whole model",
        "eager / hgfast",
        "Medians",
    ):
        assert text in out


def test_json(source: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = (f"{source}:build", "--input", "1,3,32,64", "--precision", "medium", "--json")
    status, out, _ = command(capsys, *arguments)
    known = json.loads(out)
    assert status == 0
    assert known.keys() == {
        "model", "inputs", "notes", "report", "verification", "verification_fault", "timings"
    }  # fmt: skip
    assert known["inputs"] == [[1, 3, 32, 64]]
    assert known["report"]["precision"] == known["verification"]["precision"] == "medium"
    assert known["verification"]["ok"] is True
    assert 0 < known["report"]["flops"]["share"] <= 1
    timings = known["timings"]
    assert timings["eager"] > 0
    assert timings["hgfast"] > 0
    rows = {row["name"] for row in known["report"]["replaced"]}
    assert {block["name"] for block in timings["blocks"]} <= rows
    assert len(timings["blocks"]) > 20
    for block in timings["blocks"]:
        assert block["eager"] > 0
        assert block["hgfast"] > 0
    bottlenecks = [b for b in timings["blocks"] if b["kind"] == "bottleneck"]
    assert all(block["by_module"] for block in bottlenecks)
    # What follows in other modules is a part of the step, so no module is just that.
    joined = [b for b in timings["blocks"] if b["kind"] == "bottleneck + upsample_add"]
    assert joined
    assert not any(block["by_module"] for block in joined)


def test_no_timing(source: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = (f"{source}:build", "--input", "1,3,32,32", "--no-timing")
    assert "millisecond" not in command(capsys, *arguments)[1]
    assert json.loads(command(capsys, *arguments, "--json")[1])["timings"] is None


@pytest.mark.parametrize("attribute", ["build", "Plain", "Space.ready"])
def test_functions_classes_and_modules(source: str, attribute: str) -> None:
    assert isinstance(load(f"{source}:{attribute}"), nn.Module)


def test_a_usual_input_is_found() -> None:
    class Last(nn.Module):
        """Channels last, and so small that it takes no time."""

        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1, stride=16)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x.permute(0, 3, 1, 2))

    assert explain(Last(), timing=False).shapes == ((1, 256, 256, 3),)
    assert explain(nn.Conv2d(3, 4, 1, stride=16), timing=False).shapes == ((1, 3, 256, 256),)


def test_several_inputs() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = PreactBlock()

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.block(x + y)

    result = explain(Two(), [(1, 16, 8, 8), (1, 16, 8, 8)], timing=False)
    assert result.shapes == ((1, 16, 8, 8), (1, 16, 8, 8))
    assert result.verification


def test_regions_inside_and_warnings_are_told() -> None:
    result = explain(Foreign(), [(1, 16, 8, 8)])
    assert [block.name for block in result.blocks] == ["first", "second"]
    assert [row.name for row in result.report.skipped] == [""]
    plain = explain(nn.Sequential(nn.Flatten()), [(1, 3, 8, 8)])
    assert plain.blocks == ()
    assert any("replaced nothing" in note for note in plain.notes)
    assert plain.whole is not None
    assert str(plain)


@pytest.mark.parametrize(("load", "warned"), [(0.3, False), (3.0, True)])
def test_a_busy_machine_is_told(load: float, warned: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.getloadavg", lambda: (load, 0.0, 0.0))
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    monkeypatch.setattr("torch.get_num_threads", lambda: 2)
    result = explain(PreactBlock(), [(1, 16, 8, 8)])
    assert ("The machine was busy (load 3.0 on 2 cores)" in str(result)) is warned
    timings = result.to_dict()["timings"]
    assert bool(timings["busy"]) is warned
    assert not explain(PreactBlock(), [(1, 16, 8, 8)], timing=False).busy


def test_the_model_is_left_eager() -> None:
    model = small_hourglass()
    explain(model, [(1, 3, 32, 32)], timing=False)
    assert "not optimised" in str(hgfast.report(model))


def test_what_verify_finds_ends_in_status_1(
    source: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    unfolded = folding.unfolded

    def spoiled(conv: Any, *args: Any) -> Any:
        weight, *others = unfolded(conv, *args)
        return weight * 2 if conv.name == "heads.1.conv" else weight, *others

    monkeypatch.setattr(folding, "unfolded", spoiled)
    status, out, _ = command(capsys, f"{source}:build", "--input", "1,3,32,32", "--no-timing")
    assert status == 1
    assert "FAILED" in out
    assert "First to depart: heads.1.conv" in out


# --- weights ---


def test_weights_are_loaded(source: str, tmp_path: Path) -> None:
    right = load(f"{source}:build")
    with torch.no_grad():
        for weight in right.parameters():
            weight.normal_()
    state = right.state_dict()
    saved: list[tuple[str, Any]] = [
        ("plain.pth", state),
        ("nested.pth", {"state_dict": {f"module.{name}": x for name, x in state.items()}}),
    ]
    for name, content in saved:
        torch.save(content, tmp_path / name)
        given = load(f"{source}:build", tmp_path / name).state_dict()
        assert all(torch.equal(given[key], value) for key, value in state.items())


def state_without_a_name(path: Path) -> None:
    state = load("own_networks:build").state_dict()
    torch.save({name: x for name, x in state.items() if name != "heads.0.conv.weight"}, path)


def state_of_another_shape(path: Path) -> None:
    state = load("own_networks:build").state_dict()
    torch.save({**state, "heads.0.conv.weight": torch.zeros(3)}, path)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: None, "no such weights file"),
        (lambda path: path.write_text("weights"), "not a PyTorch checkpoint|without running code"),
        (lambda path: torch.save({"a": torch.zeros(1)}, path), "is of another network: it lacks"),
        (state_without_a_name, "it lacks 'heads.0.conv.weight'"),
        (state_of_another_shape, "does not fit: .*heads.0.conv.weight"),
    ],
)
def test_wrong_weights(
    source: str, tmp_path: Path, write: Callable[[Path], Any], message: str
) -> None:
    path = tmp_path / "weights.pth"
    write(path)
    with pytest.raises(ExplainError, match=message):
        load(f"{source}:build", path)


# --- wrong arguments: one line, and status 2 ---


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["own_networks"], "expected module:factory"),
        (["own_networks:"], "expected module:factory"),
        (["no_such_networks:build"], "there is no module 'no_such_networks'"),
        (["lacking_networks:build"], "No module named 'surely_not_installed'"),
        (["broken_networks:build"], "broken_networks cannot be imported: OSError: no disk"),
        (["own_networks:missing"], "own_networks has no 'missing'"),
        (["own_networks:number"], "is a int: no module, and not callable"),
        (["own_networks:gives_a_number"], "returns a int; a torch.nn.Module was expected"),
        (["own_networks:needs"], "own_networks:needs() fails: TypeError"),
        (["own_networks:build", "--input", "1,4,32,32"], "does not take 1,4,32,32"),
        (["own_networks:build", "--input", "1,3,32,32", "--input", "1,3,32,32"],
         "does not take 1,3,32,32 and 1,3,32,32"),
    ],
)  # fmt: skip
def test_one_clear_error(
    source: str, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    status, out, err = command(capsys, *arguments)
    assert (status, out) == (2, "")
    assert err.startswith("hgfast explain: error: ")
    assert message in err
    assert err.count("\n") == 1


def test_a_model_that_takes_no_usual_input() -> None:
    with pytest.raises(ExplainError, match=r"Linear takes none of the usual inputs, .* --input"):
        explain(nn.Linear(7, 7), timing=False)


@pytest.mark.parametrize("shape", ["1,3,x,32", "", "1,0,32,32", "1;3", "-1,3,32,32"])
def test_wrong_shapes(source: str, capsys: pytest.CaptureFixture[str], shape: str) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["explain", f"{source}:build", f"--input={shape}"])
    assert caught.value.code == 2
    assert "expected sizes such as 1,3,256,256" in capsys.readouterr().err


def test_as_a_process(source: str, tmp_path: Path) -> None:
    """The directory that one is in is on the path, wherever hgfast is installed."""
    root = str(Path(hgfast.__file__).parent.parent)
    result = subprocess.run(
        [sys.executable, "-m", "hgfast", "explain", f"{source}:build", "--input", "1,3,32,32",
         "--no-timing"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": root},
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "ok" in result.stdout
