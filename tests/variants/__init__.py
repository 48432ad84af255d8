"""The one list of model structures: small random models of both libraries, and what tests do with any of them."""

import importlib.util
from collections.abc import Callable, Iterable

import torch
from torch import nn

from . import joined, own_models, reduced, timm_models, transformers_models, windowed

# Not in every version that is served.
naflex: dict[str, Callable[..., nn.Module]] = {}
if importlib.util.find_spec("timm.models.naflexvit"):
    from .naflex import FLAT as naflex  # noqa: N811

OWN = frozenset(own_models.FLAT)
"""Names of models of neither library, which `evopatch.apply` is told of by `blocks=`."""
FLAT = frozenset({*timm_models.FLAT, *naflex, *transformers_models.FLAT, "torchvision"}) | OWN
"""Names of models with one grid of tokens: ViT, DeiT, DINO, EVA and their like; 6 blocks."""
IN_WINDOWS = frozenset({"hf_rf_detr_backbone"})
"""Of these some blocks get windows as images of their own, and no tool draws their tokens; a grid of 10x10."""
PYRAMIDS = frozenset({*timm_models.PYRAMIDS, *transformers_models.PYRAMIDS})
"""Names of pyramids of flat blocks: three stages of 2, 3 and 2 blocks on grids of 5x5, 3x3 and 2x2."""
PIT = frozenset({"pit", "pit_distilled"})
LEVIT = PYRAMIDS - PIT
SWIN = frozenset({*windowed.TIMM, *windowed.TORCHVISION, *windowed.TRANSFORMERS})
"""Names of Swin models: three stages of 2 blocks on grids of 16x16, 8x8 and 4x4 with windows of 4x4."""
JOINED = frozenset({*joined.TIMM, *joined.TRANSFORMERS})
"""Names of SAM's and ViTDet's encoders: 6 blocks on a grid of 8x8, 4 of them with windows of 4x4."""
REDUCED = frozenset({*reduced.TIMM, *reduced.TRANSFORMERS})
"""Names of PVT v2 and SegFormer: three stages of 2 blocks on grids of 16x16, 8x8 and 4x4."""
WINDOWED = SWIN | JOINED | REDUCED
ONE_GRID = FLAT | JOINED
"""Names of models of 6 blocks on one grid."""
TIMM = frozenset({*timm_models.FLAT, *naflex, *timm_models.PYRAMIDS, *windowed.TIMM, *joined.TIMM, *reduced.TIMM})
TRANSFORMERS = frozenset({*transformers_models.FLAT, *transformers_models.PYRAMIDS, *windowed.TRANSFORMERS})
TRANSFORMERS |= joined.TRANSFORMERS.keys() | reduced.TRANSFORMERS.keys()
EVERY = FLAT | PYRAMIDS | WINDOWED

_BUILDERS = {
    **own_models.FLAT,
    "torchvision": own_models.torchvision_vit,
    **timm_models.FLAT,
    **naflex,
    **timm_models.PYRAMIDS,
    **transformers_models.FLAT,
    **transformers_models.PYRAMIDS,
    **windowed.TIMM,
    **windowed.TORCHVISION,
    **windowed.TRANSFORMERS,
    **joined.TIMM,
    **joined.TRANSFORMERS,
    **reduced.TIMM,
    **reduced.TRANSFORMERS,
}
SIZE = timm_models.SIZE
"""Pixels of a flat model's images; with patches of 8 a grid of 5 by 5."""


def build(name: str, **settings: object) -> nn.Module:
    """A model in eval mode, the same weights at every call; attention sharp enough to rank tokens by.

    Args:
        name: One of `EVERY`.
        settings: For its constructor or configuration, beside its own.
    """
    torch.manual_seed(0)
    model = _BUILDERS[name](**settings).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.08)
        if name in PYRAMIDS:
            calibrate(model, images_for(name, batch=64, size=settings.get("img_size"), seed=3))
    return model


def shallow(name: str) -> dict[str, object]:
    """Settings of a flat model of 3 blocks, for tests whose time goes by their number; none for other models."""
    if name not in FLAT:
        return {}
    settings = {"num_hidden_layers" if name in TRANSFORMERS else "depth": 3}
    return settings | {"out_features": ["stage2", "stage3"]} if "backbone" in name else settings


def calibrate(model: nn.Module, x: torch.Tensor) -> None:
    """Batch norms as after training: the statistics of what they get, and branches as large as the residual."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.momentum = 1.0
        nn.init.uniform_(norm.weight, 0.7, 1.3)
    model.train()(x)
    model.eval()
    for norm in norms:
        norm.momentum = 0.1
        norm.running_var.clamp_min_(0.1)  # or rounding would be magnified


def images(batch: int = 2, size: int | tuple[int, int] = SIZE, seed: int = 1) -> torch.Tensor:
    """Random images `(B, 3, size, size)`, or of `(height, width)`."""
    height, width = (size, size) if isinstance(size, int) else size
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(seed))


def images_for(name: str, batch: int = 2, size: int | tuple[int, int] | None = None, seed: int = 1) -> torch.Tensor:
    """Random images of a model's own size, unless another one is given."""
    twice = name in IN_WINDOWS or name in transformers_models.PYRAMIDS
    own = windowed.SIZE if name in WINDOWED else 2 * SIZE if twice else SIZE
    return images(batch, own if size is None else size, seed)


def call(model: nn.Module, x: torch.Tensor, **options: object) -> torch.Tensor:
    """What a model is used for: logits, embeddings, a reconstruction, the last hidden state or the last maps."""
    out = model(x, **options)
    if isinstance(out, torch.Tensor):
        return out
    for key in ("logits", "image_embeds", "reconstruction", "masks_queries_logits", "last_hidden_state"):
        if out.get(key) is not None:
            return out[key]
    return torch.cat([m for m in out.feature_maps if m.shape == out.feature_maps[-1].shape], dim=1)


def _hooked(modules: Iterable[nn.Module], model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    found = []
    hooks = [module.register_forward_hook(lambda module, args, out: found.append(out)) for module in modules]
    model(x)
    for hook in hooks:
        hook.remove()
    return found


def between(name: str, model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """Features as the library gives them to callers who ask.

    Returns:
        Of models of one grid tokens `(B, T, C)`, or maps, after every block; of the others after every stage.
    """
    if name in TRANSFORMERS:
        out = model(x, output_hidden_states=True)
        if name in SWIN:
            return list(out.feature_maps if "feature_maps" in out else out.reshaped_hidden_states[1:])
        if name == "hf_pvt":  # after every block, and once more after the norm
            return list(out.hidden_states[1:6:2])
        if name in REDUCED:
            return list(out.feature_maps if "feature_maps" in out else out.hidden_states)
        return list(out.hidden_states[1:-2] if name == "hf_eomt" else out.hidden_states[1:])
    if name in OWN:
        return model.features(x)
    if name == "torchvision":
        return _hooked(model.encoder.layers, model, x)
    if name in windowed.TORCHVISION:
        return _hooked(model.features[1::2], model, x)
    if name not in FLAT:
        return model.forward_intermediates(x, intermediates_only=True)
    prefix = model.num_prefix_tokens > 0 and name != "cait"  # whose class token comes behind the blocks
    asked = {"return_prefix_tokens": True} if prefix else {}
    out = model.forward_intermediates(x, output_fmt="NLC", intermediates_only=True, **asked)
    return [torch.cat([o[1], o[0]], dim=1) for o in out] if prefix else out
