"""Schedules, their neighbours, and targets: no model runs here."""

import pytest
from variants import build

import evopatch
from evopatch import ConfigError, EvoConfig
from evopatch.calibration.schedule import Schedule, schedule_of
from evopatch.calibration.target import Target
from evopatch.patching.handle import Patched


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("vit", EvoConfig()),
        ("vit", EvoConfig(keep_ratio=(0.7, 0.4), stages=(2, 4))),
        ("vit", EvoConfig.paper()),
        ("vit", EvoConfig(selection="layer")),
        ("levit", EvoConfig()),
        ("levit", EvoConfig(keep_ratio=(0.7, 0.6, 0.4))),
        ("swin", EvoConfig()),
        ("swin", EvoConfig(keep_ratio=(1.0, 0.6, 0.4))),
    ],
)
def test_a_schedule_is_what_a_configuration_comes_to(name, config):
    model = evopatch.apply(build(name), config=config)
    state = Patched(model).host.state
    begins = [sum(state.depths[:stage]) for stage in range(1, len(state.depths))]
    schedule = schedule_of(state.plans, begins, config.importance)
    plans = state.plan(schedule.config(config))
    for own, expected in zip(plans, state.plans, strict=True):
        assert (own.selects, own.ends) == (expected.selects, expected.ends)
        assert own.keep_ratio == pytest.approx(expected.keep_ratio, abs=1e-4)


def test_neighbours_are_valid_and_one_step_away():
    start = Schedule((3, 5), (0.6, 0.4), 0.7)
    found = list(start.neighbours(0.5, 8, (), weighs=True))
    assert len(found) == len(set(found))
    assert start not in found
    for schedule in found:
        assert len(schedule.firsts) == len(schedule.ratios)
        assert schedule.firsts[0] > 0
        assert list(schedule.firsts) == sorted(set(schedule.firsts))
        assert schedule.firsts[-1] < 8
        schedule.config(EvoConfig())
    firsts = {schedule.firsts for schedule in found}
    assert {(2, 5), (4, 5), (3, 4), (3, 6), (3, 4, 5), (3, 5, 6), (3,)} == firsts - {start.firsts}
    assert {schedule.importance for schedule in found} == {0.35, 0.7, 1.4}
    kept = {schedule.ratios for schedule in found if schedule.firsts == start.firsts}
    assert kept == {(0.6, 0.4), (0.7121, 0.4), (0.4764, 0.4), (0.6, 0.5236), (0.6, 0.2879)}


def test_stages_of_a_pyramid_stay():
    start = Schedule((1, 2, 5), (0.7, 0.5, 0.3), 0.7)
    for schedule in start.neighbours(0.5, 7, (2, 5), weighs=False):
        assert {2, 5} <= set(schedule.firsts)
        assert schedule.importance == 0.7


def test_shifted_keeps_the_order_and_comes_back():
    start = Schedule((3, 5), (0.6, 0.4), 0.7)
    more = start.shifted(0.8)
    assert all(own > before for own, before in zip(more.ratios, start.ratios, strict=True))
    assert more.shifted(-0.8).ratios == pytest.approx(start.ratios, abs=1e-3)
    assert start.shifted(20).ratios == (1.0, 1.0)
    assert start.shifted(-20).ratios == (0.02, 0.02)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "none given: expected one of target_flops"),
        ({"flops": 0.6, "kl": 0.1}, "target_flops and target_kl given"),
        ({"flops": 1.0}, r"target_flops=1.0: .* in \(0, 1\)"),
        ({"speedup": 0.9}, "target_speedup=0.9: .*more than 1 times"),
        ({"kl": 0.0}, "target_kl=0.0"),
        ({"agreement": 98}, "target_agreement=98"),
        ({"flops": float("nan")}, "target_flops=nan"),
        ({"flops": "0.6"}, "target_flops='0.6'"),
    ],
)
def test_targets_outside_their_range(given, message):
    with pytest.raises(ConfigError, match=message):
        Target.of(**{"flops": None, "speedup": None, "kl": None, "agreement": None, **given})


def test_every_grid_of_a_pyramid_keeps_a_slow_token():
    state = Patched(evopatch.apply(build("levit"))).host.state  # grids of 5x5, 3x3 and 2x2
    assert state.least == (0.02, 0.02, 0.0556, 0.0556, 0.0556, 0.125, 0.125)
    fewest = schedule_of(state.plans, (2, 5), 0.7, state.least).shifted(-8)
    assert [plan.keep_ratio for plan in state.plan(fewest.config(EvoConfig()))][1:] == list(state.least[1:])
    with pytest.raises(ConfigError, match="leaves no slow token"):
        state.plan(fewest._replace(least=()).config(EvoConfig()))
    assert Patched(evopatch.apply(build("vit"))).host.state.least == ()
