"""Rows and columns of the test matrix, which of its cases are slow, and the patched models that it runs on."""

import copy
import dataclasses
import functools
from collections.abc import Iterable

import pytest
from torch import nn
from variants import FLAT, build

import evopatch

FAST = frozenset({"vit", "gap", "hf_vit", "levit", "hf_levit", "pit", "swin", "hf_swin"})
"""One structure of each kind and library, and one that reads its pooled patches: what `-m "not slow"` covers."""

SAME_GRAPH = frozenset(
    """
    clip deit_distilled dinov2 siglip reg_gap naflex hf_deit hf_deit_masked hf_vit_masked hf_vit_model hf_msn
    hf_registers_backbone hf_ijepa levit_distilled pit_distilled hf_levit_model
    """.split()  # noqa: SIM905
)
"""Structures whose blocks and walk are those of another one, with another embedding or head around them: what is
recorded of a model, compiled or exported, holds the same operators."""

REPRESENTATIVES = ("matched", "single", "none")
EACH_REPRESENTATIVE = pytest.mark.parametrize("representative", REPRESENTATIVES)
EACH_SELECTION = pytest.mark.parametrize("selection", ["stage", "layer"])


def every(names: Iterable[str], fast: Iterable[str] = FAST) -> pytest.MarkDecorator:
    """A test of each of these models, `name`; slow for those outside of `fast`."""
    return cases("name", sorted(names), fast)


def cases(arguments: str | tuple[str, ...], rows: Iterable[object], fast: Iterable[object]) -> pytest.MarkDecorator:
    """A test of each of these rows; slow for those outside of `fast`.

    Args:
        arguments: As for `pytest.mark.parametrize`.
        rows: Names, or tuples that begin with a name.
        fast: Names, or whole rows.
    """
    fast, found = set(fast), []
    for row in rows:
        values = row if isinstance(row, tuple) else (row,)
        found.append(pytest.param(*values, marks=() if row in fast or values[0] in fast else pytest.mark.slow))
    return pytest.mark.parametrize(arguments, found)


def by_representative(names: Iterable[str], others: Iterable[str]) -> list[tuple[str, str]]:
    """The matched representative with all `names`, and the other two with `others`."""
    rows = [(name, "matched") for name in sorted(names)]
    return rows + [(name, representative) for name in sorted(others) for representative in REPRESENTATIVES[1:]]


def config(representative: str, selection: str = "stage") -> evopatch.EvoConfig:
    """The default settings but for these."""
    return evopatch.EvoConfig(representative=representative, selection=selection)


def shallow_config(name: str, representative: str = "matched", selection: str = "stage") -> evopatch.EvoConfig:
    """For a model with the settings of `variants.shallow`: a block that takes all tokens, and a run of two."""
    settings = config(representative, selection)
    # All decimal places of the keep ratio count, and no share of 25 tokens is half a token.
    return dataclasses.replace(settings, stages=(1,), keep_ratio=0.436182) if name in FLAT else settings


def patched(name: str, settings: evopatch.EvoConfig | None = None, **options: object) -> nn.Module:
    """A patched model of one's own, in eval mode.

    A copy of one that was patched once in this process, as tracing blocks is what takes most of the time; that it is
    what `evopatch.apply` gives is what `test_changed_settings_are_those_applied` asserts.

    Args:
        name: As for `variants.build`.
        settings: By default those of `evopatch.apply`.
        options: As for `variants.build`.
    """
    model = copy.deepcopy(_patched(name, tuple(sorted(options.items()))))
    evopatch.set_config(model, settings or evopatch.EvoConfig())
    return model


@functools.cache
def _patched(name: str, options: tuple[tuple[str, object], ...]) -> nn.Module:
    return evopatch.apply(build(name, **dict(options)))
