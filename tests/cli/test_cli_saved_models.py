"""Options on a model that `save_pretrained` wrote: what is given changes its fields, all else stays as it was saved."""

import json

import pytest
import timm
import torch
from terminal import unboxed

import evopatch
from evopatch import EvoConfig
from evopatch.cli.patch_options import Asked, patch
from evopatch.forward.learned import give_correction
from evopatch.patching.correcting import fit_correction, runs_of
from evopatch.patching.fitting import blocks_of
from evopatch.patching.handle import Patched
from evopatch.patching.learning import learned

SAVED = EvoConfig(keep_ratio=(0.7, 0.4), stages=(2, 4), importance=0.3)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with a model that has settings of its own, foresight, and a correction of the first run."""
    torch.manual_seed(0)
    images = torch.randn(16, 3, 160, 160)
    model = evopatch.apply(timm.create_model("test_vit").eval(), config=SAVED, images=images)
    patched = Patched(model)
    first, last = runs_of(patched.host.state.plans)[0]
    give_correction(blocks_of(patched, patched.host)[last], first, fit_correction(model, images, first, last))
    folder = tmp_path_factory.mktemp("saved") / "model"
    evopatch.save_pretrained(model, folder)
    return folder


def settings(command, saved, tmp_path, *options):
    out = tmp_path / "out.json"
    run = command("profile", "--model", saved, "--json", out, *options)
    assert run.returncode == 0, run.stderr
    return EvoConfig.from_dict(json.loads(out.read_text())["config"]), unboxed(run.stderr)


def test_without_options_as_it_was_saved(command, saved, tmp_path):
    config, said = settings(command, saved, tmp_path)
    assert config == SAVED
    assert "--keep-ratio and the like change that" in said


def test_an_option_equal_to_the_default_counts(command, saved, tmp_path):
    config, said = settings(command, saved, tmp_path, "--keep-ratio", "0.5", "--importance", "0.7")
    assert config == EvoConfig(keep_ratio=0.5, stages=(2, 4), importance=0.7)
    assert "but for what was given here: importance, keep_ratio" in said
    assert "left out" not in said
    (tmp_path / "settings.toml").write_text("keep_ratio = 0.5")
    config, _ = settings(command, saved, tmp_path, "--config", tmp_path / "settings.toml")
    assert config.keep_ratio == 0.5


def opened(saved, *given):
    model = timm.create_model("test_vit")
    return model, patch(model, str(saved), Asked(given))


def test_what_was_learned_stays(saved, capsys):
    expected = learned(evopatch.load_pretrained(saved))
    assert {name.partition("|")[2] for name in expected} == {"", "from 2|down", "from 2|up"}
    model, configs = opened(saved, {"keep_ratio": 0.8}, {"keep_ratio": 0.3})
    assert [(config.keep_ratio, config.stages, config.importance) for config in configs] == [
        (0.8, (2, 4), 0.3), (0.3, (2, 4), 0.3),
    ]  # fmt: skip
    assert evopatch.config_of(model) == configs[0]
    found = learned(model)
    assert found.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
    assert "left out" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"stages": (2, 5), "keep_ratio": 0.5}, "its corrections of blocks 2 to 3 are left out"),
        ({"selection": "layer"}, "its corrections of blocks 2 to 3 are left out"),
        ({"representative": "single"}, "is for matched representatives: not used with single"),
    ],
)
def test_what_no_longer_fits_is_named(given, said, saved, capsys):
    opened(saved, given)
    assert said in unboxed(capsys.readouterr().err)


def test_settings_that_do_not_fit_the_saved_ones(command, saved):
    run = command("profile", "--model", saved, "--stages", "3")
    run.assert_refused(2, "2 keep ratios (0.7, 0.4) for 3 run(s)")
