"""`evopatch finetune`, as a user runs it."""

import json
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import timm
import torch
from safetensors.torch import load_file
from samples import encoded
from terminal import unboxed
from transformers import ViTImageProcessor
from variants import build

from evopatch import CheckpointError, EvoConfig, config_of, load_pretrained
from evopatch.cli import settings_file
from evopatch.cli.options import read_toml

SMALL = ("--model", "vit_tiny_patch16_224", "--no-pretrained", "--image-size", "32")


@pytest.fixture
def run_in(command, tmp_path, monkeypatch):
    """The command, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments, code=0):
        result = command("finetune", *arguments)
        assert result.returncode == code, result.stderr
        assert "Traceback" not in result.stderr
        return result

    return run


@pytest.mark.slow
def test_digits_is_what_works_without_network(run_in, tmp_path):
    run = run_in(*SMALL, "--epochs", "1", "--rows", ":256", "--eval-rows", ":64", "--keep-ratio", "0.6,0.3")
    folder = tmp_path / "evopatch-finetune-vit_tiny_patch16_224"
    for word in ("unpatched", "patched, before", "patched, trained", "images/s", "top-1", "one training step is"):
        assert word in unboxed(run.stdout)
    assert "digits has 10 classes: vit_tiny_patch16_224 gets a new head in place of the one for 1000" in unboxed(
        run.stderr
    )
    model = load_pretrained(folder / "model")
    assert config_of(model) == EvoConfig(keep_ratio=(0.6, 0.3))
    assert model.num_classes == 10
    assert json.loads((folder / "result.json").read_text())["steps"] == 4
    again = run_in(*SMALL, "--epochs", "1", code=1)
    assert "give --resume" in unboxed(again.stderr)


@pytest.mark.slow
def test_settings_from_a_file_and_back(run_in, tmp_path):
    settings = {
        "model": "vit_tiny_patch16_224", "pretrained": False, "image_size": 32, "epochs": 1, "rows": ":64",
        "eval_rows": ":32", "keep_ratio": [0.6, 0.3], "batch_size": 32, "learning_rate": 1e-3, "output": "first",
    }  # fmt: skip
    (tmp_path / "settings.toml").write_text("\n".join(f"{k} = {json.dumps(v)}" for k, v in settings.items()))
    run_in("--config", "settings.toml", "--seed", "5", "--batch-size", "16")
    saved = read_toml(tmp_path / "first" / "config.toml")
    assert saved["batch_size"] == 16, "the command line wins"
    assert saved["seed"] == 5
    assert saved["learning_rate"] == 1e-3
    run_in("--config", "first/config.toml", "--output", "second")
    first, second = (load_pretrained(tmp_path / name / "model").state_dict() for name in ("first", "second"))
    assert all(torch.equal(tensor, second[key]) for key, tensor in first.items())


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for i in range(8):
        (folder / "photos" / f"{i}.jpg").parent.mkdir(exist_ok=True)
        (folder / "photos" / f"{i}.jpg").write_bytes(encoded(i))
    torch.manual_seed(0)
    torch.save(timm.create_model("vit_tiny_patch16_224", num_classes=3).state_dict(), folder / "weights.pth")
    return folder


@pytest.mark.slow
def test_without_labels_the_model_teaches_itself(run_in, photos, tmp_path):
    common = ("--model", "vit_tiny_patch16_224", "--checkpoint", photos / "weights.pth", "--num-classes", "3")
    common += ("--data", photos / "photos", "--epochs", "1", "--batch-size", "4")
    run = run_in(*common, "--eval-data", photos / "photos", "--output", "run", "--paper")
    rows = [line for line in run.stdout.splitlines() if line.startswith("│") and "patched" in line]
    assert len(rows) == 3
    line = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[1])
    assert line["distillation_loss"] > 0
    run = run_in(*common, "--output", "other")
    assert "nothing was evaluated: give --eval-data" in unboxed(run.stdout)


def test_a_regression_teaches_itself(run_in, photos, tmp_path):
    torch.save(timm.create_model("vit_tiny_patch16_224", num_classes=1).state_dict(), tmp_path / "one.pth")
    run = run_in(
        "--model", "vit_tiny_patch16_224", "--checkpoint", tmp_path / "one.pth", "--num-classes", "1", "--image-size",
        "64", "--data", photos / "photos", "--eval-data", photos / "photos", "--epochs", "1", "--batch-size", "4",
    )  # fmt: skip
    assert "var" in run.stdout
    assert "KL" not in run.stdout
    (folder,) = (path for path in tmp_path.iterdir() if path.is_dir())
    assert json.loads((folder / "result.json").read_text())["after"]["difference"] > 0


def test_a_teacher_sees_pixels_as_it_was_trained_to():
    from evopatch.sources.models import Renormalised, open_classifier

    torch.manual_seed(0)
    teacher = open_classifier("vit_tiny_patch16_224", pretrained=False)
    pixels = torch.rand(2, 3, 224, 224)
    mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    with torch.no_grad():
        expected = teacher.model((pixels - 0.5) / 0.5)  # this model's own normalisation
        student_sees = (pixels - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1)
        torch.testing.assert_close(Renormalised(teacher, mean, std)(student_sees), expected, rtol=1e-4, atol=1e-4)
        assert (teacher.model(student_sees) - expected).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--model", "vit_tny_patch16_224"), 1, "did you mean vit_tiny_patch16_224"),
        (("--model", "vit_tiny_patch16_224"), 1, "--checkpoint"),
        (("--model", "vit_tiny_patch16_224"), 1, "--data digits"),
        ((*SMALL, "--no-labels"), 2, "a model with random weights can't teach itself"),
        ((*SMALL, "--objective", "distillation"), 2, "a model with random weights can't teach itself"),
        ((*SMALL, "--trainable", "norms"), 2, "would leave random weights as they are"),
        ((*SMALL, "--epochs", "0"), 2, "epochs=0: expected a whole number"),
        ((*SMALL, "--epochs", "many"), 2, "unable to parse string as an integer"),
        ((*SMALL, "--objective", "best"), 2, "objective='best': expected one of 'auto', 'labels', 'distillation'"),
        ((*SMALL, "--keep-ratio", "2"), 2, "keep_ratio=2.0"),
        ((*SMALL, "--scale", "1"), 2, "--scale 1: expected two shares"),
        ((*SMALL, "--auto-augment", "nonsense-x"), 2, "timm can't make a transform of it"),
        ((*SMALL, "--data", "nowhere"), 1, "nowhere: no such file or folder"),
        ((*SMALL, "--teacher-checkpoint", "x.pth"), 2, "--teacher-checkpoint without --teacher"),
        ((*SMALL, "--config", "missing.toml"), 2, "missing.toml can't be read as TOML"),
        ((*SMALL, "--config", "unknown.toml"), 2, "has the unknown settings lr; known are"),
        ((*SMALL, "--config", "wrong.toml"), 2, "unable to parse string as an integer"),
        (("--epochs", "1"), 2, "Missing option '--model'"),
        ((*SMALL, "--data", "photos"), 2, "can't teach itself, and photos has no labels: give --teacher"),
        ((*SMALL, "--resume", "--output", "wrong"), 1, "--resume: wrong holds no run to go on with"),
        ((*SMALL, "--output", "unknown.toml"), 1, "--output unknown.toml is a file: expected a folder"),
        ((*SMALL, "--output", "old"), 1, "old holds the checkpoints of a run: give --resume to go on with it"),
        ((*SMALL, "--optimizer", "foo", "--output", "failed"), 2, "optimizer='foo'"),
        ((*SMALL, "--rows", "9000:"), 1, "--rows 9000:: none of the images, which are 1347, 0 to 1346"),
        ((*SMALL, "--eval-rows", "450:"), 1, "--eval-rows 450:: none of the images, which are 450"),
    ],
)
def test_bad_usage_is_one_message(arguments, code, message, run_in, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "0.jpg").write_bytes(encoded(0))
    (tmp_path / "old" / "checkpoints" / "step-000000001").mkdir(parents=True)
    (tmp_path / "unknown.toml").write_text("lr = 1")
    (tmp_path / "wrong.toml").write_text('epochs = "three"')
    assert message in unboxed(run_in(*arguments, code=code).stderr)
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"photos", "old"}


def test_a_run_that_was_killed_before_its_first_checkpoint_can_be_resumed(tmp_path):
    context = SimpleNamespace(params={"resume": True, "model": "x", "output": None})
    (tmp_path / settings_file.NAME).write_text('model = "x"')
    settings_file.check(tmp_path, context)
    with pytest.raises(CheckpointError, match="holds no run"):
        settings_file.check(tmp_path / "other", context)


def test_a_folder_that_a_run_wrote_to_stays_when_it_fails(tmp_path):
    context = SimpleNamespace(params={"resume": False, "model": "x", "output": None})

    def fail(name, written):
        with settings_file.saved(tmp_path / name, context):
            for file in written:
                (tmp_path / name / file).touch()
            raise KeyboardInterrupt

    for name, written in (("kept", ["log.jsonl"]), ("gone", [])):
        with pytest.raises(KeyboardInterrupt):
            fail(name, written)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_a_file_of_settings_for_evaluate(command, photos, tmp_path):
    (tmp_path / "settings.toml").write_text(
        f'model = "vit_tiny_patch16_224"\ncheckpoint = "{photos / "weights.pth"}"\nnum_classes = 3\n'
        f'data = "{photos / "photos"}"\nkeep_ratio = [0.7, "0.6,0.3"]\njson = "{tmp_path / "out.json"}"'
    )
    run = command("evaluate", "--config", tmp_path / "settings.toml")
    assert run.returncode == 0, run.stderr
    rows = json.loads((tmp_path / "out.json").read_text())
    assert [row["config"]["keep_ratio"] for row in rows[1:]] == [0.7, [0.6, 0.3]]
    assert rows[1]["top1"] is None
    assert rows[1]["kl"] > 0


@pytest.mark.slow
def test_interrupt_and_go_on(tmp_path):
    command = [sys.executable, "-m", "evopatch", "finetune"]
    options = [*SMALL, "--epochs", "12", "--rows", ":256", "--eval-rows", ":16", "--output", "run", "--log-every", "1"]
    process = subprocess.Popen([*command, *options], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    log = tmp_path / "run" / "log.jsonl"
    deadline = time.monotonic() + 240
    while not log.exists() or '"loss"' not in log.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "Traceback" not in errors
    assert "To go on: evopatch finetune --config run/config.toml --resume" in unboxed(errors)
    resumed = subprocess.run(
        [*command, "--config", "run/config.toml", "--resume", "--epochs", "11"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert resumed.returncode == 2
    assert "epochs was 12 and is 11 now" in unboxed(resumed.stderr)
    resumed = subprocess.run(
        [*command, "--config", "run/config.toml", "--resume"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert resumed.returncode == 0, resumed.stderr
    assert "48 steps" in unboxed(resumed.stdout)
    steps = [json.loads(line)["step"] for line in log.read_text().splitlines() if "loss" in json.loads(line)]
    assert steps == list(range(1, 49))


@pytest.mark.slow
def test_two_processes_are_one_run(tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "evopatch"]
    options = ["--epochs", "2", "--batch-size", "16", "--rows", ":128", "--eval-rows", ":16", "--output", "run"]
    run = subprocess.run(
        [*launch, "finetune", *SMALL, *options], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    events = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert events[0]["settings"]["processes"] == 2
    assert [line["step"] for line in events if line.get("event") == "end"] == [8]  # 128 images in batches of 2 x 16
    assert unboxed(run.stdout).count("patched, trained") == 1
    assert "destroy_process_group" not in run.stderr
    load_pretrained(tmp_path / "run" / "model")


def test_weights_in_half_precision_are_trained_in_full(command, tmp_path):
    photos = tmp_path / "photos"
    for name in ("a", "b"):
        (photos / name).mkdir(parents=True)
        for seed in range(4):
            (photos / name / f"{seed}.jpg").write_bytes(encoded(seed))
    model = build("hf_vit").bfloat16()
    model.save_pretrained(tmp_path / "model")
    ViTImageProcessor(size={"height": 40, "width": 40}).save_pretrained(tmp_path / "model")
    run = command(
        "finetune", "--model", tmp_path / "model", "--data", photos, "--epochs", "1", "--batch-size", "4", "--output",
        tmp_path / "run",
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    trained = load_file(tmp_path / "run" / "model" / "model.safetensors")
    norm = next(tensor for name, tensor in trained.items() if name.endswith("layernorm_before.weight"))
    assert norm.dtype == torch.float32
    assert (norm != 1).all(), "an update is less than a rounding error of bfloat16 at 1"
