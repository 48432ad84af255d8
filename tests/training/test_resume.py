"""Runs that are killed, interrupted, damaged or distributed, as real processes."""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import evopatch
from evopatch.training import checkpoints

SCRIPT = Path(__file__).parents[1] / "training_script.py"
EVERYTHING = {
    "epochs": 6,
    "batch_size": 4,
    "accumulation_steps": 2,
    "learning_rate": 1e-3,
    "warmup_epochs": 1,
    "mixup": 0.5,
    "ema_decay": 0.9,
    "layer_to_stage": True,
    "keep_ratio_warmup_epochs": 2,
    "checkpoint_every": 4,
}
STEPS = 6 * 6


def command(folder, weights, config=EVERYTHING, **changed):
    return [sys.executable, str(SCRIPT), "--output", str(folder), "--weights", str(weights), "--config",
            json.dumps(config | changed)]  # fmt: skip


def start(*arguments, **changed):
    return subprocess.Popen(command(*arguments, **changed), stderr=subprocess.PIPE, text=True)


def finish(process):
    _, errors = process.communicate(timeout=300)
    return process.returncode, errors


def wait_for(process, folder, steps):
    """Until the run has checkpoints of so many steps, or is done."""
    deadline = time.monotonic() + 240
    while process.poll() is None and max(checkpoints.steps(folder), default=0) < steps:
        assert time.monotonic() < deadline
        time.sleep(0.001)


def assert_equal(file, other):
    found, expected = (torch.load(path, weights_only=True) for path in (file, other))
    assert found["losses"] == expected["losses"]
    assert all(torch.equal(tensor, found["weights"][key]) for key, tensor in expected["weights"].items())


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The weights of a run that nothing happened to, and its folder."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    code, errors = finish(start(folder / "run", folder / "weights.pt"))
    assert code == 0, errors
    return folder


@pytest.mark.slow
def test_killed_at_random_steps(uninterrupted, tmp_path):
    folder, weights = tmp_path / "run", tmp_path / "weights.pt"
    random.seed()
    kills = []
    for low, high in ((1, 12), (13, 24), (25, 32)):
        process = start(folder, weights)
        wait_for(process, folder, random.randint(low, high))
        time.sleep(random.random() * 0.1)
        process.kill()
        finish(process)
        kills.append(checkpoints.steps(folder)[-1])
    assert kills[0] < STEPS, "nothing was killed"
    assert not weights.exists()
    code, errors = finish(start(folder, weights))
    assert code == 0, errors
    assert_equal(weights, uninterrupted / "weights.pt")
    events = [json.loads(line).get("event") for line in (folder / "log.jsonl").read_text().splitlines()]
    assert events.count("begin") == 1
    assert events.count("resumed") == 3
    assert len(checkpoints.steps(folder)) == 2
    assert not list((folder / checkpoints.FOLDER).glob("unfinished-*"))


@pytest.mark.slow
def test_other_seeds_end_elsewhere(uninterrupted, tmp_path):
    code, errors = finish(start(tmp_path / "run", tmp_path / "weights.pt", seed=1))
    assert code == 0, errors
    with pytest.raises(AssertionError):
        assert_equal(tmp_path / "weights.pt", uninterrupted / "weights.pt")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_between_checkpoints(number, uninterrupted, tmp_path):
    folder, weights = tmp_path / "run", tmp_path / "weights.pt"
    process = start(folder, weights, checkpoint_every=1000)
    deadline = time.monotonic() + 240
    while not (folder / "log.jsonl").exists() or '"loss"' not in (folder / "log.jsonl").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.001)
    process.send_signal(number)
    code, errors = finish(process)
    assert code != 0
    (step,) = checkpoints.steps(folder)
    assert 10 <= step < STEPS
    assert f"stopped after step {step} of {STEPS}; everything up to there is saved in {folder}" in errors
    code, errors = finish(start(folder, weights))
    assert code == 0, errors
    assert_equal(weights, uninterrupted / "weights.pt")


def truncate(path):
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)


def newest(folder):
    return folder / checkpoints.FOLDER / f"step-{checkpoints.steps(folder)[-1]:09d}"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.bin", "manifest.json"])
def test_a_truncated_checkpoint_gives_way_to_the_one_before(name, uninterrupted, tmp_path):
    folder, weights = tmp_path / "run", tmp_path / "weights.pt"
    subprocess.run(["cp", "-r", uninterrupted / "run", folder], check=True)
    damaged = newest(folder)
    truncate(damaged / name)
    code, errors = finish(start(folder, weights))
    assert code == 0, errors
    assert f"the checkpoint {damaged} is damaged: " in errors
    assert name in errors
    assert "is used instead" in errors
    assert_equal(weights, uninterrupted / "weights.pt")


@pytest.mark.slow
def test_no_whole_checkpoint(uninterrupted, tmp_path):
    folder = tmp_path / "run"
    subprocess.run(["cp", "-r", uninterrupted / "run", folder], check=True)
    for step in checkpoints.steps(folder):
        (folder / checkpoints.FOLDER / f"step-{step:09d}" / "optimizer.bin").unlink()
    with pytest.raises(evopatch.CheckpointError, match=r"no checkpoint in .* is whole: .*optimizer.bin is missing"):
        checkpoints.latest(folder)


@pytest.mark.slow
def test_other_settings_are_refused(uninterrupted, tmp_path):
    code, errors = finish(start(uninterrupted / "run", tmp_path / "weights.pt", learning_rate=0.5))
    assert code != 0
    assert "is of a run with other settings: learning_rate was 0.001 and is 0.5 now" in errors
    assert "Error(s) in loading" not in errors


@pytest.mark.slow
def test_with_workers_from_the_middle_of_an_epoch(uninterrupted, tmp_path):
    folder, weights = tmp_path / "run", tmp_path / "weights.pt"
    subprocess.run(["cp", "-r", uninterrupted / "run", folder], check=True)
    subprocess.run(["rm", "-r", newest(folder)], check=True)
    assert checkpoints.steps(folder)[-1] % 6, "at the end of an epoch"
    code, errors = finish(start(folder, weights, workers=2))
    assert code == 0, errors
    assert_equal(weights, uninterrupted / "weights.pt")


class SavesItself:
    """What `checkpoints.write` needs of an accelerator."""

    is_main_process = True

    def wait_for_everyone(self):
        pass

    def save_state(self, folder):
        Path(folder, "state").write_text("saved")


def test_pruning_keeps_what_a_run_goes_on_from(tmp_path):
    for step in (28, 32, 36):
        checkpoints.write(tmp_path, step, SavesItself(), {}, keep=3)
    for step in (32, 36):
        truncate(tmp_path / checkpoints.FOLDER / f"step-{step:09d}" / "state")
    (tmp_path / checkpoints.FOLDER / "unfinished-000000040").mkdir()
    with pytest.warns(UserWarning, match="is damaged"):
        assert checkpoints.latest(tmp_path).name == "step-000000028"
    checkpoints.write(tmp_path, 30, SavesItself(), {"a": 1}, keep=2)
    assert checkpoints.steps(tmp_path) == [28, 30]
    assert checkpoints.settings_of(checkpoints.latest(tmp_path)) == {"a": 1}
    assert not list((tmp_path / checkpoints.FOLDER).glob("unfinished-*"))


@pytest.mark.slow
def test_two_processes_are_one_with_twice_the_batch(tmp_path):
    config = {"epochs": 3, "learning_rate": 1e-4, "warmup_epochs": 0}
    one, two = tmp_path / "one.pt", tmp_path / "two.pt"
    script = [str(SCRIPT), "--no-dropout"]
    subprocess.run(
        [sys.executable, *script, "--weights", one, "--config", json.dumps(config | {"batch_size": 8})], check=True
    )
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    other = ["--weights", two, "--config", json.dumps(config | {"batch_size": 4})]
    run = subprocess.run([sys.executable, *launch, *script, *other], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    found, expected = (torch.load(path, weights_only=True) for path in (two, one))
    assert (found["processes"], expected["processes"]) == (2, 1)
    assert found["losses"] == pytest.approx(expected["losses"], abs=1e-5)
    for key, tensor in expected["weights"].items():
        torch.testing.assert_close(found["weights"][key], tensor, rtol=0, atol=1e-5)
