"""Tables of figures, where they are printed."""

import io

import pytest
from rich.console import Console

from evopatch.cli import tables


def printed(monkeypatch, terminal, columns):
    file = io.StringIO()
    monkeypatch.setattr(tables, "console", Console(file=file, force_terminal=terminal, width=80))
    table = tables.table_of("a title " * 20, ("name",), tuple(f"column\n{i}" for i in range(columns)))
    table.add_row("the name of a setting", *["87.123456"] * columns)
    tables.print_table(table)
    return file.getvalue()


@pytest.mark.parametrize("columns", [1, 12, 40])
def test_no_figure_is_cut_where_there_is_no_terminal(columns, monkeypatch):
    text = printed(monkeypatch, False, columns)
    assert text.count("87.123456") == columns
    assert "the name of a setting" in text
    assert "…" not in text
    assert text.endswith("\n")
    assert not text.endswith("\n\n")


def test_a_terminal_has_its_width(monkeypatch):
    """The control: there figures that don't fit are cut."""
    assert "…" in printed(monkeypatch, True, 12)


def test_one_of_a_kind_is_not_several():
    assert [tables.counted(number, "class", "classes") for number in (0, 1, 2)] == ["0 classes", "1 class", "2 classes"]
