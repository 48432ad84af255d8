"""The whole of `evopatch.calibrate`, on small random models."""

import json
from itertools import islice
from types import SimpleNamespace

import pytest
import torch
from comparing import Snapshot
from matrix import cases
from rich.console import Console
from torch.utils.data import DataLoader, TensorDataset
from variants import build, call, images_for

import evopatch
from evopatch import ConfigError, DataError, EvoConfig, UnsupportedModelError
from evopatch.calibration.batches import images_of
from evopatch.calibration.judge import Judge
from evopatch.calibration.schedule import Schedule
from evopatch.calibration.search import Record
from evopatch.forward.learned import correction_of
from evopatch.patching.correcting import runs_of
from evopatch.patching.fitting import blocks_of
from evopatch.patching.handle import Patched
from evopatch.patching.learning import learned

QUICK = {"budget": 600.0, "batch_size": 8, "progress": False}


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    """A short search: some neighbours of one size, and few points of the curve."""
    neighbours = Schedule.neighbours
    monkeypatch.setattr("evopatch.calibration.search.STEPS", (0.6,))
    monkeypatch.setattr("evopatch.calibration.calibrating._AROUND", (0.1,))
    monkeypatch.setattr(Schedule, "neighbours", lambda *args, **kwargs: islice(neighbours(*args, **kwargs), 0, None, 3))


def deterministic(result):
    values = result.to_dict()
    for point in (values["before"], values["after"], *values["curve"]):
        del point["speed_up"]
    del values["seconds"]
    return values


@cases("name", ["vit", "hf_vit", "levit", "swin", "hf_dinov2_swiglu", "hf_dinov2_backbone"], fast=["vit", "swin"])
def test_the_model_is_left_with_what_was_found(name, tmp_path):
    target = 0.9 if name == "levit" else 0.7
    model, x = build(name), images_for(name, 24)
    result = evopatch.calibrate(model, x, target_flops=target, output=tmp_path, **QUICK)
    assert result.reached
    assert target - 0.02 < result.after.flops <= target
    assert result.before.flops <= target
    assert evopatch.config_of(model) == result.after.config
    assert result.searched == result.reported == 12
    assert result.outputs == ("features" if "dinov2" in name else "classes")
    assert result.outputs == "classes" or not result.foresight  # these give features of patches
    assert result.foresight == bool([path for path in learned(model) if "|" not in path])
    patched = Patched(model)
    state, blocks = patched.host.state, blocks_of(patched, patched.host)
    runs = [(first, last) for first, last in runs_of(state.plans) if correction_of(blocks[last], first) is not None]
    assert list(result.corrected) == runs
    # What it says of the images to report on is what the model does now.
    judge = Judge(Patched(model).original(), x[1::2].split(8), Patched(model).host.state.spec.prefix)
    own = judge.all_errors(model)
    assert float(own.error.mean()) == pytest.approx(result.after.error, rel=1e-3, abs=1e-6)
    assert result.tried == len(json.loads((tmp_path / "search.json").read_text())["errors"]) >= 5
    result.save(tmp_path)
    assert json.loads((tmp_path / "calibration.json").read_text())["after"]["flops"] == result.after.flops
    assert (tmp_path / "calibration.png").stat().st_size > 5000


@pytest.mark.slow
def test_the_search_finds_what_is_better():
    model = build("vit")
    result = evopatch.calibrate(model, images_for("vit", 64), target_flops=0.6, **QUICK)
    assert result.after.error < result.before.error


def test_repeated_and_resumed_runs_find_the_same(tmp_path, monkeypatch, capsys):
    images = images_for("vit", 16)
    first = evopatch.calibrate(build("vit"), images, target_flops=0.7, output=tmp_path / "a", **QUICK)
    put, times = Record.put, []

    def interrupted(record, key, errors):
        put(record, key, errors)
        times.append(key)
        if len(times) == 4:
            raise KeyboardInterrupt

    model = build("vit")
    before = Snapshot(model)
    monkeypatch.setattr(Record, "put", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evopatch.calibrate(model, images, target_flops=0.7, output=tmp_path / "b", **QUICK)
    before.assert_untouched(model)
    assert len(json.loads((tmp_path / "b" / "search.json").read_text())["errors"]) == 4
    second = evopatch.calibrate(model, images, target_flops=0.7, output=tmp_path / "b", **QUICK)
    assert not set(times[:4]) & set(times[4:])  # nothing is tried twice
    assert deterministic(second) == deterministic(first)
    # Another search in the same folder begins anew.
    capsys.readouterr()
    evopatch.calibrate(build("vit"), images, target_flops=0.75, output=tmp_path / "b", **QUICK)
    assert "is of a search with another target: it begins anew" in " ".join(capsys.readouterr().err.split())
    for damaged in ("{", '{"search": {}, "errors": null}'):
        (tmp_path / "b" / "search.json").write_text(damaged)
        with pytest.raises(evopatch.CheckpointError, match="damaged"):
            evopatch.calibrate(build("vit"), images, target_flops=0.7, output=tmp_path / "b", **QUICK)
    with pytest.raises(evopatch.CheckpointError, match="is a file: expected a folder for what was tried"):
        evopatch.calibrate(build("vit"), images, target_flops=0.7, output=tmp_path / "b" / "search.json", **QUICK)


def recorded(folder):
    return json.loads((folder / "search.json").read_text())["errors"]


def test_a_search_of_another_model_begins_anew(tmp_path, capsys):
    """Also of the same architecture, after one weight was trained; and of the same images in another order."""
    images = images_for("vit", 16)
    given = {"target_flops": 0.7, "output": tmp_path, **QUICK, "budget": 1e-9}
    evopatch.calibrate(build("vit"), images, **given)
    first = recorded(tmp_path)
    assert "anew" not in capsys.readouterr().err
    model = build("vit")
    model.blocks[2].mlp.fc1.weight.data[3, 5] *= 1.5
    for other, now in (("weights", images), ("images", images.flip(0))):
        evopatch.calibrate(model, now, **given)
        text = f"is of a search with another {other} and another outputs: it begins anew"
        assert text in " ".join(capsys.readouterr().err.split())
        assert recorded(tmp_path) != first
        evopatch.remove(model)


@pytest.mark.parametrize("changed", [{"problem_type": "multi_label_classification"}, {"hidden_act": "relu"}])
def test_a_search_of_a_model_that_computes_otherwise_begins_anew(changed, tmp_path, capsys):
    """With the same weights."""
    given = {"target_flops": 0.7, "output": tmp_path, **QUICK, "budget": 1e-9}
    evopatch.calibrate(build("hf_vit"), images_for("hf_vit", 16), **given)
    first = recorded(tmp_path)
    evopatch.calibrate(build("hf_vit", **changed), images_for("hf_vit", 16), **given)
    text = "is of a search with another outputs: it begins anew"
    assert text in " ".join(capsys.readouterr().err.split())
    assert recorded(tmp_path) != first


def test_a_search_of_another_version_or_batch_size_begins_anew(tmp_path, capsys, monkeypatch):
    images = images_for("vit", 16)
    given = {"target_flops": 0.7, "output": tmp_path, **QUICK, "budget": 1e-9}
    evopatch.calibrate(build("vit"), images, **given)
    evopatch.calibrate(build("vit"), images, **given)
    assert "anew" not in capsys.readouterr().err
    evopatch.calibrate(build("vit"), images, **given | {"batch_size": 4})
    assert "is of a search with another batch size and another outputs: it begins" in " ".join(
        capsys.readouterr().err.split()
    )
    monkeypatch.setattr("evopatch.calibration.search.VERSION", "0.0.0")
    evopatch.calibrate(build("vit"), images, **given | {"batch_size": 4})
    text = "is of a search with another version of evopatch: it begins anew"
    assert text in " ".join(capsys.readouterr().err.split())


@pytest.mark.slow
def test_losses_as_targets():
    images = images_for("vit", 32)
    result = evopatch.calibrate(build("vit"), images, target_kl=0.002, **QUICK)
    assert result.after.error < 0.01
    strict = evopatch.calibrate(build("vit"), images, target_kl=0.0005, **QUICK)
    assert strict.after.flops > result.after.flops
    result = evopatch.calibrate(build("vit"), images, target_agreement=0.9, **QUICK)
    assert result.after.agreement >= 0.7
    assert result.reached == (result.after.agreement >= 0.9)


@pytest.mark.parametrize(
    ("name", "settings", "outputs"),
    [("vit", {"num_classes": 1}, "numbers"), ("hf_vit", {"problem_type": "multi_label_classification"}, "labels")],
)
def test_outputs_that_are_no_classes(name, settings, outputs):
    """A softmax over one logit is always 1: by KL of classes nothing would be lost at any FLOPs."""
    x, short = images_for(name, 16), QUICK | {"budget": 0.1}
    strict = evopatch.calibrate(build(name, **settings), x, target_kl=1e-6, **short)
    assert strict.after.flops > 0.9
    model = build(name, **settings)
    result = evopatch.calibrate(model, x, target_flops=0.7, **short)
    assert strict.outputs == result.outputs == outputs
    assert result.after.error > 1e-4
    assert result.after.agreement is None
    with pytest.raises(ConfigError, match="target_agreement was given, and the model predicts no class"):
        evopatch.calibrate(model, x, target_agreement=0.9, **QUICK)


@pytest.mark.slow
def test_a_speed_up_as_target(monkeypatch):
    """The clock is a formula here, as a real one says another thing each time."""

    def speed_up(trials, config, rounds=5):
        return 1.0 / (0.1 + 0.9 * trials.flops(config))

    monkeypatch.setattr("evopatch.calibration.trials.Trials.speed_up", speed_up)
    result = evopatch.calibrate(build("vit"), images_for("vit", 16), target_speedup=1.3, **QUICK)
    assert result.reached
    assert 1.29 <= result.after.speed_up <= 1.35
    beyond = evopatch.calibrate(build("vit"), images_for("vit", 16), target_speedup=8.0, **QUICK)
    assert not beyond.reached
    assert beyond.after.flops < result.after.flops


def test_images_in_every_form():
    images, labels = images_for("vit", 16), torch.zeros(16).long()
    forms = (
        images,
        TensorDataset(images, labels),
        DataLoader(TensorDataset(images, labels), batch_size=5),
        [{"pixel_values": image, "labels": 0} for image in images],
        iter([images[:9], images[9:]]),
    )
    for given in forms:
        assert torch.equal(images_of(given, images.device, torch.float32), images)
    loader = DataLoader(TensorDataset(images, labels), batch_size=5)
    result = evopatch.calibrate(build("vit"), loader, target_flops=0.7, **QUICK)
    expected = evopatch.calibrate(build("vit"), images, target_flops=0.7, **QUICK)
    assert deterministic(result) == deterministic(expected)


@pytest.mark.parametrize("terminal", [False, True])
def test_a_budget_without_a_bound(terminal, monkeypatch, capsys):
    monkeypatch.setattr("evopatch.progress.errors", Console(stderr=True, force_terminal=terminal))
    monkeypatch.setattr("evopatch.progress.SECONDS_BETWEEN_LINES", 0.0)
    given = {"target_flops": 0.7, "batch_size": 8, "budget": float("inf")}
    result = evopatch.calibrate(build("vit"), images_for("vit", 16), **given)
    assert result.tried > 3
    assert "settings tried" in capsys.readouterr().err


def test_fewer_images_than_a_batch_are_timed_as_one(monkeypatch):
    timed = []

    def speed(model, batch, rounds):
        timed.append(batch)
        return SimpleNamespace(ratio=1.5)

    monkeypatch.setattr("evopatch.calibration.trials.compare_speed", speed)
    x = images_for("vit", 9)
    result = evopatch.calibrate(build("vit"), x, target_flops=0.7, **QUICK | {"batch_size": 20, "budget": 1e-9})
    assert result.batch_size == 20
    assert all(torch.equal(batch, torch.cat([x, x, x[:2]])) for batch in timed)
    assert timed


def test_unreadable_images_are_named(capsys):
    images = images_for("vit", 200)

    class Some(torch.utils.data.Dataset):
        def __init__(self, broken):
            self.broken = broken

        def __len__(self):
            return len(images)

        def __getitem__(self, index):
            if index in self.broken:
                raise OSError(f"{index}.jpg is truncated")
            return images[index]

    found = images_of(Some({7}), images.device, torch.float32)
    assert torch.equal(found, torch.cat([images[:7], images[8:]]))
    assert "1 unreadable image(s) left out: item 7 (7.jpg is truncated)" in " ".join(capsys.readouterr().err.split())
    with pytest.raises(DataError, match="3 of 200 calibration images can't be read"):
        images_of(Some({7, 8, 9}), images.device, torch.float32)


def test_a_patched_model_begins_with_its_own_settings():
    config = EvoConfig(stages=(2, 3, 4), keep_ratio=(0.8, 0.6, 0.5), importance=0.1)
    model = evopatch.apply(build("vit"), config=config)
    result = evopatch.calibrate(model, images_for("vit", 16), target_flops=0.75, budget=1e-9, progress=False)
    assert result.after.config.stages == (2, 3, 4)
    assert result.tried == 1
    with torch.no_grad():
        assert not torch.equal(call(model, images_for("vit")), call(build("vit"), images_for("vit")))


@pytest.mark.parametrize(
    ("images", "kwargs", "error", "message"),
    [
        (7, {}, DataError, "7 image.* at least 8"),
        ("nan", {}, DataError, "finite"),
        ("ints", {}, DataError, "torch.int64"),
        ("sizes", {}, DataError, r"is \(8, 3, 40, 40\) .*: expected"),
        ("number", {}, DataError, "images are int"),
        (16, {"target_kl": 0.1}, ConfigError, "target_flops and target_kl given"),
        (16, {"target_flops": 1.5}, ConfigError, "target_flops=1.5"),
        (16, {"target_flops": 0.05}, ConfigError, r"0.050 of the FLOPs can't be reached"),
        (16, {"budget": 0}, ConfigError, "budget=0"),
        (16, {"budget": "300"}, ConfigError, "budget='300': expected seconds"),
        (16, {"budget": None}, ConfigError, "budget=None: expected seconds"),
        (16, {"budget": float("nan")}, ConfigError, "budget=nan: expected seconds"),
        (16, {"batch_size": 0}, ConfigError, "batch_size=0"),
        (16, {"batch_size": True}, ConfigError, "batch_size=True: expected a whole number"),
        (16, {"config": EvoConfig(keep_ratio=1.0)}, ConfigError, "keep all tokens"),
    ],
)
@pytest.mark.parametrize("patched", [False, True])
def test_bad_input_leaves_the_model_as_it_was(images, kwargs, error, message, patched):
    model, x = build("vit"), images_for("vit", 16)
    given = {
        "nan": x * float("nan"),
        "ints": torch.ones(16, 3, 8, 8).long(),
        "sizes": [x[:8], x[8:, :, :32]],
        "number": 3,
    }
    if patched:
        evopatch.apply(model, images=x)
    before, own = Snapshot(model), learned(model)
    config = evopatch.config_of(model) if patched else None
    data = given[images] if isinstance(images, str) else x[:images]
    with pytest.raises(error, match=message):
        evopatch.calibrate(model, data, **({"target_flops": 0.7, **QUICK} | kwargs))
    if patched:
        assert evopatch.config_of(model) == config
        assert learned(model).keys() == own.keys()
        assert all(torch.equal(learned(model)[name], tensor) for name, tensor in own.items())
    else:
        before.assert_untouched(model)


def test_a_model_that_cannot_be_patched():
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3))
    with pytest.raises(UnsupportedModelError, match="nothing to patch"):
        evopatch.calibrate(model, images_for("vit", 16), target_flops=0.7, **QUICK)


def test_worse_settings_are_given_up_early(monkeypatch):
    seen = []
    errors = Judge.errors

    def counted(judge, model):
        count = 0
        for batch in errors(judge, model):
            count += len(batch.error)
            yield batch
        seen.append(count)

    monkeypatch.setattr(Judge, "errors", counted)
    lengths = []
    put = Record.put
    monkeypatch.setattr(Record, "put", lambda record, key, own: (lengths.append(len(own)), put(record, key, own)))
    evopatch.calibrate(build("vit"), images_for("vit", 128), target_flops=0.6, **QUICK)
    assert max(lengths) == 64
    assert min(lengths) < 64
