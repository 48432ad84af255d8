"""`evopatch benchmark` and `evopatch profile`, as a user runs them."""

import json
import re

import pytest
import timm
from peers import token_merging

import evopatch


@pytest.mark.slow
def test_benchmark_command(command, tmp_path):
    peer = token_merging.__file__
    out, plot = tmp_path / "speed.json", tmp_path / "speed.png"
    run = command(
        *("benchmark", "--model", "vit_tiny_patch16_224", "--image-size", "160", "--batch-size", "1"),
        *("--batch-size", "2", "--keep-ratio", "0.7", "--keep-ratio", "0.4", "--rounds", "2", "--warm-up", "1"),
        *("--peer", peer, "--json", out, "--plot", plot),
    )
    assert run.returncode == 0, run.stderr
    results = json.loads(out.read_text())
    assert [result["batch_size"] for result in results] == [1, 2]
    names = [side["name"] for side in results[0]["sides"]]
    assert names == [
        "unpatched", "keep 0.7", "keep 0.4", "token merging as keep 0.7", "token merging as keep 0.4",
    ]  # fmt: skip
    flops = {side["name"]: side["flops"] for side in results[0]["sides"]}
    for ratio in ("0.7", "0.4"):
        assert 0.8 < flops[f"token merging as keep {ratio}"] / flops[f"keep {ratio}"] <= 1
    assert re.search(
        r"cpu, \d+ threads, float32, eager, attention flash, 2 rounds, torch \d", " ".join(run.stdout.split())
    )
    assert all(len(side["seconds"]) == 2 for result in results for side in result["sides"])
    assert "Efficiency: speed-up times FLOPs" in " ".join(run.stdout.split())
    assert "…" not in run.stdout, "the table doesn't fit 80 columns"
    assert plot.stat().st_size > 5000


def test_profile_command(command, tmp_path):
    out = tmp_path / "profile.json"
    run = command("profile", "--model", "vit_tiny_patch16_224", "--image-size", "64", "--json", out)
    assert run.returncode == 0, run.stderr
    found = json.loads(out.read_text())
    model = evopatch.apply(timm.create_model("vit_tiny_patch16_224", img_size=64))
    expected = evopatch.profile(model, (3, 64, 64))
    assert {key: value for key, value in found.items() if key != "config"} == expected.to_dict() | {
        "blocks": [vars(block) for block in expected.blocks]
    }
    assert f"{expected.ratio:.3f}" in run.stdout
    assert "…" not in run.stdout, "the table doesn't fit 80 columns"


def test_profile_command_of_a_pyramid(command, tmp_path):
    out = tmp_path / "profile.json"
    run = command("profile", "--model", "levit_128s", "--image-size", "128", "--json", out)
    assert run.returncode == 0, run.stderr
    blocks = json.loads(out.read_text())["blocks"]
    assert [block["tokens_unpatched"] for block in blocks] == [64] * 2 + [16] * 3 + [4] * 4
    assert [block["tokens"] for block in blocks] == [64, 48] + [8] * 3 + [1] * 4


def test_profile_command_of_a_model_that_takes_any_size(command, tmp_path):
    out = tmp_path / "profile.json"
    run = command("profile", "--model", "pvt_v2_b0", "--image-size", "96", "--json", out)
    assert run.returncode == 0, run.stderr
    blocks = json.loads(out.read_text())["blocks"]
    assert [block["tokens_unpatched"] for block in blocks] == [576] * 2 + [144] * 2 + [36] * 2 + [9] * 2
    assert [block["tokens"] for block in blocks[4:]] == [36, 18, 5, 5]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("benchmark", "--model", "vit_tinny_patch16_224"), 1, "did you mean vit_tiny_patch16_224"),
        (("benchmark", "--model", "vit_tiny_patch16_224", "--peer", "nowhere.py"), 2, "expected a Python file"),
        (("benchmark", "--model", "vit_tiny_patch16_224", "--json", "no/a.json"), 1, "no such folder"),
        (("benchmark", "--model", "vit_tiny_patch16_224", "--rounds", "1"), 2, "rounds"),
        (
            ("benchmark", "--model", "no_such_model", "--plot", "x.foo"),
            2,
            "--plot x.foo: expected the ending of a picture",
        ),
        (
            ("visualize", "--model", "no_such_model", "--image", "x.png", "--out", "x.xyz"),
            2,
            "--out x.xyz: expected the",
        ),
        (("demo", "--out", "picture"), 2, "--out picture: expected the ending of a picture"),
        (("benchmark", "--model", "resnet18"), 1, "nothing to patch in timm.models.resnet.ResNet"),
        (("benchmark", "--model", "vit_tiny_patch16_224", "--device", "gpu"), 2, "'gpu'"),
        (("profile", "--model", "vit_tiny_patch16_224", "--image-size", "7"), 2, "7 px"),
        (("profile", "--model", "vit_tiny_patch16_224", "--keep-ratio", "0"), 2, "keep_ratio=0.0"),
    ],
)
def test_bad_usage_is_one_message(command, arguments, code, message):
    run = command(*arguments)
    run.assert_refused(code, message)
