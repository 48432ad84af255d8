"""Imports of the package point one way: from the tools down to the algorithm."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "evopatch"
# From bottom to top; a module may import from its own layer and from those before it.
LAYERS = (
    ("errors", "version", "progress", "alternating", "durable"),
    ("config",),
    ("plan",),
    ("algorithm",),
    ("rewrite",),
    ("forward",),
    ("patching",),
    ("measure",),
    ("sources",),
    ("training",),
    ("calibration",),
    ("deployment",),
    ("embedding",),
    ("cli",),
    ("__init__", "__main__"),
)
LEVEL = {part: level for level, layer in enumerate(LAYERS) for part in layer}
FOREIGN = {"timm", "transformers"}


def imported(source: str, package: list[str]) -> set[str]:
    """Full names of what a module imports, also inside functions.

    Args:
        source: Its code.
        package: The parts of the name of the package that it is in.
    """
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = [*base, *(node.module.split(".") if node.module else [])]
            found |= {".".join([*module, alias.name]) for alias in node.names}
    return found


def upward(part: str, names: set[str]) -> set[str]:
    """Imports from a layer above."""
    own = [name.split(".")[1] for name in names if name.startswith("evopatch.")]
    return {other for other in own if LEVEL.get(other, -1) > LEVEL[part]}


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda file: str(file.relative_to(PACKAGE)))
def test_no_import_runs_upward(file):
    inside = file.relative_to(PACKAGE).with_suffix("").parts
    names = imported(file.read_text(), ["evopatch", *inside[:-1]])
    assert upward(inside[0], names) == set()
    if LEVEL[inside[0]] <= LEVEL["patching"]:
        assert {name.partition(".")[0] for name in names}.isdisjoint(FOREIGN)


def test_an_import_that_runs_upward_is_found():
    source = "def f():\n    from ..patching.handle import Patched\nfrom ..errors import ConfigError\nimport timm.data"
    names = imported(source, ["evopatch", "algorithm"])
    assert names == {"evopatch.patching.handle.Patched", "evopatch.errors.ConfigError", "timm.data"}
    assert upward("algorithm", names) == {"patching"}
    assert upward("measure", names) == set()
