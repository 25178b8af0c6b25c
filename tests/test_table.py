"""hgfast._table: plain text that lines up."""

from __future__ import annotations

import io

import pytest

from hgfast._table import render, rich_table


def test_whole_table() -> None:
    rows = [["stem.conv", 12345, 0.00012345, None], ["head", 7, 2.5, "a reason"]]
    assert render("A title", ["name", "count", "error", "why"], rows, "A footer.") == (
        "A title\n"
        "\n"
        "name        count     error  why\n"
        "---------  ------  --------  --------\n"
        "stem.conv  12,345  0.000123\n"
        "head            7       2.5  a reason\n"
        "\n"
        "A footer."
    )


def test_no_rows() -> None:
    assert render("Nothing", ["name", "count"], []).splitlines()[2:] == [
        "name  count",
        "----  -----",
    ]


def test_nothing_is_cut_off() -> None:
    name = "module." * 60
    assert name in render("Long", ["name"], [[name]])


def test_wrong_number_of_cells() -> None:
    with pytest.raises(ValueError, match="2 cells was expected, got 1"):
        render("Wrong", ["a", "b"], [["only one"]])


def test_rich_shows_every_cell_and_no_markup() -> None:
    console = pytest.importorskip("rich.console", reason="rich is optional")
    rows = [["heads[0].conv", 12345], ["[bold]", 7]]
    file = io.StringIO()
    table = rich_table("A title", ["name", "count"], rows, "A footer.")
    console.Console(file=file, width=80).print(table)
    for text in ("A title", "heads[0].conv", "12,345", "[bold]", "A footer."):
        assert text in file.getvalue()
    with pytest.raises(ValueError, match="2 cells was expected, got 1"):
        rich_table("Wrong", ["a", "b"], [["only one"]])
