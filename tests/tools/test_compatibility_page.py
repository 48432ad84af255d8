"""The tables of the page on compatibility are those of its rows, and each row's tests are there."""

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

_spec = importlib.util.spec_from_file_location("compatibility_table", ROOT / "docs" / "compatibility_table.py")
compatibility_table = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(compatibility_table)

SECTIONS = compatibility_table.SECTIONS
ROWS = [row for rows in SECTIONS.values() for row in rows]
TESTS = {
    name
    for file in (ROOT / "tests").rglob("test_*.py")
    for name in re.findall(r"^def (test_\w+)", file.read_text(), re.MULTILINE)
}


def unfounded(rows):
    """What rows say without a test, or by one that nobody wrote."""
    return [row.what for row in rows if not row.tests or not set(row.tests) <= TESTS]


def test_the_page_is_up_to_date():
    page = compatibility_table.PAGE.read_text()
    assert compatibility_table.with_tables(page, SECTIONS) == page, "run python docs/compatibility_table.py"
    first, *others = SECTIONS["With PyTorch"]
    changed = SECTIONS | {"With PyTorch": [first._replace(order="never"), *others]}
    assert compatibility_table.with_tables(page, changed) != page
    with pytest.raises(ValueError, match="no place for a table"):
        compatibility_table.with_tables(page, {"With nobody": []})


def test_every_row_has_a_test_that_is_there():
    assert len(ROWS) > 40
    assert not unfounded(ROWS)
    row = ROWS[0]
    assert unfounded([row._replace(tests=("test_that_nobody_wrote",))])
    assert unfounded([row._replace(tests=())])
    assert {row.works for row in ROWS} <= {"yes", "partly", "no"}


def test_every_test_with_another_library_is_in_a_row():
    named = {name for row in ROWS for name in row.tests}
    for file in (ROOT / "tests" / "composition").glob("test_*.py"):
        assert set(re.findall(r"^def (test_\w+)", file.read_text(), re.MULTILINE)) <= named
