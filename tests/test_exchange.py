"""Each architecture of transformers is computed by our parts, and the proof refuses every planted error."""

from dataclasses import replace

import pytest
import torch
from exchanged import CASES, CONTEXT, FIRST, VOCAB, our_run, rope, their_config, their_model

from toolkit.architectures import ARCHITECTURES, Constant, Permuted, Rule, Transposed
from toolkit.architectures import architecture as register
from toolkit.exchange import choice, library, outgoing, proof, tensors
from toolkit.exchange.describe import describe

IDS = torch.randint(VOCAB, (2, CONTEXT), generator=torch.Generator().manual_seed(1))


def named(cases):
    return [pytest.param(*case, id=f"{case[0]}-{number}") for number, case in enumerate(cases)]


def error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).detach().abs().max() / ours.detach().abs().max())


# --- the architectures, in memory


def test_every_architecture_has_a_case():
    assert {model_type for model_type, _ in CASES} == ARCHITECTURES.keys()
    for each in ARCHITECTURES.values():
        assert each.__doc__


@pytest.mark.parametrize("model_type, entries", named(CASES))
def test_a_random_model_of_transformers_is_our_parts_and_its_weights_come_back_to_the_bit(model_type, entries):
    config = their_config(model_type, entries)
    theirs = their_model(config)
    run = our_run(config, theirs)
    with torch.no_grad():
        hidden, head = run.model(IDS)
        assert error(head.logits(hidden), theirs(IDS).logits[..., :VOCAB]) < proof.TOLERANCE
    before = library.tensors_of(theirs)
    shapes = {name: tuple(tensor.shape) for name, tensor in before.items()}
    back = tensors.move(ARCHITECTURES[model_type].rules(config), run.model.state_dict(), "theirs", shapes)
    assert back.keys() == before.keys()
    assert [name for name in before if not torch.equal(before[name], back[name])] == []
    _, proposed = choice.choose(describe(run), {}, model_type)
    again = ARCHITECTURES[model_type].layout(proposed)
    assert replace(again.sizes, vocab_size=0) == replace(ARCHITECTURES[model_type].layout(config).sizes, vocab_size=0)


@pytest.mark.parametrize("model_type, entries", named(FIRST))
def test_loss_and_gradients_at_step_0_are_those_of_transformers(model_type, entries):
    config = their_config(model_type, entries)
    theirs = their_model(config)
    run = our_run(config, theirs)
    hidden, head = run.model(IDS)
    ours = torch.nn.functional.cross_entropy(head.logits(hidden)[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
    loss = theirs(IDS, labels=IDS).loss
    assert abs(ours.item() - loss.item()) < 1e-5 * loss.item()
    ours.backward()
    loss.backward()
    named_gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    shapes = {name: tuple(parameter.shape) for name, parameter in run.model.named_parameters()}
    rules = [
        rule
        for rule in ARCHITECTURES[model_type].rules(config)
        if not isinstance(rule, Constant)  # the side that has it learns it, the other can't
    ]
    constants = {rule.name for rule in ARCHITECTURES[model_type].rules(config) if isinstance(rule, Constant)}
    moved = tensors.move(
        rules,
        {name: gradient for name, gradient in named_gradients.items() if name not in constants},
        "ours",
        {name: shape for name, shape in shapes.items() if name not in constants},
    )
    gradients = {name: parameter.grad for name, parameter in run.model.named_parameters()}
    largest = max(float(gradient.abs().max()) for gradient in gradients.values())
    for name, gradient in moved.items():
        assert float((gradients[name] - gradient).abs().max()) < 1e-5 * largest, name


def test_a_folded_embedding_scale_changes_the_gradient_of_the_table_and_nothing_else():
    """Gemma multiplies its embeddings by s = sqrt(C). A table of ours that holds s times theirs gives equal logits, and
    by the chain rule the gradient of that table alone is 1/s of theirs: the norm of all gradients differs, though
    mapping and gradients are right. GPT.embed_scale keeps the tables, and so the gradients, equal."""
    config = their_config("gemma2", dict(head_dim=8, query_pre_attn_scalar=8, tie_word_embeddings=False))
    theirs = their_model(config)
    run = our_run(config, theirs)
    folded = our_run(config, theirs, "GPT.embed_scale = 1.0")
    scale = 24**0.5
    folded.model.embed.weight.data *= scale
    gradients = []
    for model in (run.model, folded.model):
        hidden, head = model(IDS)
        logits = head.logits(hidden)
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()).backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()} | {"logits": logits})
    scaled, unscaled = gradients
    for name in scaled:
        factor = scale if name == "embed.weight" else 1.0
        assert error(scaled[name], factor * unscaled[name]) < 1e-5, name
    assert error(scaled["embed.weight"], unscaled["embed.weight"]) > 0.5


# --- planted errors: a wrong mapping, or a condition that is forgotten, is refused by the proof


def swapped(name: str, other: str):
    """Exchange the places of two tensors of theirs."""

    def change(rule):
        if isinstance(rule, Rule):
            for first, second in ((name, other), (other, name)):
                if first in rule.theirs:
                    return replace(rule, theirs=rule.theirs.replace(first, second))
        return rule

    return change


def altered(name: str, **entries):
    """Change the rules of those tensors of theirs that have this in their names."""
    return lambda rule: replace(rule, **entries) if isinstance(rule, Rule) and name in rule.theirs else rule


def rolled(count: int, by: int = 1) -> tuple[Permuted]:
    return (Permuted(tuple((i + by) % count for i in range(count))),)


def turned_neighbours(heads: int, head_dim: int) -> tuple[Permuted]:
    half = head_dim // 2
    order = (head * head_dim + i + part * half for head in range(heads) for i in range(half) for part in (0, 1))
    return (Permuted(tuple(order)),)


PLANTED_RULES = {
    "the rows of the vocabulary are off by one": ("llama", {}, altered("embed_tokens", changes=rolled(VOCAB))),
    "the output matrix is the embedding": ("llama", {}, altered("lm_head", ours="embed.weight")),
    "k and v are exchanged": ("llama", {}, swapped("k_proj", "v_proj")),
    "gate and up are exchanged": ("llama", {}, swapped("gate_proj", "up_proj")),
    "rows of q for neighbouring channels": ("llama", {}, altered("q_proj", changes=turned_neighbours(4, 6))),
    "neighbouring channels are not permuted": ("cohere", dict(logit_scale=1.0), altered("k_proj.weight", changes=())),
    "heads of k are in another order": ("llama", {}, altered("k_proj", changes=rolled(12, 6))),
    "the two norms of a layer are exchanged": ("llama", {}, swapped("input_layernorm", "post_attention_layernorm")),
    "a Conv1D is not transposed": ("gpt2", {}, altered("attn.c_proj.weight", changes=())),
    "positions are off by one": ("gpt2", {}, altered("wpe", changes=rolled(CONTEXT))),
    "biases of q, k and v are not together": ("gpt_neox", rope(1.0), altered("query_key_value.bias", changes=())),
    "q, k and v are not by head": ("gpt_neox", rope(1.0), altered("query_key_value.weight", changes=())),
    "experts are in another order": ("mixtral", {}, swapped("mlp.gate.weight", "mlp.gate.weight")),
    "the norms of q and k are exchanged": ("qwen3", {}, swapped("q_norm", "k_norm")),
}


@pytest.mark.parametrize("planted", PLANTED_RULES)
def test_a_planted_error_in_a_mapping_is_refused(planted, tmp_path, monkeypatch):
    model_type, entries, change = PLANTED_RULES[planted]
    config = their_config(model_type, entries)
    run = our_run(config, their_model(config))
    cls = type(ARCHITECTURES[model_type])
    rules = cls.rules
    if "experts" in planted:

        def change(rule):
            index = getattr(rule, "their_index", None)
            return rule if index is None else replace(rule, their_index=index ^ 1)

    def broken(self, config):
        changed = [change(rule) for rule in rules(self, config)]
        if "output matrix" in planted:  # the embedding is written twice, and the output matrix is not read
            changed.append(Constant("ours", "unembed.weight", float("nan")))
        return changed

    monkeypatch.setattr(cls, "rules", broken)
    monkeypatch.setattr(tensors, "_check_constant", lambda rule, tensor: None)
    with pytest.raises(ValueError, match="transformers does not compute what this model does"):
        outgoing.export(run, tmp_path / "out", tokenizer=False, only=model_type, measure=proof.measure_here)
    assert list(tmp_path.iterdir()) == []


FORGOTTEN = {  # conditions: what a run differs in from its architecture
    "the scale of the embeddings": ("gemma2", "GPT.embed_scale = 1.0"),
    "the soft cap of the logits": ("gemma2", "GPT.logit_softcap = None"),
    "the soft cap of the scores": ("gemma2", "FlexAttention.softcap = None"),
    "the gain that is learned minus one": ("gemma2", "RMSNorm.gain_minus_one = False"),
    "the window": ("mistral", "SlidingWindow.window = 8"),
    "the share of rotated channels": ("gpt_neox", "RoPE.fraction = 1.0"),
    "the base of the frequencies": ("llama", "RoPE.theta = 100.0"),
    "the approximation of GELU": ("gpt2", "GELU.tanh = False"),
    "the eps of the norms": ("llama", "RMSNorm.eps = 1e-2"),
    "the order of norm and rotation": ("qwen3", "SelfAttention.qk_norm_after_rotation = True"),
    "the number of experts of a token": ("mixtral", "MixtureOfExperts.top_k = 1"),
}


@pytest.mark.parametrize("forgotten", FORGOTTEN)
def test_a_condition_is_reported_and_if_it_were_forgotten_the_proof_would_refuse(forgotten, tmp_path, monkeypatch):
    model_type, *bindings = FORGOTTEN[forgotten]
    config = their_config(model_type, dict(FIRST)[model_type])
    run = our_run(config, their_model(config), *bindings)
    entries = config.to_dict() | {"model_type": model_type}
    monkeypatch.setattr(type(ARCHITECTURES[model_type]), "config", lambda self, model: entries)
    with pytest.raises(ValueError, match="must be"):
        outgoing.export(run, tmp_path / "out", tokenizer=False, only=model_type, measure=proof.measure_here)
    monkeypatch.setattr(choice, "mismatches", lambda layout, model: [])
    with pytest.raises(ValueError, match="transformers does not compute what this model does"):
        outgoing.export(run, tmp_path / "out", tokenizer=False, only=model_type, measure=proof.measure_here)
    assert list(tmp_path.iterdir()) == []


# --- rules, and architectures of others


def test_rules_that_leave_something_out_or_write_twice_are_refused():
    ours, theirs = {"a": torch.arange(6.0).view(3, 2)}, {"b": (3, 2)}
    whole = [Rule("a", "b")]
    assert torch.equal(tensors.move(whole, ours, "theirs", theirs)["b"], ours["a"])
    turned = [Rule("a", "b", changes=(Permuted((2, 0, 1)), Transposed()))]
    there = tensors.move(turned, ours, "theirs", {"b": (2, 3)})
    assert torch.equal(there["b"], ours["a"][[2, 0, 1]].T)
    assert torch.equal(tensors.move(turned, there, "ours", {"a": (3, 2)})["a"], ours["a"])
    for rules, message in (
        ([Rule("a", "b", rows=(0, 2), their_rows=(0, 2))], "2 of 6 numbers of a are not read"),
        ([*whole, *whole], "two rules write b"),
        ([Rule("a", "c")], "the transformers model lacks 1 tensors: c"),
        ([Rule("x", "b")], "our model lacks 1 tensors: x"),
        ([Rule("a", "b", rows=(0, 2))], "the sizes do not fit"),
        ([*whole, Constant("theirs", "bias")], "the transformers model lacks 1 tensors: bias"),
    ):
        with pytest.raises(ValueError, match=message):
            tensors.move(rules, ours, "theirs", theirs)
    constant = [*whole, Constant("ours", "bias")]
    with pytest.raises(ValueError, match="bias of our model has values other than 0"):
        tensors.move(constant, ours | {"bias": torch.ones(2)}, "theirs", theirs)
    filled = tensors.move([*whole, Constant("theirs", "bias", 2.0)], ours, "theirs", theirs | {"bias": (2,)})
    assert filled["bias"].tolist() == [2.0, 2.0]


def test_an_architecture_of_ones_own_is_registered_once_and_whole():
    with pytest.raises(ValueError, match="Incomplete lacks config, layout, rules"):
        register(type("Incomplete", (), {"model_type": "x"}))
    with pytest.raises(ValueError, match="Llama in components.architecture.llama already maps the model type 'llama'"):
        register(type("Other", (type(ARCHITECTURES["llama"]),), {}))
