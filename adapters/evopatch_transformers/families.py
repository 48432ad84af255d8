"""The flat encoders of transformers whose layers have one shape, in one table."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

from torch import nn

from .appended import AppendedInterface
from .joined import GloballyJoined, JoinedInterface


def _one(config: Any) -> int:
    return 1


def _none(config: Any) -> int:
    return 0


def _no(config: Any) -> bool:
    return False


def _two(config: Any) -> int:
    return 2


def _nothing(config: Any) -> tuple[str, ...]:
    return ()


class Family(NamedTuple):
    """One module that loops over its layers."""

    blocks: str
    """Path of the container."""
    prefix: Callable[[Any], int]
    """Number of prefix tokens by the model's config."""
    readout: Callable[[Any], int] = _one
    """How many of the first of them the head reads, by the same; 0 where it averages the patch tokens."""
    rotary: bool = False
    """Layers take `position_embeddings`, of the patch tokens or of all."""
    rotation: str = ""
    """The function in its module that rotates queries and keys by tables without an axis for images. Those of a compact
    set have one, as groups differ by image."""
    places: str = ""
    """The method of its attention modules that says by the number of tokens where each of them is, to rotate by."""
    rotates: str = "apply_rotary_pos_emb"
    """The function in its module that rotates queries and keys by tables, or each by places."""
    biases: Callable[[Any], tuple[str, ...]] = _nothing
    """What layers take to add position biases to the attention logits, by the same: one made by their host, and the
    image size that they make their own of."""
    pooled: bool = False
    """See `HostSpec.pooled`."""
    pads: bool = False
    """Its model masks the tokens that fill up smaller images."""
    behind: Callable[[Any], int] = _none
    """Number of tokens behind the patch tokens, by the same; these are what is read then."""
    mean: bool = False
    """Patch tokens are ranked by what their mean attends to, not those behind them."""
    looks: Callable[[Any], bool] = _no
    """Whether it looks at the tokens between its layers, by the same."""
    own_attention: bool = False
    """Its attention modules don't call transformers' interface."""
    windows: type[JoinedInterface] | None = None
    """Its layers are given windows as images, of which some attend over all windows together: theirs is this."""
    appended: type[AppendedInterface] | None = None
    """Its layers put tokens behind their own for their attention, whose is this."""
    aside: tuple[str, ...] = ()
    """Attention modules of its layers that attend between other things than tokens."""
    joined: Callable[[Any], int] = _none
    """How many of its last layers stay as they are, by the same: other tokens join those of the image before them."""
    no_grid: str = ""
    """Why its patch tokens aren't the grid of one image's patches, where they aren't."""


def _class_tokens(config: Any) -> int:
    return int(config.n_cls_tokens)


def _registers(config: Any) -> int:
    return 1 + int(config.num_register_tokens)


_JOINED_BY_QUERIES = Family("layers", _registers, joined=lambda config: int(config.num_blocks))
_IN_WINDOWS = "has its tokens in windows, each of which is a grid of its own"
_NO_IMAGE = "takes video or sound, whose patches aren't a grid of an image's"
_CLIP_LIKE = Family("encoder.layers", _one, pooled=True)
# Their tokens are normed already.
_BLIP_LIKE = _CLIP_LIKE._replace(pooled=False)
_PADDED = Family("encoder.layers", _none, readout=_none, pads=True)

# By module, below transformers.models, and class.
FAMILIES: dict[tuple[str, str], Family] = {
    ("vit.modeling_vit", "ViTModel"): Family("layers", _one),
    ("vit_msn.modeling_vit_msn", "ViTMSNModel"): Family("layers", _one),
    ("vit_mae.modeling_vit_mae", "ViTMAEModel"): Family(
        "layers", _one, no_grid="shuffles its patch tokens and leaves some out: they have no place on a grid here"
    ),
    ("deit.modeling_deit", "DeiTModel"): Family("layers", _two, readout=_two),
    ("ijepa.modeling_ijepa", "IJepaModel"): Family("layers", _none, readout=_none),
    ("dinov2.modeling_dinov2", "Dinov2Encoder"): Family("layer", _one),
    ("dinov2_with_registers.modeling_dinov2_with_registers", "Dinov2WithRegistersEncoder"): Family("layer", _registers),
    ("dinov3_vit.modeling_dinov3_vit", "DINOv3ViTEncoder"): Family("layer", _registers, rotary=True),
    ("sapiens2.modeling_sapiens2", "Sapiens2Encoder"): Family("layer", _registers, rotary=True),
    ("clip.modeling_clip", "CLIPVisionModel"): _CLIP_LIKE,
    ("siglip.modeling_siglip", "SiglipVisionModel"): Family("encoder.layers", _none, readout=_none, pooled=True),
    ("siglip2.modeling_siglip2", "Siglip2VisionModel"): Family(
        "encoder.layers",
        _none,
        readout=_none,
        pooled=True,
        pads=True,
        no_grid="takes patches of images, not images: ask its processor",
    ),
    ("idefics2.modeling_idefics2", "Idefics2VisionTransformer"): _PADDED,
    ("idefics3.modeling_idefics3", "Idefics3Encoder"): _PADDED._replace(blocks="layers"),
    ("smolvlm.modeling_smolvlm", "SmolVLMEncoder"): _PADDED._replace(blocks="layers"),
    ("beit.modeling_beit", "BeitModel"): Family(
        "layers", _one, biases=lambda config: ("attention_mask", "resolution"), pooled=True
    ),
    ("data2vec.modeling_data2vec_vision", "Data2VecVisionEncoder"): Family(
        "layer",
        _one,
        biases=lambda config: (
            *(("relative_position_bias",) if config.use_shared_relative_position_bias else ()),
            "resolution",
        ),
        pooled=True,
        own_attention=True,
    ),
    ("eomt.modeling_eomt", "EomtForUniversalSegmentation"): _JOINED_BY_QUERIES,
    ("eomt_dinov3.modeling_eomt_dinov3", "EomtDinov3ForUniversalSegmentation"): _JOINED_BY_QUERIES._replace(
        rotary=True
    ),
    ("videomt.modeling_videomt", "VideomtForUniversalSegmentation"): _JOINED_BY_QUERIES._replace(no_grid=_NO_IMAGE),
    ("lw_detr.modeling_lw_detr", "LwDetrViTEncoder"): Family(
        "layer", _none, readout=_none, windows=JoinedInterface, no_grid=_IN_WINDOWS
    ),
    ("rf_detr.modeling_rf_detr", "RfDetrDinov2Encoder"): Family(
        "layer", _one, windows=GloballyJoined, no_grid=_IN_WINDOWS
    ),
    # Behind the first stage there are segments, not patches.
    ("groupvit.modeling_groupvit", "GroupViTVisionEncoder"): Family(
        "stages.0.layers",
        _none,
        behind=lambda config: int(config.num_group_tokens[0]),
        mean=True,
        pooled=True,
        own_attention=True,
    ),
    ("internvl.modeling_internvl", "InternVLVisionEncoder"): Family("layer", _one),
    ("qianfan_ocr.modeling_qianfan_ocr", "QianfanOCRVisionModel"): Family("layers", _one),
    ("dpt.modeling_dpt", "DPTViTEncoder"): Family("layer", _one),
    ("mgp_str.modeling_mgp_str", "MgpstrModel"): Family(
        "encoder.blocks", lambda config: 1 + bool(config.distilled), own_attention=True
    ),
    ("pixio.modeling_pixio", "PixioModel"): Family("layers", _class_tokens, readout=_class_tokens),
    ("tipsv2.modeling_tipsv2", "Tipsv2VisionEncoder"): Family("layer", _registers),
    ("radio.modeling_radio", "RadioEncoder"): Family(
        "layer",
        lambda config: int(config.num_cls_tokens + config.num_registers),
        readout=lambda config: int(config.num_cls_tokens),
    ),
    ("mlcd.modeling_mlcd", "MLCDVisionModel"): Family(
        "encoder.layers", _one, rotary=True, rotation="apply_rotary_pos_emb_vision", pooled=True
    ),
    ("altclip.modeling_altclip", "AltCLIPVisionModel"): _CLIP_LIKE,
    ("chinese_clip.modeling_chinese_clip", "ChineseCLIPVisionModel"): _CLIP_LIKE,
    ("metaclip_2.modeling_metaclip_2", "MetaClip2VisionModel"): _CLIP_LIKE,
    ("clipseg.modeling_clipseg", "CLIPSegVisionModel"): _CLIP_LIKE,
    ("owlvit.modeling_owlvit", "OwlViTVisionTransformer"): _CLIP_LIKE,
    ("owlv2.modeling_owlv2", "Owlv2VisionTransformer"): _CLIP_LIKE,
    ("blip.modeling_blip", "BlipVisionModel"): _BLIP_LIKE._replace(own_attention=True),
    ("blip_2.modeling_blip_2", "Blip2VisionModel"): _BLIP_LIKE,
    ("instructblip.modeling_instructblip", "InstructBlipVisionModel"): _BLIP_LIKE,
    ("instructblipvideo.modeling_instructblipvideo", "InstructBlipVideoVisionModel"): _BLIP_LIKE,
    ("kosmos2.modeling_kosmos2", "Kosmos2VisionTransformer"): _CLIP_LIKE,
    ("git.modeling_git", "GitVisionTransformer"): _BLIP_LIKE,
    ("aimv2.modeling_aimv2", "Aimv2VisionModel"): Family("encoder.layers", _none, readout=_none, pooled=True),
    ("janus.modeling_janus", "JanusVisionModel"): Family("encoder.layers", _none, readout=_none),
    ("vitpose_backbone.modeling_vitpose_backbone", "VitPoseBackboneEncoder"): Family("layer", _none, readout=_none),
    ("videomae.modeling_videomae", "VideoMAEEncoder"): Family("layer", _none, readout=_none, no_grid=_NO_IMAGE),
    ("vjepa2.modeling_vjepa2", "VJEPA2Encoder"): Family(
        "layer",
        _none,
        readout=_none,
        places="get_position_ids",
        rotates="rotate_queries_or_keys",
        no_grid=_NO_IMAGE,
    ),
    ("vivit.modeling_vivit", "VivitModel"): Family("layers", _one, no_grid=_NO_IMAGE),
    ("x_clip.modeling_x_clip", "XCLIPVisionEncoder"): Family(
        "layers", _one, pooled=True, appended=AppendedInterface, aside=("message_attn",)
    ),
    ("yolos.modeling_yolos", "YolosEncoder"): Family(
        "layer",
        _one,
        behind=lambda config: int(config.num_detection_tokens),
        looks=lambda config: bool(config.use_mid_position_embeddings),
    ),
    ("audio_spectrogram_transformer.modeling_audio_spectrogram_transformer", "ASTModel"): Family(
        "layers", _two, readout=_two, no_grid=_NO_IMAGE
    ),
}


Row = TypeVar("Row")


def loaded(table: Mapping[tuple[str, str], Row]) -> dict[type[nn.Module], Row]:
    """The classes of a table that are loaded: there are no instances of others.

    Args:
        table: By module, below transformers.models, and class.
    """
    found: dict[type[nn.Module], Row] = {}
    for (module, name), row in table.items():
        cls = getattr(sys.modules.get(f"transformers.models.{module}"), name, None)
        if cls is not None:
            found[cls] = row
    return found


def function_of(host: nn.Module, name: str) -> Callable[..., Any]:
    """A function of the module that a host's class is from."""
    function: Callable[..., Any] = vars(sys.modules[type(host).__module__])[name]
    return function


def row_of(host: nn.Module, table: Mapping[tuple[str, str], Row]) -> Row:
    """Of an instance of one of the classes, or of a subclass."""
    return next(row for cls, row in loaded(table).items() if isinstance(host, cls))
