"""Plans: what is refused and in which words, confounds, widths that match, budgets in steps, the order of jobs."""

from pathlib import Path

import pytest
from plans import COMMON, PLAN, write_plan

from toolkit.ablation import match
from toolkit.ablation.plan import read
from toolkit.compose import compose
from toolkit.config.layers import ConfigError

MULTI = {"arms": {"a": [], "b": ["GPT.position = @NoPE"], "c": ["GPT.position = @Learned"]}}


def refused(tmp_path, **changed) -> str:
    path = write_plan(tmp_path, **changed)
    with pytest.raises(ConfigError) as caught:
        read(path)
    return str(caught.value).replace(str(path), "plan.gin")


def test_a_plan_is_read_into_arms_with_their_counts(tmp_path):
    plan = read(write_plan(tmp_path, "position"))
    assert plan.name == "position" and list(plan.arms) == ["rope", "none"] and plan.confounds == []
    assert plan.arms["none"].config.flat["GPT.position"] == "@NoPE"
    assert plan.arms["rope"].parameters == plan.arms["none"].parameters == 33632
    assert plan.arms["rope"].steps == 12 and plan.arms["rope"].tokens_per_step == 128


def test_the_baseline_is_first_whatever_its_place(tmp_path):
    assert list(read(write_plan(tmp_path, baseline="none")).arms) == ["none", "rope"]


WRONG = {
    "a field that is near": (
        {"seed": [1]},
        "plan.gin:8: Ablation has no field 'seed'; did you mean 'seeds'?",
    ),
    "a type": ({"seeds": [0, 1.5]}, "plan.gin:5: Ablation.seeds: at 1: 1.5 should be a valid integer"),
    "no seeds": (
        {"seeds": []},
        "plan.gin:5: Ablation.seeds: List should have at least 1 item after validation, not 0",
    ),
    "an effect of nothing": ({"effect": 0.0}, "plan.gin:6: Ablation.effect: 0.0 should be greater than 0"),
    "an alpha": ({"alpha": 0.6}, "plan.gin:8: Ablation.alpha: 0.6 should be less than or equal to 0.5"),
    "no effect": (
        {"effect": None},
        "plan.gin: Ablation.effect is not bound; write Ablation.effect = 0.02, in units of the metric",
    ),
    "several budgets": (
        {"tokens": 1000},
        "plan.gin: the plan has 2 budgets, Ablation.steps, Ablation.tokens; give one of steps, tokens, flops, seconds",
    ),
    "no budget": ({"steps": None}, "plan.gin: the plan has no budget; give one of steps, tokens, flops, seconds"),
    "a loss of which more is better": (
        {"higher_is_better": True},
        "plan.gin:8: Ablation.higher_is_better = True, but val_full/loss_nats is a loss, and lower is better; leave it "
        "out",
    ),
    "a baseline that is no arm": (
        {"baseline": "rop"},
        "plan.gin:8: Ablation.baseline = 'rop' is not an arm; did you mean 'rope'?",
    ),
    "one arm": (
        {"arms": {"rope": []}},
        "plan.gin:2: the plan has 1 arms; a comparison needs two or more in Ablation.arms",
    ),
    "repeated seeds": (
        {"seeds": [0, 1, 0]},
        "plan.gin:5: Ablation.seeds repeats 0: a repeated seed gives no new run",
    ),
    "a name that is no file's": (
        {"arms": {"rope": [], "no/pe": ["GPT.position = @NoPE"]}},
        "plan.gin:2: Ablation.arms: arm 'no/pe': its runs' folders are named after it, so a name is 1 to 80 letters of "
        "the English alphabet, digits and the characters _.+=,@- and begins with a letter, a digit or _",
    ),
    "an entry that is neither": (
        {"arms": {"rope": [], "none": ["NoPE"]}},
        "plan.gin:2: Ablation.arms: arm 'none': 'NoPE' is neither an overlay (gin/norm/rmsnorm.gin) nor a binding "
        "('GPT.norm = @RMSNorm')",
    ),
    "steps twice": (
        {"common": [*COMMON, "Experiment.steps = 5"]},
        "plan.gin:3: 'Experiment.steps = 5': Experiment.steps is set by the budget (Ablation.steps, tokens, flops or "
        "seconds) of the plan; leave it out here",
    ),
    "an arm like the baseline": (
        {"arms": {"rope": [], "same": ["GPT.position = @RoPE"]}},
        "plan.gin:2: arm 'same' does not differ from the baseline 'rope' at all",
    ),
    "a factor that is none": (
        {"factor": ["GPT.postion"]},
        "plan.gin:4: Ablation.factor: no arm has a config key 'GPT.postion'; did you mean 'GPT.position'?",
    ),
    "an overlay that is not there": (
        {"arms": {"rope": [], "none": ["gin/nope.gin"]}},
        "arm 'none': gin/nope.gin: file not found; did you mean gin/position/nope.gin?",
    ),
    "an arm's typo": (
        {"arms": {"rope": [], "none": ["GPT.position = @NoPe"]}},
        "arm 'none': plan.gin:2: 'GPT.position = @NoPe': part not found: 'NoPe'; did you mean 'NoPE'?",
    ),
    "a typo that all arms have": (
        {"common": [*COMMON, "GPT.n_layers = 2"]},
        "plan.gin:3: 'GPT.n_layers = 2': GPT has no parameter 'n_layers'; did you mean 'n_layer'?",
    ),
    "a rate grid without seeds of its own": (
        {"lr_grid": [1e-3, 3e-3]},
        "plan.gin:8: Ablation.lr_grid and selection_seeds go together: rates are chosen on seeds that are not judged, "
        "such as Ablation.selection_seeds = [100, 101]",
    ),
    "rates judged where they were chosen": (
        {"lr_grid": [1e-3, 3e-3], "selection_seeds": [0]},
        "plan.gin:9: Ablation.selection_seeds and seeds share 0: the seeds that choose the learning rate can't judge "
        "it too",
    ),
    "unequal tries": (
        {"lr_grid": {"rope": [1e-3, 3e-3], "none": [1e-3]}, "selection_seeds": [9]},
        "plan.gin:8: Ablation.lr_grid: arms have unequal numbers of rates (rope 2, none 1); give all the same number",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_said_with_its_place(case, tmp_path):
    changed, message = WRONG[case]
    assert refused(tmp_path, **changed) == message


def test_everything_wrong_is_told_at_once(tmp_path):
    lines = refused(tmp_path, alpha=2.0, effect=-1.0, sed=[1]).splitlines()
    assert len(lines) == 3 and all(line.startswith("plan.gin:") for line in lines)


def test_only_the_plan_is_bound_in_a_plan(tmp_path):
    path = write_plan(tmp_path)
    path.write_text(path.read_text() + "GPT.dim = 8\n")
    with pytest.raises(ConfigError, match="plan.gin:8: GPT.dim: a plan binds only Ablation; bindings for every arm go"):
        read(path)


def test_what_differs_beyond_the_factor_is_a_confound(tmp_path):
    arms = {"rope": [], "alibi": ["gin/position/alibi.gin"], "wide": ["GPT.position = @NoPE", "AdamW.lr = 0.01"]}
    plan = read(write_plan(tmp_path, arms=arms))
    assert [line.replace(str(plan.path), "plan.gin") for line in plan.confounds] == [
        "plan.gin:2: arm 'alibi' is confounded: it differs from the baseline 'rope' beyond the factor: GPT.attention "
        "is @SDPA, not @FlashAttention",
        "plan.gin:2: arm 'wide' is confounded: it differs from the baseline 'rope' beyond the factor: AdamW.lr is 0.01"
        ", not 0.003",
        "give all arms the same values (in Ablation.common) or, if these differences are the question, write "
        "Ablation.factor = ['GPT.position', 'GPT.attention', 'AdamW.lr']",
    ]
    factor = ["GPT.position", "GPT.attention", "AdamW.*"]
    assert read(write_plan(tmp_path, arms=arms, factor=factor)).confounds == []


def test_a_grid_is_every_combination_and_its_keys_are_factors(tmp_path):
    grid = {"GPT.ffn": ["@SwiGLU", "@GELU"], "GPT.dim": [32, 64]}
    plan = read(write_plan(tmp_path, arms=None, factor=None, grid=grid))
    assert list(plan.arms) == ["SwiGLU-dim32", "SwiGLU-dim64", "GELU-dim32", "GELU-dim64"]
    assert plan.arms["GELU-dim64"].bindings == ["GPT.ffn = @GELU", "GPT.dim = 64"] and plan.confounds == []
    assert plan.baseline.name == "SwiGLU-dim32"


def test_references_of_a_grid_need_no_quotes(tmp_path):
    path = write_plan(tmp_path, arms=None, factor=None)
    path.write_text(path.read_text() + "Ablation.grid = {'GPT.ffn': [@SwiGLU, @GELU]}\n")
    assert list(read(path).arms) == ["SwiGLU", "GELU"]


def test_leave_one_out_takes_each_part_away(tmp_path):
    parts = {"rmsnorm": ["gin/norm/rmsnorm.gin"], "gelu": ["GPT.ffn = @GELU"], "bias": ["SelfAttention.bias = True"]}
    factor = ["GPT.norm", "GPT.ffn", "SelfAttention.bias"]
    plan = read(write_plan(tmp_path, arms=None, leave_one_out=parts, factor=factor))
    assert list(plan.arms) == ["all", "without-rmsnorm", "without-gelu", "without-bias"]
    assert plan.baseline.overlays == ["gin/norm/rmsnorm.gin"] and len(plan.baseline.bindings) == 2
    assert plan.arms["without-rmsnorm"].overlays == [] and plan.confounds == []
    assert plan.arms["without-gelu"].bindings == ["SelfAttention.bias = True"]


def test_an_arm_may_displace_what_is_common(tmp_path):
    common = [*COMMON, "AdamW.weight_decay = 0.2"]
    arms = {"some": [], "none": ["AdamW.weight_decay = 0.0"], "other": ["gin/optimizer/lion.gin"]}
    plan = read(write_plan(tmp_path, common=common, arms=arms, factor=["AdamW.weight_decay", "Experiment.optimizer"]))
    assert [arm.config.flat.get("AdamW.weight_decay") for arm in plan.arms.values()] == [0.2, 0.0, None]
    assert plan.confounds == []


# ---- widths ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slope, offset, multiple", [(1, 0, 1), (7, 3, 1), (192, 1000, 1), (192, 1000, 8), (3, 999, 5)])
def test_the_solved_width_is_the_nearest_of_all(slope, offset, multiple):
    for target in (5, 1000, 1001, 4321, 19_999):
        width, residual = match.solve(lambda w: slope * w + offset, target, multiple)
        best = min(range(multiple, 20_000 * multiple, multiple), key=lambda w: abs(slope * w + offset - target))
        assert abs(residual) == abs(slope * best + offset - target) and residual == slope * width + offset - target
        assert width % multiple == 0


def test_a_count_that_does_not_grow_is_refused():
    with pytest.raises(ValueError, match="the count does not reach 100 as the width grows: it is 7 at width 64"):
        match.solve(lambda width: 7, 100)


@pytest.mark.parametrize("of", ["params", "flops"])
def test_matched_arms_are_as_near_as_an_integer_allows(of, tmp_path):
    arms = {"swiglu": [], "gelu": ["GPT.ffn = @GELU"]}
    plan = read(write_plan(tmp_path, arms=arms, factor=["GPT.ffn"], match=of))
    knob, width, residual = plan.arms["gelu"].width
    assert knob == "GELU.hidden" and plan.arms["swiglu"].width == ("SwiGLU.hidden", None, 0)
    assert plan.arms["gelu"].settled == ["GPT.ffn = @GELU", f"GELU.hidden = {width}"]

    def counted(hidden):
        bindings = [*COMMON[1:], "GPT.ffn = @GELU", f"GELU.hidden = {hidden}"]
        return match.count(compose(COMMON[:1], bindings)[0], of)

    target = match.count(plan.baseline.config, of)
    errors = {hidden: abs(counted(hidden) - target) for hidden in range(width - 3, width + 4)}
    assert min(errors, key=errors.get) == width and errors[width] == abs(residual)


def test_the_knob_that_matches_can_be_named(tmp_path):
    arms = {"swiglu": [], "gelu": ["GPT.ffn = @GELU"]}
    more = {"match": "params", "match_knob": "GPT.dim", "match_multiple": 8}
    plan = read(write_plan(tmp_path, arms=arms, factor=["GPT.ffn"], **more))
    assert plan.arms["gelu"].width[0] == "GPT.dim" and plan.arms["gelu"].config.flat["GPT.dim"] % 8 == 0
    lines = refused(tmp_path, arms=arms, factor=["GPT.ffn"], match="params", match_knob="GPT.dims")
    assert lines.splitlines()[0] == (
        "plan.gin:8: Ablation.match: arm 'swiglu': Ablation.match_knob: arm 'swiglu' has no knob 'GPT.dims'; "
        "did you mean 'GPT.dim'?"
    )


# ---- budgets and jobs ------------------------------------------------------------------------------------------------


def test_tokens_and_flops_become_steps(tmp_path):
    plan = read(write_plan(tmp_path, steps=None, tokens=12_800))
    assert [arm.steps for arm in plan.arms.values()] == [100, 100]  # 4 x 32 tokens a step
    arms = {"swiglu": [], "wide": ["SwiGLU.hidden = 512"]}
    plan = read(write_plan(tmp_path, arms=arms, factor=["SwiGLU.hidden"], steps=None, flops=1e9))
    for arm in plan.arms.values():
        spent = arm.steps * 128 * arm.flops_per_token
        assert abs(spent - 1e9) <= 128 * arm.flops_per_token / 2
    assert plan.arms["wide"].steps < plan.arms["swiglu"].steps


def test_seconds_become_steps_once_measured(tmp_path):
    plan = read(write_plan(tmp_path, steps=None, seconds=10.0))
    assert [arm.steps for arm in plan.arms.values()] == [0, 0]  # unknown
    plan.set_steps({"rope": 0.1, "none": 0.04})
    assert [arm.steps for arm in plan.arms.values()] == [100, 250]
    plan.set_steps({"rope": 9.9, "none": 9.9}, known_steps={"rope": 100})
    assert [arm.steps for arm in plan.arms.values()] == [100, 1]


def test_too_small_a_budget_is_refused(tmp_path):
    assert refused(tmp_path, steps=None, tokens=50) == "Ablation.tokens = 50 is less than half a step of arm 'rope'"


def test_jobs_go_seed_by_seed(tmp_path):
    runs = [job.run for job in read(write_plan(tmp_path, **MULTI, seeds=[3, 1])).jobs]
    assert runs == ["a-s3", "b-s3", "c-s3", "a-s1", "b-s1", "c-s1"]


def test_rates_are_tried_on_their_own_seeds_before_the_judged_ones(tmp_path):
    grid = {"rope": [0.001, 0.003], "none": [0.002, 0.004]}
    plan = read(write_plan(tmp_path, lr_grid=grid, selection_seeds=[9], seeds=[0]))
    assert [job.run for job in plan.jobs] == [
        *("rope-s9-lr0.001", "none-s9-lr0.002", "rope-s9-lr0.003", "none-s9-lr0.004"),
        *("rope-s0", "none-s0"),
    ]
    assert [job.purpose for job in plan.jobs] == ["selection"] * 4 + ["judged"] * 2
    assert "AdamW.lr = 0.002" in plan.bindings(plan.jobs[1], 0.002)
    assert plan.flat(plan.jobs[1], 0.002)["AdamW.lr"] == 0.002
    assert PLAN["factor"] == plan.factor  # the rate is no part of it


PLANS = sorted((Path(__file__).parent.parent / "experiments").glob("*/plan.gin"))


@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.parent.name)
def test_the_plans_that_we_ship_read_cleanly_and_have_their_result(path, monkeypatch):
    monkeypatch.chdir(path.parent.parent.parent)
    plan = read(path)
    assert plan.confounds == [] and plan.name == path.parent.name and len(plan.ablation.seeds) >= 3
    result = (path.parent / "README.md").read_text(encoding="utf-8")
    assert plan.ablation.question in result and all(f"| {arm} |" in result for arm in plan.arms)
