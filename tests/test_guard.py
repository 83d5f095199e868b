"""Every wrong config ends in one readable message before data is read; the messages are tested word by word."""

from pathlib import Path

import mutants
import pytest

from toolkit.compose import compose, try_build
from toolkit.config.layers import ConfigError
from toolkit.config.spelling import nearest

NOT_GIN = "(strings need quotes; True, False and None are capitalised; gin has no arithmetic)"
NORMS = "LayerNorm, RMSNorm, ScaleNorm, DynamicTanh, NoNorm"
KNOBS = (
    "block, mixer, position, attention, norm, ffn, init, dim, n_layer, n_head, n_kv_head, dropout, tie_embeddings, "
    "pad_vocab_to, logit_softcap, embed_scale, recompute"
)

# binding -> what is said of it, after the place
WRONG = {
    # names
    "GTP.dim = 3": "part not found: 'GTP'; did you mean 'GPT'?",
    "GPT.dmi = 3": "GPT has no parameter 'dmi'; did you mean 'dim'?",
    "GPT.colour = 3": f"GPT has no parameter 'colour'; its knobs are {KNOBS}",
    "NoPE.theta = 3": "NoPE has no parameter 'theta'; it has no knobs",
    "GPT.norm = @RSMNorm": "part not found: 'RSMNorm'; did you mean 'RMSNorm'?",
    "GPT.dim = %WIDTH": "macro not found: 'WIDTH'",
    "LayerNorm = 3": "LayerNorm = ... names no knob of LayerNorm; write LayerNorm.KNOB = ...",
    # what the toolkit supplies
    "GPT.max_len = 3": f"GPT.max_len can't be bound: the toolkit supplies it; its knobs are {KNOBS}",
    "FlashAttention.n_head = 3": "FlashAttention.n_head can't be bound: the toolkit supplies it; it has no knobs",
    # kinds
    "GPT.norm = @GELU": f"GPT.norm = @GELU: @GELU is of kind ffn; parts of kind norm are {NORMS}",
    "GPT.norm = [@LayerNorm, @GELU]": f"GPT.norm = @GELU: @GELU is of kind ffn; parts of kind norm are {NORMS}",
    "GPT.norm = 'rms'": "GPT.norm takes a reference to a norm, such as @LayerNorm, not 'rms'",
    "GPT.norm = None": "GPT.norm takes a reference to a norm, such as @LayerNorm, not None",
    "GPT.norm = @LayerNorm()": "GPT.norm takes the class itself: write @LayerNorm, without parentheses",
    "GPT.norm = []": "GPT.norm = [] is empty; it needs at least one norm",
    "GPT.init = [@GPT2Init]": "GPT.init = [@GPT2Init]: it takes one init, not a list",
    "Experiment.loggers = @CSV": "Experiment.loggers = @CSV: it takes a list: write [@CSV]",
    # types and ranges
    "GPT.n_layer = 'twelve'": "GPT.n_layer = 'twelve': it should be a valid integer",
    "GPT.n_layer = 12.0": "GPT.n_layer = 12.0: it should be a valid integer",
    "GPT.n_layer = True": "GPT.n_layer = True: it should be a valid integer",
    "GPT.n_layer = @GELU": "GPT.n_layer = @GELU: it should be a valid integer",
    "GPT.n_layer = 1000000000": "GPT.n_layer = 1000000000: it should be less than or equal to 10000",
    "Symbols.symbols = 10000000000": "Symbols.symbols = 10000000000: it should be less than or equal to 1000000",
    "MixtureOfExperts.experts = 20000": "MixtureOfExperts.experts = 20000: it should be less than or equal to 10000",
    "HyperConnections.streams = 1000000": "HyperConnections.streams = 1000000: it should be less than or equal to 1024",
    "GPT.n_layer = 0": "GPT.n_layer = 0: it should be greater than 0",
    "GPT.dropout = 1.0": "GPT.dropout = 1.0: it should be less than 1",
    "GPT.tie_embeddings = 1": "GPT.tie_embeddings = 1: it should be a valid boolean",
    "AdamW.lr = -1.0": "AdamW.lr = -1.0: it should be greater than 0",
    "AdamW.lr = 1e999": "AdamW.lr = inf: it should be a finite number",
    "AdamW.betas = [0.9, 0.95]": "AdamW.betas = [0.9, 0.95]: it should be a valid tuple",
    "Experiment.keep_checkpoints = 1": "Experiment.keep_checkpoints = 1: it should be greater than or equal to 2",
    "Experiment.precision = 'half'": "Experiment.precision = 'half': it should be 'auto', 'float32' or 'bfloat16'",
    # what changes nothing
    "RMSNorm.eps = 1e-6": "RMSNorm.eps changes nothing: no RMSNorm is built (GPT.norm is @LayerNorm)",
    "WIDTH = 3": "macro WIDTH is never used",
    "local/LayerNorm.eps = 1e-6": "no LayerNorm is built in the scope 'local'",
    # what is no gin, or not ours
    "GPT.tie_embeddings = true": f"not valid gin: a bare word is not a value {NOT_GIN}",
    "GPT.dim = 2 * 3": f"not valid gin: Expected newline {NOT_GIN}",
    "include 'x.gin'": "include is not supported: name x.gin on the command line instead",
    "import no_such_module": "can't import 'no_such_module': ModuleNotFoundError: No module named 'no_such_module'",
    "from __gin__ import dynamic_registration": (
        "dynamic registration is not supported: import the module and name its parts"
    ),
}


def message(*layers: str | Path, bindings: tuple[str, ...] = ()) -> str:
    """The message with which a config is refused."""
    with pytest.raises(ConfigError) as caught:
        compose([str(layer) for layer in layers], bindings)
    return str(caught.value)


@pytest.mark.parametrize("binding", WRONG)
def test_a_wrong_binding_on_the_command_line_names_itself(binding):
    quote = '"' if "'" in binding else "'"
    assert message(bindings=(binding,)) == f"-p {quote}{binding}{quote}: {WRONG[binding]}"


@pytest.mark.parametrize("binding", WRONG)
def test_a_wrong_binding_in_a_file_names_file_and_line(binding, tmp_path):
    overlay = tmp_path / "overlay.gin"
    overlay.write_text(f"# a comment\nExperiment.steps = 5000\n{binding}\n")
    assert message(overlay) == f"{overlay}:3: {WRONG[binding]}"


def test_a_wrong_binding_in_a_block_names_its_line(tmp_path):
    overlay = tmp_path / "overlay.gin"
    overlay.write_text("GPT:\n  dim = 64\n  n_haed = 4\n")
    assert message(overlay) == f"{overlay}:3: GPT has no parameter 'n_haed'; did you mean 'n_head'?"


def test_an_unfinished_value_is_no_gin():
    said = message(bindings=("GPT.dim = (1,",))  # Python words the middle differently from 3.12 on
    assert said.startswith("-p 'GPT.dim = (1,': not valid gin: ") and said.endswith(
        f"EOF in multi-line statement {NOT_GIN}"
    )


def test_all_problems_are_named_at_once(tmp_path):
    overlay = tmp_path / "overlay.gin"
    overlay.write_text("GTP.dim = 3\nGPT.n_layer = 0\n")
    assert message(overlay).splitlines() == [
        f"{overlay}:1: part not found: 'GTP'; did you mean 'GPT'?",
        f"{overlay}:2: GPT.n_layer = 0: it should be greater than 0",
    ]


def test_a_duplicate_in_one_file_is_refused(tmp_path):
    overlay = tmp_path / "overlay.gin"
    overlay.write_text("GPT.dim = 64\nGPT.n_head = 4\ntoolkit.model.GPT.dim = 128\n")
    expected = f"{overlay}:3: toolkit.model.GPT.dim is bound twice in {overlay}; the first is at {overlay}:1"
    assert message(overlay) == expected


def test_a_later_layer_may_displace_an_earlier_one(tmp_path):
    overlay = tmp_path / "overlay.gin"
    overlay.write_text("SwiGLU.hidden = 512\nGPT.dim = 96\n")
    config, _ = compose([overlay], ["GPT.ffn = @GELU", "GPT.dim = 192"])
    assert config.flat["GPT.dim"] == 192
    assert config.flat["GPT.ffn"] == "@GELU" and not any(key.startswith("SwiGLU") for key in config.flat)
    assert [str(binding) for binding in config.written] == [
        "SwiGLU.hidden = 512",
        "GPT.ffn = @GELU",
        "GPT.dim = 192",
    ]


def test_a_binding_laid_on_before_the_part_it_configures_says_so(tmp_path):
    overlay = tmp_path / "overlay.gin"
    overlay.write_text("RMSNorm.eps = 1e-5\n")
    said = message(overlay, bindings=("GPT.norm = @RMSNorm",))
    assert said == (
        f"{overlay}:1: RMSNorm.eps changes nothing: no RMSNorm is built (GPT.norm is @LayerNorm); "
        "a later file makes it take effect: put its file after that one"
    )


def test_scopes_configure_layers_that_differ():
    config, _ = compose(bindings=["GPT.norm = [@soft/RMSNorm, @RMSNorm]", "soft/RMSNorm.eps = 1e-3"])
    assert config.flat["soft/RMSNorm.eps"] == 1e-3 and config.flat["RMSNorm.eps"] == 1e-6
    said = message(bindings=("GPT.norm = [@soft/RMSNorm, @LayerNorm]", "sotf/RMSNorm.eps = 1e-3"))
    assert said == (
        "-p 'sotf/RMSNorm.eps = 1e-3': no RMSNorm is built in the scope 'sotf'; did you mean 'soft', as at "
        "-p 'GPT.norm = [@soft/RMSNorm, @LayerNorm]'?"
    )


def test_children_inherit_the_scope_of_the_part_that_builds_them():
    config, _ = compose(bindings=["Experiment.model = @wide/GPT", "wide/GPT.dim = 96", "wide/LayerNorm.eps = 1e-3"])
    assert config.flat["wide/GPT.dim"] == 96 and config.flat["wide/LayerNorm.eps"] == 1e-3
    experiment = config.build()
    model = experiment.model(100, 16)
    assert model.embed.weight.shape[1] == 96 and model.blocks[0].mixer_norm.eps == 1e-3


def test_a_slot_that_is_bound_in_a_scope_of_a_typo_says_where_and_which(tmp_path):
    base = tmp_path / "base.gin"
    text = (
        Path("gin/default.gin").read_text().replace("model = @GPT", "model = @wide/GPT").replace("\nGPT:", "\nwid/GPT:")
    )
    base.write_text(text)
    with pytest.raises(ConfigError) as caught:
        compose(base=base)
    line = 1 + text.splitlines().index("  norm = @LayerNorm")
    assert f"{base}:{line}: no GPT is built in the scope 'wid'; did you mean 'wide', as at {base}:5?" in str(
        caught.value
    )


def test_an_error_of_construction_names_the_bindings_it_speaks_of(tmp_path):
    overlay = tmp_path / "overlay.gin"
    overlay.write_text("# heads\nGPT.n_head = 7\n")
    with pytest.raises(ConfigError) as caught:
        try_build(compose(["gin/model/tiny.gin", str(overlay)], ["GPT.dim = 96"])[0])
    assert str(caught.value) == (
        "GPT.dim = 96 is not a multiple of GPT.n_head = 7 "
        f"(GPT.dim is at -p 'GPT.dim = 96', GPT.n_head is at {overlay}:2)"
    )
    with pytest.raises(
        ConfigError, match=r"^no_decay pattern .* \(AdamW.no_decay is at -p .*, Experiment.optimizer is"
    ):
        try_build(compose(["gin/model/tiny.gin"], ["AdamW.no_decay = ['nothing.*']"])[0])


@pytest.mark.parametrize(
    ("word", "known", "meant"),
    [("AdaWm", ("Adam", "AdamW"), "AdamW"), ("rl", ("lr", "eps"), "lr"), ("dimm", ("dim", "dims"), "dim")]
    + [("epz", ("lr", "eps"), "eps"), ("zzz", ("lr", "eps"), None), ("rmsnorm", ("RMSNorm", "LayerNorm"), "RMSNorm")],
)
def test_the_word_that_one_slip_makes_of_another_is_found(word, known, meant):
    assert nearest(word, known) == meant


def test_a_sample_of_the_mutants_of_the_default_is_noticed():
    every = [mutant for mutant in mutants.mutants() if not mutant.built]
    _, alive, _ = mutants.judge(every[::250])
    assert not alive and len(every) > 6000


def test_a_binding_that_a_closer_scope_always_wins_over_changes_nothing():
    said = message(bindings=("GPT.norm = @a/RMSNorm", "RMSNorm.eps = 1e-3", "a/RMSNorm.eps = 1e-4"))
    assert said.endswith(
        "RMSNorm.eps changes nothing: a binding in a narrower scope overrides it wherever RMSNorm is built"
    )


def test_macros_reach_what_uses_them_and_are_checked_there():
    config, _ = compose(bindings=["WIDTH = 96", "GPT.dim = %WIDTH"])
    assert config.flat["GPT.dim"] == 96
    said = message(bindings=("WIDTH = 'wide'", "GPT.dim = %WIDTH"))
    place = "-p \"WIDTH = 'wide'\""
    assert said == f"-p 'GPT.dim = %WIDTH': GPT.dim = 'wide': it should be a valid integer; WIDTH is at {place}"
    assert "refers to itself" in message(bindings=("A = %B", "B = %A", "GPT.dim = %A"))


def test_a_slot_that_its_sibling_does_not_use_is_refused(tmp_path):
    (tmp_path / "no_attention_part.py").write_text(
        "from torch import nn\n"
        "from toolkit.registry import register\n\n\n"
        '@register("mixer")\n'
        "class NoAttention(nn.Module):\n"
        '    ignores = ("attention", "position")\n'
        "    cache = False\n\n"
        "    def __init__(self, dim, n_head, n_kv_head, position, attention, depth):\n"
        "        super().__init__()\n\n"
        "    def forward(self, x, context):\n"
        "        return x\n"
    )
    part = str(tmp_path / "no_attention_part.py")
    config, files = compose(bindings=["GPT.mixer = @NoAttention"], imports=[part])
    assert config.flat["GPT.attention"] == "@FlashAttention" and files == [tmp_path / "no_attention_part.py"]
    with pytest.raises(ConfigError) as caught:
        compose(bindings=["GPT.mixer = @NoAttention", "GPT.attention = @SDPA"], imports=[part])
    assert str(caught.value) == "-p 'GPT.attention = @SDPA': GPT.attention changes nothing: NoAttention does not use it"
    mixed = ["GPT.mixer = [@NoAttention, @SelfAttention]", "GPT.attention = @SDPA"]
    assert compose(bindings=mixed, imports=[part])[0].flat["GPT.attention"] == "@SDPA"


def test_a_file_that_is_not_there_is_named():
    assert message("gin/norms/rmsnorm.gin") == (
        "gin/norms/rmsnorm.gin: file not found; did you mean gin/norm/rmsnorm.gin?"
    )
    assert message("nowhere.gin") == "nowhere.gin: file not found"


def test_an_incomplete_base_names_what_is_missing(tmp_path):
    base = tmp_path / "base.gin"
    base.write_text("Experiment.steps = 3\n")
    with pytest.raises(ConfigError, match=r"Experiment.model is not bound and has no default; bind it in .*base.gin"):
        compose(base=base)


def test_the_saved_config_is_complete_and_reads_back_as_itself(tmp_path):
    config, _ = compose(bindings=["GPT.norm = [@soft/RMSNorm, @LayerNorm]", "soft/RMSNorm.eps = 1e-3", "GPT.dim = 96"])
    saved = tmp_path / "config.gin"
    saved.write_text(config.text)
    again, _ = compose(base=saved)
    assert again.text == config.text and again.flat == config.flat and again.written == []


@pytest.mark.parametrize("overlay", sorted(str(p) for p in Path("gin").rglob("*.gin") if p != Path("gin/default.gin")))
def test_every_overlay_resolves_on_the_default(overlay):
    assert compose([overlay])[0].written
    assert len([line for line in Path(overlay).read_text().splitlines() if line.startswith("include")]) == 0


def test_the_folder_gin_holds_no_python_and_the_library_is_found():
    import gin

    assert not list(Path("gin").rglob("*.py")), "a Python file in gin/ would shadow the library"
    assert callable(gin.register)
