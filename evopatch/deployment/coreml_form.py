"""Core ML packages. They run on Apple's systems only, so nothing here runs what it writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .conversion import Conversion
from .form import Form


def _write(conversion: Conversion, path: Path) -> None:
    import coremltools

    precision: Any = coremltools.precision
    model: Any = coremltools.convert(
        conversion.program().run_decompositions({}),
        skip_model_load=True,
        compute_precision=precision.FLOAT16 if conversion.half else precision.FLOAT32,
    )
    model.save(str(path))


COREML = Form(
    "coreml",
    ".mlpackage",
    ("coremltools",),
    _write,
    None,
    any_batch=False,
    any_size=False,
    is_package=True,
    own_half=True,
)
