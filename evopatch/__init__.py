"""Slow-fast token evolution for existing vision transformers (Evo-ViT, arXiv 2108.01390)."""

from .autopatch import autopatch
from .benchmark import Benchmark, benchmark
from .checkpoint import load_pretrained, save_pretrained
from .config import EvoConfig
from .errors import (
    AlreadyPatchedError,
    AttentionNotFoundError,
    BypassError,
    CheckpointError,
    ConfigError,
    DataError,
    EvoPatchError,
    NotPatchedError,
    SpeedWarning,
    TrainingError,
    TrainingInterruptedError,
    UnreadableImageError,
    UnsupportedInputError,
    UnsupportedModelError,
)
from .finetune import FinetuneConfig, FinetuneResult, finetune
from .patch import (
    apply,
    config_of,
    is_patched,
    patched,
    remove,
    set_config,
    set_keep_ratio,
    supported,
    token_groups,
    token_selection,
)
from .profile import Profile, profile
from .visualize import visualize, visualize_training

__version__ = "0.1.0"
__all__ = [
    "AlreadyPatchedError",
    "AttentionNotFoundError",
    "Benchmark",
    "BypassError",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "EvoConfig",
    "EvoPatchError",
    "FinetuneConfig",
    "FinetuneResult",
    "NotPatchedError",
    "Profile",
    "SpeedWarning",
    "TrainingError",
    "TrainingInterruptedError",
    "UnreadableImageError",
    "UnsupportedInputError",
    "UnsupportedModelError",
    "apply",
    "autopatch",
    "benchmark",
    "config_of",
    "finetune",
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
    "visualize",
    "visualize_training",
]
