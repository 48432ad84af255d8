"""timm's NaFlexVit: with images, and with patches of which some only fill up smaller images."""

from collections.abc import Callable

import torch
from timm.models.naflexvit import NaFlexVit, NaFlexVitCfg  # since timm 1.0.16
from torch import Tensor, nn

_SEEN = {"img_size": 40, "num_classes": 7}
_SMALL = {"patch_size": 8, "embed_dim": 48, "num_heads": 4, "class_token": True, "reg_tokens": 2}
_SMALL |= {"global_pool": "token"}


class PaddedNaFlex(NaFlexVit):
    """Takes square images of 5 by 5 patches, and leaves the last row of every darker one out, as if it only filled up
    the batch."""

    def forward_features(self, patches: Tensor) -> Tensor:
        return NaFlexVit.forward_features(self, **_patches(patches))["patches"]

    def forward_intermediates(self, x: Tensor, output_fmt: str = "NCHW", **options: object) -> object:
        found = NaFlexVit.forward_intermediates(self, _patches(x), output_fmt="NLC", **options)
        if output_fmt == "NLC":
            return found
        out, maps = (None, found) if options.get("intermediates_only") else found
        if options.get("return_prefix_tokens"):
            maps = [(_map(patches), prefix) for patches, prefix in maps]
        else:
            maps = [_map(patches) for patches in maps]
        return maps if out is None else (out, maps)


def _map(patches: Tensor) -> Tensor:
    return patches.unflatten(1, (5, 5)).permute(0, 3, 1, 2)


def _patches(images: Tensor) -> dict[str, Tensor]:
    batch = images.shape[0]
    patches = images.unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 4, 5, 1).reshape(batch, 25, -1)
    places = torch.arange(25, device=images.device)
    coordinates = torch.stack([places // 5, places % 5], dim=-1).expand(batch, -1, -1)
    there = places < 20 + 5 * (images.mean((1, 2, 3)) > 0).unsqueeze(1)
    return {"patches": patches, "patch_coord": coordinates, "patch_valid": there}


def _built(cls: type[nn.Module], **fixed: object) -> Callable[..., nn.Module]:
    return lambda depth=6, **k: cls(NaFlexVitCfg(**_SMALL | fixed | {"depth": depth}), **_SEEN | k)


FLAT: dict[str, Callable[..., nn.Module]] = {
    "naflex": _built(NaFlexVit),
    "naflex_rope": _built(NaFlexVit, rope_type="axial", attn_type="rope", pos_embed="none"),
    "naflex_padded": _built(PaddedNaFlex, pos_embed_use_grid_sample=True),
}
