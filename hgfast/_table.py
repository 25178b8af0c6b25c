"""Tables of plain text: the same in a terminal, a log file and a bug report."""

from __future__ import annotations

from collections.abc import Sequence

Cell = str | int | float | None

_GAP = "  "


def render(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]], footer: str | None = None
) -> str:
    """Lay out rows under a title and column headings.

    Numbers stand at the right of their column: integers with thousands separated, floats with
    three significant digits. Text stands at the left; None leaves the cell empty. Nothing is
    ever cut off or coloured, so that the text can be searched and pasted.

    Raises:
        ValueError: a row has more or fewer cells than there are columns.
    """
    for row in rows:
        if len(row) != len(columns):
            raise ValueError(f"a row of {len(columns)} cells was expected, got {len(row)}: {row}")
    texts = [[_text(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(columns, *texts, strict=True)]
    right = [any(isinstance(row[i], (int, float)) for row in rows) for i in range(len(columns))]

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


def _text(cell: Cell) -> str:
    if cell is None:
        return ""
    if isinstance(cell, float):
        return f"{cell:.3g}"
    return f"{cell:,}" if isinstance(cell, int) and not isinstance(cell, bool) else str(cell)
