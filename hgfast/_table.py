"""Tables: plain text, the same in a terminal, a log file and a bug report; or rich's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Cell = str | int | float | None

_GAP = "  "


def render(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]], footer: str | None = None
) -> str:
    """Lay out rows under a title and column headings.

    Numbers stand at the right of their column: integers with thousands separated, floats with
    three significant digits, or all that stand before the point. Text stands at the left; None
    leaves the cell empty. Nothing is ever cut off or coloured, so that the text can be searched
    and pasted.

    Raises:
        ValueError: a row has more or fewer cells than there are columns.
    """
    texts, right = _texts(columns, rows)
    widths = [max(map(len, column)) for column in zip(columns, *texts, strict=True)]

    def line(cells: Sequence[str]) -> str:
        parts = (
            cell.rjust(width) if at_right else cell.ljust(width)
            for cell, width, at_right in zip(cells, widths, right, strict=True)
        )
        return _GAP.join(parts).rstrip()

    rule = _GAP.join("-" * width for width in widths)
    lines = [title, "", line(columns), rule, *map(line, texts)]
    if footer:
        lines += ["", footer]
    return "\n".join(lines)


def rich_table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]], footer: str | None = None
) -> Any:
    """The same as a ``rich.table.Table``: it folds long names to the terminal's width.

    Raises:
        ValueError: as :func:`render`.
        ImportError: rich is not installed.
    """
    from rich.table import Table
    from rich.text import Text

    texts, right = _texts(columns, rows)
    table = Table(
        title=Text(title, style="bold"),
        caption=Text(footer) if footer else None,
        title_justify="left",
        caption_justify="left",
    )
    for column, at_right in zip(columns, right, strict=True):
        # Names may be folded, numbers never: a folded number is another number.
        table.add_column(
            Text(column), justify="right" if at_right else "left", overflow="fold", no_wrap=at_right
        )
    for cells in texts:
        table.add_row(*map(Text, cells))  # Text: brackets in a name are no markup
    return table


def _texts(
    columns: Sequence[str], rows: Sequence[Sequence[Cell]]
) -> tuple[list[list[str]], list[bool]]:
    """Every cell as text, and which columns hold numbers."""
    for row in rows:
        if len(row) != len(columns):
            raise ValueError(f"a row of {len(columns)} cells was expected, got {len(row)}: {row}")
    right = [any(isinstance(row[i], (int, float)) for row in rows) for i in range(len(columns))]
    return [[_text(cell) for cell in row] for row in rows], right


def _text(cell: Cell) -> str:
    if cell is None:
        return ""
    if isinstance(cell, float):
        return f"{cell:,.0f}" if 1e3 <= abs(cell) < 1e6 else f"{cell:.3g}"
    return f"{cell:,}" if isinstance(cell, int) and not isinstance(cell, bool) else str(cell)
