"""The short examples run as they stand, and say what they are for."""

import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SHORT = {
    "torchvision_vit": "FLOPs: 0.747 of unpatched",
    "open_clip_encoder": "text features unchanged: True",
    "own_dinov2": "torch.Size([1, 16, 16, 384])",
    "vision_language": "dtype=torch.int32",
    "anomaly_detection": "the fault is at row ",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(SHORT))
def test_a_short_example(name, monkeypatch, capsys):
    if name == "open_clip_encoder":
        pytest.importorskip("open_clip")
    file = EXAMPLES / f"{name}.py"
    assert len(file.read_text().splitlines()) <= 40
    monkeypatch.setattr(sys, "argv", [str(file)])
    runpy.run_path(str(file), run_name="__main__")
    printed = capsys.readouterr().out
    assert SHORT[name] in printed
    if name == "anomaly_detection":
        row, column = (int(word.strip(",")) for word in printed.split() if word.strip(",").isdigit())
        assert 4 <= row < 8
        assert 6 <= column < 10
    if name == "open_clip_encoder":
        cosine = float(printed.partition("cosine of image features: ")[2].split()[0])
        assert 0.9 < cosine < 0.9999
