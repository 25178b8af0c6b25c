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


def test_numbers_are_readable() -> None:
    values = [0.00012345, 2.5, 999.4, 1234.5, 123456.7, 1.5e9, 12345678, float("nan"), True]
    text = render("Numbers", ["value"], [[value] for value in values])
    assert [line.strip() for line in text.splitlines()[4:]] == [
        "0.000123", "2.5", "999", "1,234", "123,457", "1.5e+09", "12,345,678", "nan", "True",
    ]  # fmt: skip


def test_rich_shows_the_same() -> None:
    from rich.console import Console

    rows = [["stem.[conv]", 12345, 0.00012345, None], ["head", 7, 2.5, "a reason"]]
    table = rich_table("A [title]", ["name", "count", "error", "why"], rows, "A footer.")
    console = Console(width=60, record=True, file=io.StringIO())
    console.print(table)
    text = console.export_text()
    for cell in ("A [title]", "stem.[conv]", "12,345", "0.000123", "a reason", "A footer."):
        assert cell in text
    with pytest.raises(ValueError, match="2 cells was expected, got 1"):
        rich_table("Wrong", ["a", "b"], [["only one"]])


def test_rich_folds_names_and_never_numbers() -> None:
    from rich.console import Console

    console = Console(width=30, record=True, file=io.StringIO())
    console.print(rich_table("Long", ["name", "n"], [["module." * 10, 123456789]]))
    text = console.export_text()
    assert "123,456,789" in text
    assert text.replace("│", "").replace(" ", "").replace("\n", "").count("module.") > 5
