"""The examples of the documents give what the documents say."""

from __future__ import annotations

import doctest
import re
from pathlib import Path

import pytest

from hgfast import _native

DOCS = Path(__file__).parents[1] / "docs"


def run_examples(name: str) -> None:
    blocks = re.findall(r"```pycon\n(.*?)```", (DOCS / name).read_text(), re.DOTALL)
    assert blocks
    example = doctest.DocTestParser().get_doctest("\n".join(blocks), {}, name, name, 0)
    report: list[str] = []
    doctest.DocTestRunner().run(example, out=report.append)
    assert not report, "".join(report)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("name", ["decoding.md"])
def test_examples(name: str) -> None:
    run_examples(name)


@pytest.mark.skipif(_native.load() is None, reason=str(_native.reason))
@pytest.mark.parametrize("name", ["ecosystem.md"])
def test_examples_with_kernels(name: str) -> None:
    run_examples(name)


@pytest.mark.parametrize("name", ["decoding.md", "ecosystem.md", "performance.md"])
def test_what_it_refers_to_is_there(name: str) -> None:
    text = (DOCS / name).read_text()
    for test in set(re.findall(r"`((?:\w+/)*test_\w+)`", text)):
        assert (DOCS.parent / "tests" / f"{test}.py").is_file(), test
    for path in set(re.findall(r"\]\(([^)#]+)\)", text)):
        assert (DOCS / path).exists(), path
    for path in set(re.findall(r"`((?:hgfast|tests|csrc|benchmarks)/[\w/]+\.\w+)`", text)):
        assert (DOCS.parent / path).is_file(), path
