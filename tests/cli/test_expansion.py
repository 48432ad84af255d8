"""Options that several commands share: one mechanism, typer's own signatures."""

import dataclasses
import inspect
from typing import Annotated, get_type_hints

import pytest
import typer
from typer.testing import CliRunner

import evopatch
from evopatch import EvoConfig
from evopatch.cli import app
from evopatch.cli.expansion import Option, expanded
from evopatch.cli.patch_options import Asked, one_config, several_configs

PRESETS = ["paper", "dense", "exact"]
PATCH = ["keep_ratio", "representative", *PRESETS, "selection", "schedule", "start", "stages", "tradeoff"]
PATCH += ["importance", "look_ahead", "readout"]
COMMANDS = {
    "finetune": True, "evaluate": True, "calibrate": True, "benchmark": True, "profile": True, "visualize": True,
    "verify": True, "embed": True, "export": True, "run": True, "list": False, "demo": False,
}  # fmt: skip


def invoked(decorated, *arguments):
    own = typer.Typer()
    own.command()(decorated)
    result = CliRunner().invoke(own, list(arguments))
    return result


def test_the_options_stand_where_the_parameter_stood_and_one_value_comes_out():
    seen = []

    def command(first: str, *, pair: tuple[int, int], last: Annotated[int, typer.Option()] = 3) -> None:
        seen.append((first, pair, last))

    options = {name: Option(Annotated[int, typer.Option(help=f"the {name}")], 1) for name in ("left", "right")}
    decorated = expanded("pair", options, lambda left, right: (left, right))(command)
    assert list(inspect.signature(decorated).parameters) == ["first", "left", "right", "last"]
    assert get_type_hints(decorated)["left"] is int
    assert invoked(decorated, "x", "--right", "5").exit_code == 0
    assert seen == [("x", (1, 5), 3)]
    help_text = invoked(decorated, "--help").output
    assert "the left" in help_text
    assert "pair" not in help_text
    assert invoked(decorated, "x", "--right", "five").exit_code == 2


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], EvoConfig()),
        (["--paper"], EvoConfig.paper()),
        (["--paper", "--schedule", "taper"], dataclasses.replace(EvoConfig.paper(), schedule="taper")),
        (
            ["--representative", "none", "--keep-ratio", "0.6,0.3"],
            EvoConfig(representative="none", keep_ratio=(0.6, 0.3)),
        ),
        (["--selection", "layer", "--start", "2", "--stages", "3"], EvoConfig(selection="layer", start=2, stages=3)),
        (["--stages", "4,8"], EvoConfig(stages=(4, 8))),
        (["--dense"], EvoConfig.dense()),
        (["--dense", "--keep-ratio", "0.6"], EvoConfig.dense(0.6)),
        (["--exact"], EvoConfig.exact()),
        (["--start", "0.17", "--importance", "0.05"], EvoConfig(start=0.17, importance=0.05)),
        (["--look-ahead", "0", "--tradeoff", "0.3,0.4"], EvoConfig(look_ahead=0.0, tradeoff=(0.3, 0.4))),
        (["--no-readout"], EvoConfig(readout=False)),
    ],
)
def test_a_configuration_from_options(arguments, expected, several):
    seen = []

    def command(*, asked: Asked) -> None:
        seen.extend(asked.over(EvoConfig()))

    result = invoked((several_configs if several else one_config)(command), *arguments)
    assert result.exit_code == 0, result.output
    assert seen == [expected]


@pytest.mark.parametrize(
    ("arguments", "given"),
    [
        ([], {}),
        (["--keep-ratio", "0.5", "--selection", "stage"], {"keep_ratio": 0.5, "selection": "stage"}),
        (["--exact"], EvoConfig.exact().to_dict()),
    ],
)
def test_what_was_given_is_told_from_what_was_not(arguments, given):
    seen = []

    def command(*, asked: Asked) -> None:
        seen.append(asked)

    assert invoked(one_config(command), *arguments).exit_code == 0
    assert seen == [Asked((given,))]
    base = EvoConfig(keep_ratio=(0.8, 0.4), stages=(3, 6), importance=0.1, selection="layer")
    assert seen[0].over(base) == [EvoConfig.from_dict(base.to_dict() | given)]


def test_there_is_an_option_for_every_field():
    assert sorted(set(PATCH) - set(PRESETS)) == sorted(field.name for field in dataclasses.fields(EvoConfig))


def test_bad_settings_are_refused_before_the_command_runs():
    def command(*, asked: Asked) -> None:
        raise AssertionError("it ran")

    for arguments, message in (
        (["--paper", "--dense"], "--paper and --dense: expected one preset at most"),
        (["--start", "half"], "expected a block's number, or a share of the depth"),
    ):
        result = invoked(one_config(command), *arguments)
        assert result.exit_code == 2
        assert message in " ".join(result.output.replace("│", " ").split())
    assert isinstance(invoked(one_config(command), "--start", "1.5").exception, evopatch.ConfigError)


def test_every_representative_with_every_keep_ratio():
    seen = []

    def many(*, asked: Asked) -> None:
        seen.extend((config.representative, config.keep_ratio) for config in asked.over(EvoConfig()))

    ratios = ["--keep-ratio", "0.7", "--keep-ratio", "0.5"]
    invoked(several_configs(many), *ratios, "--representative", "single", "--representative", "none")
    assert seen == [("single", 0.7), ("single", 0.5), ("none", 0.7), ("none", 0.5)]


def test_the_commands_have_the_same_options():
    commands = typer.main.get_command(app).commands
    assert set(commands) == set(COMMANDS)
    for name, patches in COMMANDS.items():
        found = [parameter.name for parameter in commands[name].params]
        assert ([option for option in found if option in PATCH] == PATCH) is patches, name
        assert "asked" not in found


def test_version():
    result = CliRunner().invoke(app, ["--version"])
    assert result.exit_code == 0
    assert result.output == f"evopatch {evopatch.__version__}\n"


def test_one_place_for_the_version():
    from pathlib import Path

    from setuptools.config.pyprojecttoml import read_configuration

    project = read_configuration(Path(__file__).parents[2] / "pyproject.toml")["project"]
    assert "version" in project["dynamic"]
    assert project["version"] == evopatch.__version__
