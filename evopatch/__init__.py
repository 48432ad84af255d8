"""Slow-fast token evolution for existing vision transformers (Evo-ViT, arXiv 2108.01390)."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .config import EvoConfig
from .errors import (
    AlreadyPatchedError,
    AttentionNotFoundError,
    BypassError,
    CheckpointError,
    ConfigError,
    DataError,
    EvoPatchError,
    ExportError,
    NotPatchedError,
    SpeedWarning,
    TrainingError,
    TrainingInterruptedError,
    UnreadableImageError,
    UnsupportedInputError,
    UnsupportedModelError,
)
from .version import VERSION as __version__  # noqa: N811

if TYPE_CHECKING:
    from .calibration.calibrating import calibrate
    from .calibration.outcome import Calibration
    from .deployment.exporting import Export, export
    from .embedding.writing import Embedding, embed
    from .measure.comparison import Benchmark, benchmark
    from .measure.pictures import visualize, visualize_training
    from .measure.profiling import Profile, profile
    from .measure.verification import Verification, verify
    from .patching.apply import apply, config_of, is_patched, patched, remove, set_config, set_keep_ratio, supported
    from .patching.autopatch import autopatch
    from .patching.inspect import full_grid, token_groups, token_selection
    from .patching.suggest import Candidate, Inspection, inspect
    from .sources.saving import load_pretrained, save_pretrained
    from .training.finetuning import FinetuneConfig, FinetuneResult, finetune

# Loaded when they are first asked for (PEP 562): `evopatch --help` needs none of them, patching a model few.
_LAZY = {
    "Benchmark": "measure.comparison",
    "Calibration": "calibration.outcome",
    "Candidate": "patching.suggest",
    "Embedding": "embedding.writing",
    "Export": "deployment.exporting",
    "FinetuneConfig": "training.finetuning",
    "FinetuneResult": "training.finetuning",
    "Inspection": "patching.suggest",
    "Profile": "measure.profiling",
    "Verification": "measure.verification",
    "apply": "patching.apply",
    "autopatch": "patching.autopatch",
    "benchmark": "measure.comparison",
    "calibrate": "calibration.calibrating",
    "config_of": "patching.apply",
    "embed": "embedding.writing",
    "export": "deployment.exporting",
    "finetune": "training.finetuning",
    "full_grid": "patching.inspect",
    "inspect": "patching.suggest",
    "is_patched": "patching.apply",
    "load_pretrained": "sources.saving",
    "patched": "patching.apply",
    "profile": "measure.profiling",
    "remove": "patching.apply",
    "save_pretrained": "sources.saving",
    "set_config": "patching.apply",
    "set_keep_ratio": "patching.apply",
    "supported": "patching.apply",
    "token_groups": "patching.inspect",
    "token_selection": "patching.inspect",
    "verify": "measure.verification",
    "visualize": "measure.pictures",
    "visualize_training": "measure.pictures",
}

__all__ = [
    "AlreadyPatchedError",
    "AttentionNotFoundError",
    "Benchmark",
    "BypassError",
    "Calibration",
    "Candidate",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "Embedding",
    "EvoConfig",
    "EvoPatchError",
    "Export",
    "ExportError",
    "FinetuneConfig",
    "FinetuneResult",
    "Inspection",
    "NotPatchedError",
    "Profile",
    "SpeedWarning",
    "TrainingError",
    "TrainingInterruptedError",
    "UnreadableImageError",
    "UnsupportedInputError",
    "UnsupportedModelError",
    "Verification",
    "__version__",
    "apply",
    "autopatch",
    "benchmark",
    "calibrate",
    "config_of",
    "embed",
    "export",
    "finetune",
    "full_grid",
    "inspect",
    "is_patched",
    "load_pretrained",
    "patched",
    "profile",
    "remove",
    "save_pretrained",
    "set_config",
    "set_keep_ratio",
    "supported",
    "token_groups",
    "token_selection",
    "verify",
    "visualize",
    "visualize_training",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_LAZY[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
