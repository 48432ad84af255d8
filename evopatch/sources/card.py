"""The model card of a saved model: `README.md` with what the Hugging Face hub reads in its front matter."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import torch

from ..measure.profiling import UNPATCHED, count_flops
from ..patching.handle import Patched
from ..patching.learning import learned
from ..patching.library import Origin
from ..version import VERSION

FILE_NAME = "README.md"


def card(patched: Patched[Any], library: str, origin: Origin) -> str:
    """Markdown: what the model is, its FLOPs against unpatched, how to load it, and its configuration.

    Args:
        patched: The model to describe.
        library: `"timm"` or `"transformers"`.
        origin: What the library says of the model.
    """
    kind = type(patched.model).__name__
    front = ["---", f"library_name: {library}"]
    front += [] if origin.base_model is None else [f"base_model: {origin.base_model}"]
    front += ["tags:", "- evopatch", "- evo-vit", "- token-reduction", "---"]
    title = (origin.base_model or kind).rpartition("/")[2]
    configs = patched.configs
    settings = [json.dumps(config.to_dict(), sort_keys=True) for config in configs.values()]
    if len(configs) > 1:
        settings = [f"{name}: {text}" for name, text in zip(configs, settings, strict=True)]
    return "\n".join(
        [
            *front,
            "",
            f"# {title}, patched by evopatch",
            "",
            f"A {kind} of {library}. evopatch {VERSION} made its blocks slow-fast two-stream blocks after *Evo-ViT:",
            "Slow-Fast Token Evolution for Dynamic Vision Transformer* (arXiv 2108.01390).",
            *_flops(patched, origin),
            *_learned(patched),
            "",
            "The patched model, from this folder or the name of this repository:",
            "",
            "```python",
            "import evopatch",
            "",
            'model = evopatch.load_pretrained("folder")',
            "```",
            "",
            f"Without evopatch these files are a normal checkpoint of the unpatched model: `{origin.stock}`.",
            "",
            "Configuration:",
            "",
            "```",
            *settings,
            "```",
            "",
        ]
    )


def _learned(patched: Patched[Any]) -> list[str]:
    if not learned(patched.model):
        return []
    return ["", "What its blocks learned from images without labels lies in `evopatch.safetensors`."]


def _flops(patched: Patched[Any], origin: Origin) -> list[str]:
    ratio = None if origin.input_size is None else flops_ratio(patched, origin.input_size)
    if ratio is None or origin.input_size is None:
        return []
    _, height, width = origin.input_size
    return ["", f"An image of {height}x{width} pixels takes {ratio:.3f} of the unpatched model's FLOPs."]


@torch.no_grad()
def flops_ratio(patched: Patched[Any], input_size: tuple[int, int, int]) -> float | None:
    """FLOPs of the whole model relative to unpatched, for one image.

    Args:
        patched: The model; stays as it is.
        input_size: `(channels, height, width)` in pixels.

    Returns:
        None where the model takes more than an image, or no image of this size.
    """
    parameter = next(patched.model.parameters())
    image = torch.zeros(1, *input_size, device=parameter.device, dtype=parameter.dtype)
    own, unpatched = patched.copy().eval(), patched.at(UNPATCHED)
    try:
        flops, flops_unpatched = (count_flops(partial(side, image))[0] for side in (own, unpatched))
    except Exception:  # whatever its forward raises
        return None
    return flops / flops_unpatched
