"""The command line, as a user runs it."""

import json
import shutil
import subprocess
import sys

import huggingface_hub
import pytest
import timm
import torch
from PIL import Image
from samples import encoded
from terminal import unboxed

from evopatch.cli import console, demo


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A checkpoint, and the same images as parquet and as folders."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = tmp_path_factory.mktemp("data")
    torch.manual_seed(0)
    model = timm.create_model("deit_tiny_patch16_224", num_classes=3)
    torch.save(model.state_dict(), folder / "weights.pth")
    rows = [{"image": {"bytes": encoded(i), "path": None}, "label": i % 3} for i in range(6)]
    pq.write_table(pa.Table.from_pylist(rows), folder / "images.parquet")
    pq.write_table(pa.table({"picture": [1]}), folder / "other.parquet")
    for name, label in (("words", "cat"), ("many", 472)):
        pq.write_table(pa.Table.from_pylist([row | {"label": label} for row in rows]), folder / f"{name}.parquet")
    for i, row in enumerate(rows):
        path = folder / "images" / f"class{row['label']}" / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(row["image"]["bytes"])
    (folder / "empty").mkdir()
    return folder


COMMANDS = (
    "verify",
    "embed",
    "evaluate",
    "calibrate",
    "finetune",
    "benchmark",
    "export",
    "profile",
    "visualize",
    "run",
    "list",
    "demo",
)
COMMON = ("evaluate", "--model", "deit_tiny_patch16_224", "--num-classes", "3")


@pytest.mark.slow
def test_evaluate_parquet_and_folder_agree(command, files, tmp_path):
    results = []
    for data in ("images.parquet", "images"):
        out = tmp_path / f"{data}.json"
        run = command(
            *COMMON, "--checkpoint", files / "weights.pth", "--data", files / data, "--keep-ratio", "0.5",
            "--keep-ratio", "0.6,0.3", "--representative", "matched", "--representative", "single", "--json", out,
        )  # fmt: skip
        assert run.returncode == 0, run.stderr
        for word in ("unpatched", "matched", "single", "0.6,", "KL"):
            assert word in run.stdout
        results.append(json.loads(out.read_text()))
    parquet, folder = results
    assert len(parquet) == 5
    assert parquet[0]["kl"] == 0.0
    assert parquet[0]["flops"] == 1.0
    assert parquet[0]["agreement"] == 100.0
    assert all(row["images"] == 6 and row["top5"] == 100.0 for row in parquet)
    assert 0 < parquet[1]["kl"] < 1
    assert 0.6 < parquet[1]["flops"] < 0.7
    assert parquet[1]["flops"] > parquet[1]["blocks_flops"]
    for a, b in zip(parquet, folder, strict=True):
        assert a["kl"] == pytest.approx(b["kl"], rel=1e-3, abs=1e-7)
        assert a["top1"] == b["top1"]


def test_one_logit_is_no_class(command, files, tmp_path):
    torch.manual_seed(0)
    torch.save(timm.create_model("vit_tiny_patch16_224", num_classes=1).state_dict(), tmp_path / "one.pth")
    run = command(
        "evaluate", "--model", "vit_tiny_patch16_224", "--image-size", "64", "--num-classes", "1", "--checkpoint",
        tmp_path / "one.pth", "--data", files / "images.parquet", "--json", tmp_path / "out.json",
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert "vit_tiny_patch16_224 gives numbers, no classes: the labels are left aside" in " ".join(run.stderr.split())
    assert "var" in run.stdout
    assert "KL" not in run.stdout
    found = json.loads((tmp_path / "out.json").read_text())[1]
    assert found["difference"] > 0
    assert {found[name] for name in ("top1", "top5", "agreement", "kl")} == {None}


@pytest.mark.slow
def test_overridden_preprocessing_changes_the_result(command, files, tmp_path):
    kl = []
    for extra in (
        (),
        ("--image-size", "160"),
        ("--mean", "0.5", "--std", "0.5,0.5,0.5"),
        ("--crop-pct", "1.0"),
        ("--rows", "2:"),
    ):
        out = tmp_path / "out.json"
        run = command(*COMMON, "--checkpoint", files / "weights.pth", "--data", files / "images", "--json", out, *extra)
        assert run.returncode == 0, run.stderr
        kl.append(json.loads(out.read_text())[1]["kl"])
    assert len(set(kl)) == 5


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--model", "deit_tny_patch16_224", "--data", "images"), 1, "did you mean deit_tiny_patch16_224"),
        (("--model", "nothing_like_it", "--data", "images"), 1, "timm has no model named 'nothing_like_it'"),
        (
            ("--model", "resnet18", "--checkpoint", "resnet.pth", "--data", "images"),
            1,
            "nothing to patch in timm.models.resnet.ResNet",
        ),
        (("--checkpoint", "missing.pth", "--data", "images"), 1, "missing.pth: no such file"),
        (("--checkpoint", "images.parquet", "--data", "images"), 1, "images.parquet is damaged, or no file of weights"),
        (("--num-classes", "5", "--checkpoint", "weights.pth", "--data", "images"), 1, "doesn't fit"),
        (("--checkpoint", "weights.pth", "--data", "nowhere"), 1, "nowhere: no such file or folder"),
        (("--checkpoint", "weights.pth", "--data", "empty"), 1, "one subfolder with images per class"),
        (("--checkpoint", "weights.pth", "--data", "other.parquet"), 1, r"found the columns ['picture']"),
        (("--checkpoint", "weights.pth", "--data", "weights.pth"), 1, "weights.pth is a file, and no parquet"),
        (("--checkpoint", "weights.pth", "--data", "images", "--keep-ratio", "2"), 2, "keep_ratio=2.0"),
        (("--checkpoint", "weights.pth", "--data", "images", "--keep-ratio", "half"), 2, "expected a number"),
        (("--checkpoint", "weights.pth", "--data", "images", "--selection", "token"), 2, "selection='token'"),
        (("--data", "images"), 1, "Without network give a file with --checkpoint"),
        (
            ("--checkpoint", "weights.pth", "--data", "images", "--rows", "6:"),
            1,
            "--rows 6:: none of the images, which are 6",
        ),
        (
            ("--checkpoint", "weights.pth", "--data", "words.parquet"),
            1,
            "words.parquet row 0 has the label 'cat' (str)",
        ),
        (
            ("--checkpoint", "weights.pth", "--data", "many.parquet"),
            1,
            "many.parquet row 0 has the label 472: expected 0 to 2, as the model has 3 classes",
        ),
        (("--checkpoint", "weights.pth", "--data", "nowhere[old]/a[/b]"), 1, "nowhere[old]/a[/b]: no such file"),
        (("--checkpoint", "weights.pth", "--data", "images", "--stages", "x"), 2, "'x': expected whole numbers"),
        (("--checkpoint", "weights.pth", "--data", "images", "--rows", "a:b"), 2, "'a:b': expected whole numbers"),
        (
            ("--checkpoint", "weights.pth", "--data", "images", "--mean", "1,2"),
            2,
            "'1,2': expected one number or three",
        ),
        (
            ("--checkpoint", "weights.pth", "--data", "images", "--image-size", "8"),
            2,
            "deit_tiny_patch16_224 can't be made for images of 8 px",
        ),
        (("--data", "images", "--crop-pct", "0"), 2, "--crop-pct 0.0: expected a share in (0, 1]"),
        (("--data", "images", "--crop-pct", "3"), 2, "--crop-pct 3.0: expected a share in (0, 1]"),
        (("--checkpoint", "weights.pth", "--data", "images", "--json", "no/out.json"), 1, "no: no such folder"),
        (
            ("--model", "deit_tiny_patch16_224.none", "--checkpoint", "weights.pth", "--data", "images"),
            1,
            "doesn't fit",
        ),
        (
            ("--model", "levit_128s", "--checkpoint", "levit.pth", "--data", "images", "--image-size", "256"),
            2,
            "the weights of levit_128s are for images of 224 px only",
        ),
        (("--bogus",), 2, "No such option"),
    ],
)
def test_bad_usage_is_one_message(command, files, arguments, code, message, monkeypatch):
    if "resnet18" in arguments:
        torch.save(timm.create_model("resnet18", num_classes=3).state_dict(), files / "resnet.pth")
    if "levit.pth" in arguments:
        torch.save(timm.create_model("levit_128s", num_classes=3).state_dict(), files / "levit.pth")
    monkeypatch.chdir(files)
    defaults = [] if "--model" in arguments else ["--model", "deit_tiny_patch16_224"]
    classes = [] if "--num-classes" in arguments else ["--num-classes", "3"]
    run = command("evaluate", *defaults, *classes, *arguments)
    run.assert_refused(code, message)
    assert "--no-pretrained" not in run.stderr, "evaluate has no such option"
    assert ".." not in run.stderr.replace("...", "")


def test_another_number_of_classes_is_hinted_at(command, files, tmp_path):
    data = {"two": ("class0", "class1"), "three": ("class0", "class1", "class2")}
    for name, classes in data.items():
        for own in classes:
            shutil.copytree(files / "images" / own, tmp_path / name / own)
        run = command(*COMMON, "--checkpoint", files / "weights.pth", "--image-size", "64", "--data", tmp_path / name)
        assert run.returncode == 0, run.stderr
        said = f"{tmp_path / name} names 2 classes and deit_tiny_patch16_224 has 3"
        assert (said in unboxed(run.stderr)) is (name == "two")


@pytest.mark.parametrize("model", ["google/vit-base-patch16-224", "deit_tiny_patch16_224"])
def test_an_unreachable_hub_is_one_message_at_once(command, files, model, monkeypatch):
    import socket

    asked = []

    def unknown(host, *args, **kwargs):
        asked.append(host)
        raise socket.gaierror("Name or service not known")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    run = command("evaluate", "--model", model, "--data", files / "images")
    assert run.returncode == 1
    assert "Traceback" not in run.stderr
    assert "Retrying" not in run.stderr
    assert model in run.stderr
    assert len(asked) == 1
    assert huggingface_hub.constants.HF_HUB_OFFLINE is False


def test_module_and_its_help():
    run = subprocess.run([sys.executable, "-m", "evopatch", "--help"], capture_output=True, text=True)
    assert run.returncode == 0
    assert "Usage" in run.stdout


@pytest.mark.parametrize("name", [(), *((name,) for name in COMMANDS)])
def test_help(command, name):
    run = command(*name, "--help")
    assert run.returncode == 0
    usage = run.stdout.split("Options")[0].split("Usage:")[1]
    assert " ".join(["evopatch", *name]) in usage


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nopackage", "-m nopackage: no such module"),
        ("nopackage.part", "-m nopackage.part: no such module"),
        ("xml", "-m xml: no such module, or a package without __main__"),
    ],
)
def test_a_module_that_cannot_be_run(command, name, message, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    command("run", "-m", name).assert_refused(2, message)


def test_an_interrupted_embedding_says_how_to_go_on(command, files, tmp_path, monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("evopatch.embedding.writing.embed", interrupted)
    common = ("--model", "deit_tiny_patch16_224", "--num-classes", "3", "--checkpoint", files / "weights.pth")
    run = command("embed", *common, "--data", files / "images", "--out", tmp_path / "out.parquet")
    run.assert_refused(130, f"kept in {tmp_path / 'out.parquet'}.shards, the same command goes on")


@pytest.mark.slow
def test_demo_runs_and_draws(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "TIMED_BATCH", 4)
    out = tmp_path / "selection.png"
    with console.capture() as captured:
        demo.run(out, epochs=1)
    text = captured.get()
    for word in ("(unpatched)", "matched", "single", "none", "0.7", "0.5", "0.3", "x"):
        assert word in text
    with Image.open(out) as picture:
        assert picture.width > 400
        assert len(picture.convert("RGB").resize((64, 64)).getcolors(4096)) > 20
