"""Settings, and the plan of blocks that they make of a depth."""

import pytest

from evopatch import ConfigError, EvoConfig
from evopatch.plan import plan_blocks


def ratios(config, depth=12):
    return [round(plan.keep_ratio, 3) for plan in plan_blocks(config, depth)]


def marks(config, attribute, depth=12):
    return [i for i, plan in enumerate(plan_blocks(config, depth)) if getattr(plan, attribute)]


def test_default_tapers_in_three_runs_after_the_first_third():
    plan = EvoConfig(keep_ratio=0.5)
    assert ratios(plan) == [1.0] * 4 + [0.762] * 2 + [0.564] * 2 + [0.309] * 4
    assert marks(plan, "selects") == [4, 6, 8]
    assert marks(plan, "ends") == [5, 7, 11]
    assert marks(plan, "selects", depth=24) == [8, 12, 17]


def test_few_tokens_begin_a_quarter_into_the_depth():
    assert marks(EvoConfig(keep_ratio=0.44), "selects") == [3, 5, 8]
    assert marks(EvoConfig(keep_ratio=0.46), "selects") == [4, 6, 8]
    assert marks(EvoConfig(keep_ratio=0.3, start=4), "selects") == [4, 6, 8]
    assert marks(EvoConfig(keep_ratio=0.3, schedule="constant"), "selects")[0] == 4


def test_as_many_runs_as_keep_ratios():
    assert marks(EvoConfig(keep_ratio=[0.6, 0.35]), "selects") == [4, 7]
    assert marks(EvoConfig(keep_ratio=[0.5]), "selects") == [4]
    assert marks(EvoConfig(keep_ratio=[0.9, 0.7, 0.5, 0.3]), "selects") == [4, 5, 7, 9]


def test_selections_look_ahead_at_three_blocks():
    plans = plan_blocks(EvoConfig(), 12)
    assert [plan.looks_at for plan in plans if plan.selects] == [(4, 7, 10), (6, 8, 10), (8, 9, 10)]
    assert [plan.looks_at for plan in plan_blocks(EvoConfig(stages=[11]), 12) if plan.selects] == [(11,)]
    for config in (EvoConfig.paper(), EvoConfig(look_ahead=0.0), EvoConfig(representative="none")):
        assert not marks(config, "looks_at")
    pyramid = plan_blocks(EvoConfig(), 2, 6, 4)  # blocks of another stage take other tokens
    assert [plan.looks_at for plan in pyramid if plan.selects] == [(1,), (2, 4, 6), (8, 9, 10)]
    assert not [plan for plan in plan_blocks(EvoConfig(), 2, 3, looks_ahead=False) if plan.looks_at]


def test_paper():
    plan = EvoConfig.paper()
    assert (plan.representative, plan.tradeoff, plan.schedule) == ("single", 0.5, "constant")
    assert ratios(plan) == [1.0] * 4 + [0.5] * 8
    assert marks(plan, "selects") == [4, 8]
    assert marks(EvoConfig.paper(0.7), "selects", depth=24) == [8, 16]


def test_dense():
    plan = EvoConfig.dense()
    assert ratios(plan) == [1.0] * 2 + [0.84, 0.76, 0.65] + [0.59] * 2 + [0.51] * 2 + [0.35] * 3
    assert marks(plan, "selects") == [2, 3, 4, 5, 7, 9]
    assert marks(plan, "selects", depth=24) == [4, 5, 8, 11, 14, 19]
    assert plan.importance < EvoConfig().importance


def test_there_are_no_more_runs_than_blocks():
    assert marks(EvoConfig(stages=8), "selects") == marks(EvoConfig(stages=9), "selects") == list(range(4, 12))
    assert marks(EvoConfig.dense(0.5), "selects", depth=6) == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(("start", "first"), [(0.25, 3), (0.01, 1), (0.5, 6), (2, 2), (None, 4)])
def test_start_as_a_block_or_a_share_of_the_depth(start, first):
    assert marks(EvoConfig(start=start), "selects")[0] == first


@pytest.mark.parametrize("mean", [0.1, 0.35, 0.5, 0.8, 0.95, 1.0])
@pytest.mark.parametrize("stages", [1, 2, 3, [4, 5], [3, 5, 9, 10]])
@pytest.mark.parametrize("depth", [11, 12, 24])
def test_runs_of_one_keep_ratio_fall_and_grow_with_it(mean, stages, depth):
    plans = plan_blocks(EvoConfig(keep_ratio=mean, stages=stages), depth)
    runs = [plan.keep_ratio for plan in plans if plan.selects]
    if mean == 1.0:
        assert runs == []
        return
    assert len(runs) == (len(stages) if isinstance(stages, list) else stages)
    higher = plan_blocks(EvoConfig(keep_ratio=mean + 0.04, stages=stages), depth)
    assert all(more > less for more, less in zip([p.keep_ratio for p in higher if p.selects], runs, strict=True))
    assert all(0 < ratio <= 1 for ratio in runs)
    assert runs == sorted(runs, reverse=True)


def test_layer_wise_selects_before_every_block():
    plan = EvoConfig(selection="layer", keep_ratio=[0.6, 0.3], stages=[4, 8])
    assert marks(plan, "selects") == list(range(4, 12))
    assert marks(plan, "ends") == list(range(4, 12))
    assert ratios(plan)[4:] == [0.6] * 4 + [0.3] * 4


def test_class_attention_is_only_computed_where_a_later_selection_reads_it():
    tradeoffs = [plan.tradeoff for plan in plan_blocks(EvoConfig(tradeoff=[i / 12 for i in range(12)]), 12)]
    assert tradeoffs == [i / 12 for i in range(8)] + [None] * 4
    assert all(plan.tradeoff is None for plan in plan_blocks(EvoConfig(keep_ratio=1.0), 12))


@pytest.mark.parametrize("stages", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("depth", [2, 3, 4, 5, 6, 7, 11, 40])
def test_any_depth(depth, stages):
    plans = plan_blocks(EvoConfig(stages=stages), depth)
    assert len(plans) == depth
    runs = [i for i, plan in enumerate(plans) if plan.selects]
    assert len(runs) == min(stages, depth - max(1, depth // 3))
    lengths = [b - a for a, b in zip(runs, [*runs[1:], depth], strict=True)]
    assert all(lengths[i] <= lengths[i + 1] + 1 for i in range(len(lengths) - 1))
    assert plans[0].keep_ratio == 1.0
    assert plans[-1].keep_ratio < 1.0
    assert plans[-1].ends


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep_ratio": 0.0}, r"keep_ratio=0.0: expected a number in \(0, 1\]"),
        ({"keep_ratio": 1.5}, r"keep_ratio=1.5"),
        ({"keep_ratio": float("nan")}, "keep_ratio=nan"),
        ({"keep_ratio": "0.5"}, "keep_ratio='0.5'"),
        ({"keep_ratio": [0.5, 2]}, "keep_ratio=2"),
        ({"keep_ratio": True}, "keep_ratio=True"),
        ({"tradeoff": -0.1}, r"tradeoff=-0.1: expected a number in \[0, 1\]"),
        ({"selection": "token"}, "selection='token': expected one of 'stage', 'layer'"),
        ({"representative": "mean"}, "representative='mean'"),
        ({"schedule": "cosine"}, "schedule='cosine'"),
        ({"start": 0}, "start=0: expected a block index of at least 1"),
        ({"start": 1.5}, r"start=1.5: expected a number in \(0, 1\)"),
        ({"importance": -1}, "importance=-1"),
        ({"stages": 0}, "stages=0"),
        ({"stages": []}, "stages="),
        ({"stages": 2.0}, "stages=2.0"),
        ({"stages": [8, 4]}, "increasing order"),
        ({"stages": [4, 8], "start": 3}, "disagree"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ConfigError, match=message):
        EvoConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "depth", "message"),
    [
        ({"stages": [4, 12]}, 12, "starts at block 12, beyond the model's 12 blocks"),
        ({"start": 12}, 12, "starts at block 12"),
        ({"keep_ratio": [0.5], "stages": 2}, 12, r"1 keep ratios \(0.5,\) for 2 run\(s\)"),
        ({"tradeoff": [0.5] * 3}, 12, "3 tradeoffs for 12 blocks"),
        ({}, 1, r"1 block\(s\): expected at least 2"),
    ],
)
def test_settings_that_do_not_fit_the_depth(settings, depth, message):
    with pytest.raises(ConfigError, match=message):
        plan_blocks(EvoConfig(**settings), depth)


@pytest.mark.parametrize(
    "config",
    [EvoConfig(), EvoConfig.paper(0.7), EvoConfig.dense(), EvoConfig([0.6, 0.3], stages=[3, 7], tradeoff=[0.5] * 12)],
)
def test_json_round_trip(config):
    assert EvoConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not a JSON text"),
        ("[1]", "expected a JSON object"),
        ('{"keep": 1}', r"unknown setting\(s\) \['keep'\]"),
        ('{"keep_ratio": 3}', "keep_ratio=3"),
    ],
)
def test_bad_json(text, message):
    with pytest.raises(ConfigError, match=message):
        EvoConfig.from_json(text)


def test_unpatched_start_and_settings_by_stage():
    plans = plan_blocks(EvoConfig(keep_ratio=[0.6, 0.5, 0.4]), 4, 4, 4)
    assert [p.keep_ratio for p in plans] == [1.0] * 2 + [0.6] * 2 + [0.5] * 4 + [0.4] * 4
    assert [i for i, p in enumerate(plans) if p.selects] == [2, 4, 8]
    assert [i for i, p in enumerate(plans) if p.ends] == [3, 7, 11]
    assert [p.selects for p in plan_blocks(EvoConfig(start=2, stages=2, schedule="constant"), 2, 4)] == [
        False, False, True, False, True, False]  # fmt: skip
    with pytest.raises(ConfigError, match="a run starts at block 9, beyond the model's 6 blocks"):
        plan_blocks(EvoConfig(start=9), 2, 4)
