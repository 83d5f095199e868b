"""Flat config keys: how they are spelled, which differ, and that a plan and a comparison say the same of them."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from plans import write_plan

from toolkit.ablation import plan as plans
from toolkit.comparison import guards
from toolkit.comparison.runs import PlanRecord, Run
from toolkit.config import changes, keys
from toolkit.config.layers import ConfigError


@pytest.mark.parametrize(
    ("key", "pieces", "owner", "short"),
    [
        ("GPT.dim", ("GPT", "dim", ""), "GPT", "GPT.dim"),
        ("wide/FFN.hidden", ("FFN", "hidden", "wide"), "wide/FFN", "FFN.hidden"),
        ("a/b/FFN.hidden", ("FFN", "hidden", "a/b"), "a/b/FFN", "FFN.hidden"),
        ("a/module.FFN.hidden", ("module.FFN", "hidden", "a"), "a/module.FFN", "module.FFN.hidden"),
    ],
)
def test_a_key_is_split_and_spelled_again(key, pieces, owner, short):
    assert keys.split(key) == pieces and keys.spell(*pieces) == key
    assert keys.owner(key) == owner and keys.without_scope(key) == short


def test_the_key_of_a_binding():
    assert keys.bound_by("wide/components.ffn.SwiGLU.hidden = 'a = b'") == "wide/SwiGLU.hidden"
    assert keys.bound_by("GPT.dim=8") == "GPT.dim" and keys.bound_by("WIDTH = 8") == "WIDTH"


def test_a_scope_is_enclosed_by_itself_and_by_those_before_it():
    assert keys.enclosing("a/b") == ["a/b", "a", ""] and keys.enclosing("") == [""]


def test_knobs_of_a_part_that_one_side_lacks_follow_from_its_slot():
    one = {"GPT.position": "@RoPE", "RoPE.theta": 1e4, "GPT.dim": 8, "NormA.eps": 1}
    other = {"GPT.position": "@ALiBi", "ALiBi.slope": 1, "GPT.dim": 16, "NormA.eps": 2}
    differing = keys.independent_differences(one, other)
    assert list(differing) == ["GPT.position", "GPT.dim", "NormA.eps"] and differing["GPT.dim"] == (8, 16)
    assert [key for key in differing if not keys.matches(key, ["GPT.p*", "NormA.eps"])] == ["GPT.dim"]


def test_what_an_older_toolkit_lacks_and_changes_nothing_is_no_difference():
    older = {"Experiment.seed": 0, "GPT.dim": 8}
    newer = {"Experiment.seed": 1, "Experiment.probe_every": 50, "GPT.dim": 8, "GPT.embed_scale": None}
    assert keys.independent_differences(older, newer) == keys.independent_differences(newer, older) == {}
    assert list(keys.independent_differences(older, newer | {"GPT.embed_scale": 2.0})) == ["GPT.embed_scale"]


def test_a_missing_value_differs_from_the_word_for_it():
    assert keys.differences({"A.x": keys.ABSENT, "A.y": 1}, {"A.y": 1}) == {"A.x": (keys.ABSENT, keys.ABSENT)}


def test_a_resumed_run_may_spell_a_part_with_its_module():
    before = {"GPT.ffn": "@wide/SwiGLU", "GPT.mixer": ["@A", "@B"], "Experiment.sample_prompt": "mail a@b.c"}
    now = {"GPT.ffn": "@wide/ffn.SwiGLU", "GPT.mixer": ["@m.A", "@B"], "Experiment.sample_prompt": "mail a@c"}
    assert changes.difference(before, now) == {"Experiment.sample_prompt": ["mail a@b.c", "mail a@c"]}


# ---- a plan and a comparison ---------------------------------------------------------------------------------------

GIN = {  # (bindings of the baseline, bindings of the other arm, the keys that both must name)
    "a slot, and the knobs that follow from it": ([], ["GPT.position = @NoPE"], {"GPT.position"}),
    "a scoped key": (
        ["GPT.ffn = @wide/SwiGLU", "wide/SwiGLU.hidden = 64"],
        ["GPT.ffn = @wide/SwiGLU", "wide/SwiGLU.hidden = 96"],
        {"wide/SwiGLU.hidden"},
    ),
    "an outer scope and an inner one": (
        ["GPT.ffn = @wide/up/SwiGLU", "wide/SwiGLU.hidden = 64"],
        ["GPT.ffn = @wide/up/SwiGLU", "wide/up/SwiGLU.hidden = 96"],
        {"wide/up/SwiGLU.hidden"},
    ),
    "a scope on one side only": (
        ["GPT.ffn = @SwiGLU", "SwiGLU.hidden = 64"],
        ["GPT.ffn = @wide/SwiGLU", "wide/SwiGLU.hidden = 96"],
        {"GPT.ffn"},
    ),
    "equal values, spelled differently": (
        ["GPT.norm = @RMSNorm", "AdamW.lr = 3e-3", "AdamW.betas = (0.9, 0.99)"],
        ["GPT.norm = @components.norm.RMSNorm", "AdamW.lr = 0.0030", "AdamW.betas = (.9, 0.990)", "GPT.n_layer = 3"],
        {"GPT.n_layer"},
    ),
}
FLAT = {
    "a knob that only one toolkit has": ({}, {"GPT.later": None}, set()),
    "a knob that only one toolkit had": ({"GPT.earlier": None}, {}, set()),
    "a knob on one side with a value": ({}, {"GPT.later": 1}, {"GPT.later"}),
    "the seed": ({"Experiment.seed": 1}, {"Experiment.seed": 2}, set()),
    "a reference and a call": ({"GPT.norm": "@A"}, {"GPT.norm": "@A()"}, {"GPT.norm"}),
    "references in a list": ({"GPT.norm": ["@A", "@a/m.B"]}, {"GPT.norm": ["@m.A", "@a/B"]}, set()),
    "an integer and a float": ({"GPT.dim": 1}, {"GPT.dim": 1.0}, set()),
}


def named(text: str, *flats: dict) -> set[str]:
    """The keys that a text names."""
    return {key for flat in flats for key in flat if re.search(rf"(?<![\w/.]){re.escape(key)}(?![\w.])", text)}


def named_by_both(plan: plans.Plan, base: dict, other: dict) -> tuple[set[str], set[str]]:
    """The keys that the plan refuses, and those that the comparison reports."""
    for arm, flat in zip(plan.arms.values(), (base, other), strict=True):
        arm.config = SimpleNamespace(flat=flat)
    refused = "".join(plans._find_confounds(plan, {"arms": "plan.gin:2"}, [])[:-1])  # the last line is the remedy
    record = PlanRecord(plan.name, "", "rope", ("rope", "other"), declared=True, factor=tuple(plan.factor))
    made = [
        Run(Path(arm), {"config": flat}, "done", 1, "", [], seed=0, arm=arm)
        for arm, flat in (("rope", base), ("other", other))
    ]
    reported = "".join(banner.text for banner in guards.config(record, made))
    return named(refused, base, other), named(reported, base, other)


@pytest.mark.parametrize("case", GIN)
def test_a_plan_and_a_comparison_name_the_same_keys(case, tmp_path):
    base, other, expected = GIN[case]
    plan = plans.read(write_plan(tmp_path, arms={"rope": base, "other": other}, factor=[]))
    flats = [arm.config.flat for arm in plan.arms.values()]
    assert named("".join(plan.confounds[:-1]), *flats) == expected
    assert named_by_both(plan, *flats) == (expected, expected)


@pytest.mark.parametrize("case", FLAT)
def test_they_agree_on_configs_of_other_toolkits(case, tmp_path):
    base, other, expected = FLAT[case]
    plan = plans.read(write_plan(tmp_path, arms={"rope": [], "other": ["GPT.n_layer = 3"]}))
    shared = plan.baseline.config.flat
    assert named_by_both(plan, shared | base, shared | other) == (expected, expected)


def test_an_overlay_with_a_seed_does_not_confound(tmp_path):
    overlay = tmp_path / "seeded.gin"
    overlay.write_text("Experiment.seed = 7\n")
    arms = {"rope": [], "other": [str(overlay), "GPT.position = @NoPE"]}
    assert plans.read(write_plan(tmp_path, arms=arms)).confounds == []


def test_a_call_is_refused_before_it_is_compared(tmp_path):
    with pytest.raises(ConfigError, match="write @RMSNorm, without parentheses"):
        plans.read(write_plan(tmp_path, arms={"rope": [], "other": ["GPT.norm = @RMSNorm()"]}))


def test_a_plan_sees_its_own_settings_under_every_spelling(tmp_path):
    arms = {"rope": [], "other": ["toolkit.experiment.Experiment.seed = 3"]}
    with pytest.raises(ConfigError, match="Experiment.seed is set by the seeds of the plan"):
        plans.read(write_plan(tmp_path, arms=arms))


def test_arms_that_differ_in_an_overlaid_seed_alone_are_the_same(tmp_path):
    overlay = tmp_path / "seeded.gin"
    overlay.write_text("Experiment.seed = 7\n")
    with pytest.raises(ConfigError, match="arm 'other' does not differ from the baseline 'rope' at all"):
        plans.read(write_plan(tmp_path, arms={"rope": [], "other": [str(overlay)]}))
