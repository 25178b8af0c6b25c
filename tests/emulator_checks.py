"""What the tests of the emulator share: its settings, arrays, and kernels with planted mistakes."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

HERE = Path(__file__).resolve().parent
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def default_settings(emulator: Any) -> None:
    emulator.set_seed(0)
    emulator.set_threads(0)
    emulator.model_memory(False)


def words(tensor: torch.Tensor) -> np.ndarray:
    """A tensor's memory as 32-bit words."""
    return tensor.contiguous().view(torch.int32).numpy().view(np.uint32)


def random_words(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.integers(0, 2**32, shape, dtype=np.uint32)


def pages() -> int:
    """Of memory that this process has."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        pytest.skip("no /proc/self/statm")


class Planted:
    """The kernels of one file: each mistake with its mended twin, as HGFAST_PLANTED lists them.

    table: for each name the kinds of report it may have (one or several, where it depends on who
    comes first), and what is special about its launch: keywords of emulator.run, `words` of each
    input (else one for each thread), `inputs` of these, `out`, the words of its output.
    """

    def __init__(
        self,
        emulator: Any,
        file: str,
        table: dict[str, tuple[str | tuple[str, ...], dict]],
        default: dict,
    ) -> None:
        self.emulator = emulator
        self.file = f"tests/emulator/{file}"
        self.text = (HERE / "emulator" / file).read_text().splitlines()
        self.table = table
        self.default = default

    def kinds(self, name: str) -> tuple[str, ...]:
        kinds = self.table[name][0]
        return (kinds,) if isinstance(kinds, str) else kinds

    def listed(self) -> set[str]:
        """The names that the file registers."""
        return set(re.findall(r"HGFAST_PLANTED\((\w+)\)", "\n".join(self.text))) - {"name"}

    def marks(self, kernel: str) -> dict[str, list[str]]:
        """Places of a kernel, "file:line", by what is written next to them."""
        start = next(i for i, line in enumerate(self.text) if f"void {kernel}(" in line)
        found: dict[str, list[str]] = {"HERE": [], "THERE": [], "BRANCH": []}
        for i in range(start, self.text.index("}", start)):
            for mark in found:
                if re.search(rf"// {mark}$", self.text[i]):
                    found[mark].append(f"{self.file}:{i + 1}")
        return found

    def run(self, name: str) -> np.ndarray:
        launch = self.default | self.table[name.removesuffix("_mended")][1]
        every = launch["blocks"] * launch["threads"]
        count = launch.pop("words", 0) or every
        x = [np.arange(count, dtype=np.uint32) for _ in range(launch.pop("inputs", 1))]
        out = np.full(launch.pop("out", every), 9, np.uint32)
        self.emulator.run(name, x, [out], [launch["threads"]], **launch)
        return out

    def report(self, name: str) -> str:
        with pytest.raises(RuntimeError) as caught:
            self.run(name)
        assert str(caught.value) == self.emulator.last_report()
        return str(caught.value)

    def check_report(self, name: str) -> None:
        """The kind of the report, and that it names every marked place."""
        report = self.report(name)
        assert report.startswith(f"{self.kinds(name)[0]}: kernel {name}"), report
        places = self.marks(name)
        for place in [*places["HERE"], *places["THERE"], *places["BRANCH"]]:
            assert re.search(rf"{re.escape(place)}\b", report), report
        if places["THERE"]:
            first = re.escape(places["THERE"][0])
            there = re.search(rf"thread \d+ \(.*thread \d+ .*{first}", report)
            assert there, report

    def check_in_any_order(self, name: str, seeds: Iterator[int] | range) -> None:
        """A report under every seed; none of the mended twin, whose results are the same."""
        expected = None
        for seed in seeds:
            self.emulator.set_seed(seed)
            self.emulator.set_threads(1 + seed % 3)
            report = self.report(name)
            assert report.split(":")[0] in self.kinds(name), report
            got = self.run(name + "_mended")
            assert self.emulator.last_report() == ""
            if expected is None:
                expected = got
            np.testing.assert_array_equal(got, expected)
