"""What the pages refer to is there: tests by name, files by link."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Names on the page of supported models are models; timm has some that begin with "test_".
PAGES = [ROOT / "README.md", *sorted(p for p in (ROOT / "docs").glob("*.md") if p.stem != "supported-models")]
TESTS = {
    name
    for file in (ROOT / "tests").rglob("test_*.py")
    for name in re.findall(r"^def (test_\w+)", file.read_text(), re.MULTILINE)
}


def named_tests(text):
    return set(re.findall(r"`(test_\w+)`", text))


def linked_files(text):
    """Relative ones, without anchors."""
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    return {target.partition("#")[0] for target in targets if "://" not in target and not target.startswith("#")}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_names_is_there(page):
    text = page.read_text()
    assert named_tests(text) <= TESTS, named_tests(text) - TESTS
    missing = {file for file in linked_files(text) if not (page.parent / file).exists()}
    assert not missing


def test_names_and_links_are_found():
    text = "see `test_that_nobody_wrote`, [a](no/file.md#part), [b](https://x.y/z), [c](#here)"
    assert named_tests(text) - TESTS == {"test_that_nobody_wrote"}
    assert linked_files(text) == {"no/file.md"}
    assert len(named_tests((ROOT / "docs" / "compatibility.md").read_text())) > 30


def test_the_readme_is_a_door():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 150
    assert len([line for line in text.splitlines() if line.startswith("python3 -m venv")]) == 2
