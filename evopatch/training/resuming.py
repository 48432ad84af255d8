"""Which run a checkpoint can be gone on with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import nn

from ..errors import ConfigError
from ..measure.fingerprint import fingerprint
from ..patching.handle import Patched
from ..patching.learning import learned
from . import checkpoints
from .differences import differences
from .items import Items
from .objective import Objective
from .preparation import trained
from .settings import MAY_DIFFER, FinetuneConfig


def settings_of_run(
    config: FinetuneConfig,
    patched: Patched[nn.Module],
    items: Items,
    accelerator: Accelerator,
    objective: Objective,
    taught_by: str | None,
) -> dict[str, Any]:
    """All that has to be the same when a run is resumed, as plain values. The model's parameters are not frozen yet."""
    from_images = learned(patched.model)
    taken_in = set(map(id, trained(patched, config)))
    settings = {key: value for key, value in config.to_dict().items() if key not in MAY_DIFFER}
    settings |= {
        "patch": patched.config.to_dict(),
        "what the blocks learned from images": fingerprint(from_images) if from_images else None,
        "trained parameters": [name for name, p in patched.model.named_parameters() if id(p) in taken_in],
        "images": len(items),
        "names and labels of the images": items.listing(),
        "processes": accelerator.num_processes,
        "mixed_precision": accelerator.mixed_precision,
        "objective": "distillation" if objective.distils else "labels",
        "teacher": taught_by,
    }
    plain: dict[str, Any] = json.loads(json.dumps(settings))  # as they come back from a checkpoint
    return plain


def resumable(output: Path, settings: Mapping[str, Any]) -> Path | None:
    """The newest whole checkpoint of an output folder; None where there is none.

    Args:
        output: The folder.
        settings: Of the run that is to go on.

    Raises:
        CheckpointError: If all are damaged.
        ConfigError: If they are of a run with other settings.
    """
    path = checkpoints.latest(output)
    if path is None:
        return None
    if different := differences(checkpoints.settings_of(path), settings):
        raise ConfigError(
            f"{path} is of a run with other settings: {different}. Resume with the same ones, or start anew in another "
            "output folder"
        )
    return path
