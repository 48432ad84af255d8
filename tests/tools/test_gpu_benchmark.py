"""benchmarks/gpu.py on a machine without a GPU: eager, one small cell."""

import json
import sys

import gpu
import pytest


@pytest.mark.slow
def test_measures_and_leaves_out_what_is_not_ready(tmp_path, monkeypatch, capsys):
    arguments = ["deit_tiny_patch16_224:1", "--device", "cpu", "--dtype", "float32", "--rounds", "2"]
    monkeypatch.setattr(
        sys, "argv", ["gpu.py", *arguments, "--no-train", "--no-compile", "--output", str(tmp_path / "made")]
    )
    gpu.main()
    content = json.loads((tmp_path / "made" / "gpu.json").read_text())
    (cell,) = content["cells"]
    assert "error" not in cell
    assert content["device"] == "cpu"
    assert cell["flops"]["unpatched"] == 1 > cell["flops"]["token merging"] > 0.5
    assert 0.5 < cell["flops"]["foresight"] < cell["flops"]["patched"] < 0.7
    assert {side: len(values) for side, values in cell["seconds"]["eager"].items()} == dict.fromkeys(cell["flops"], 2)
    assert all(value > 0 for values in cell["seconds"]["eager"].values() for value in values)
    assert cell["kernels"]["eager"]["patched"] > cell["kernels"]["eager"]["unpatched"] > 100
    assert all(cell["repeatable"]["eager"].values())
    assert "foresight" in capsys.readouterr().out

    monkeypatch.setattr(gpu, "LONGEST_COMPILATION", 0.0)
    monkeypatch.setattr(sys, "argv", [*sys.argv[:-1], str(tmp_path / "late"), "--compile-minutes", "0"])
    gpu.main()
    (cell,) = json.loads((tmp_path / "late" / "gpu.json").read_text())["cells"]
    assert "not ready in time" in cell["error"]


@pytest.mark.slow
def test_leaves_out_sides_that_are_not_compiled_in_time(tmp_path, monkeypatch):
    arguments = ["deit_tiny_patch16_224:1", "--device", "cpu", "--dtype", "float32", "--rounds", "1", "--no-train"]
    late = ["--compile-minutes", "0", "--no-profile", "--sides", "patched"]
    monkeypatch.setattr(sys, "argv", ["gpu.py", *arguments, *late, "--output", str(tmp_path)])
    gpu.main()
    (cell,) = json.loads((tmp_path / "gpu.json").read_text())["cells"]
    assert "error" not in cell
    assert cell["seconds"].keys() == {"eager"}
    assert cell["kernels"] == {"eager": {}}
