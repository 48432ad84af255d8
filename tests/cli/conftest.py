"""Models that tests of several commands open."""

from pathlib import Path

import pytest
import torch

import evopatch


@pytest.fixture
def headless(tmp_path: Path) -> Path:
    """The folder of a DINOv2 without a head, patched, with its image processor: images of 40 px."""
    import transformers

    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4, "image_size": 40, "patch_size": 8}
    model = transformers.Dinov2Model(transformers.Dinov2Config(**sizes)).eval()
    size = {"height": 40, "width": 40}
    processor = transformers.BitImageProcessor(size={"shortest_edge": 40}, crop_size=size)
    evopatch.save_pretrained(evopatch.apply(model), tmp_path / "dino", processor=processor)
    return tmp_path / "dino"
