"""Every part against a reference that is not ours: PyTorch's modules, the transformers library, or the formula."""

import cmath
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import parts, tiny_gpt
from torch import nn
from transformers.models.bloom.modeling_bloom import build_alibi_tensor
from transformers.models.gpt2.modeling_gpt2 import GPT2Config, GPT2LMHeadModel
from transformers.models.gpt_neox import modeling_gpt_neox as neox
from transformers.models.llama import modeling_llama as llama
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.optimization import get_cosine_with_min_lr_schedule_with_warmup, get_wsd_schedule

from components.attention import SDPA, MathAttention
from components.block import Parallel, PostNorm, PreNorm
from components.ffn import GELU, SwiGLU
from components.init import GPT2Init
from components.loss import ChunkedCrossEntropy, CrossEntropy
from components.mixer import SelfAttention
from components.norm import LayerNorm, RMSNorm
from components.optimizer import SGD, AdamW
from components.position import ALiBi, Learned, NoPE, RoPE, Sinusoidal
from components.schedule import Constant, WarmupCosine, WarmupStableDecay
from toolkit.context import Context, Mask
from toolkit.model import Head


def relative_error(ours, theirs):
    """The largest difference, in units of the reference's largest value."""
    ours, theirs = (torch.as_tensor(x, dtype=torch.float64).detach() for x in (ours, theirs))
    assert ours.shape == theirs.shape
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def randomize(module, std=0.3):
    """Random numbers in every parameter, also where a part starts from zeros or ones."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0.0, std)
    return module


# --- attention kernels


def attention_loop(q, k, v, start=0, documents=None, bias=None):
    """softmax(q k^T / sqrt(D) + bias) v, one query at a time, in float64."""
    q, k, v = (t.detach().double() for t in (q, k, v))
    out, share = torch.zeros(*q.shape[:3], v.shape[-1], dtype=torch.float64), q.shape[2] // k.shape[2]
    for b in range(q.shape[0]):
        for t in range(q.shape[1]):
            for h in range(q.shape[2]):
                at = start + t
                seen = [s for s in range(at + 1) if documents is None or documents[b, s] == documents[b, at]]
                scores = [float(q[b, t, h] @ k[b, s, h // share]) / q.shape[3] ** 0.5 for s in seen]
                if bias is not None:
                    scores = [score + float(bias[h, t, s]) for score, s in zip(scores, seen, strict=True)]
                weights = [math.exp(score - max(scores)) for score in scores]
                for weight, s in zip(weights, seen, strict=True):
                    out[b, t, h] += weight / sum(weights) * v[b, s, h // share]
    return out


@pytest.mark.parametrize("n_kv_head", [4, 2, 1])
@pytest.mark.parametrize("part", parts("attention"))
def test_attention_equals_the_softmax_loop_and_torch(part, n_kv_head):
    if n_kv_head < 4 and "gqa" not in part.cls.supports:
        pytest.skip("no grouped heads")
    q, k, v = torch.randn(2, 9, 4, 8), torch.randn(2, 9, n_kv_head, 8), torch.randn(2, 9, n_kv_head, 8)
    out = part.cls(4, 8)(q, k, v)
    assert relative_error(out, attention_loop(q, k, v)) < 1e-6
    heads_first = (t.transpose(1, 2) for t in (q, k, v))
    mask = torch.ones(9, 9, dtype=torch.bool).tril()
    theirs = F.scaled_dot_product_attention(*heads_first, attn_mask=mask, enable_gqa=True).transpose(1, 2)
    assert relative_error(out, theirs) < 1e-6


@pytest.mark.parametrize("what", ["bias", "documents", "offset", "all"])
@pytest.mark.parametrize("part", parts("attention"))
def test_attention_under_a_mask_equals_the_softmax_loop(part, what):
    if not ({"bias", "documents", "offset"} if what == "all" else {what}) <= part.cls.supports:
        pytest.skip(f"{part.name} does not declare {what}")
    start = 4 if what in ("offset", "all") else 0
    queries = 9 - start - (1 if start else 0)  # an offset leaves a key beyond the last query: it is not to be seen
    q, k, v = torch.randn(2, queries, 4, 8), torch.randn(2, 9, 4, 8), torch.randn(2, 9, 4, 8)
    documents = torch.tensor([[0] * 3 + [1] * 6, [0] * 5 + [1, 2, 2, 2]]) if what in ("documents", "all") else None
    bias = torch.randn(4, queries, 9) if what in ("bias", "all") else None
    out = part.cls(4, 8)(q, k, v, Mask(torch.tensor(start), queries, 9, documents, bias))
    assert relative_error(out, attention_loop(q, k, v, start, documents, bias)) < 1e-6


@pytest.mark.parametrize("part", parts("attention"))
def test_attention_gradients_equal_torch(part):
    q, k, v = (torch.randn(2, 9, 4, 8, requires_grad=True) for _ in range(3))
    weight, heads_first = torch.randn(2, 9, 4, 8), [t.transpose(1, 2) for t in (q, k, v)]
    theirs = F.scaled_dot_product_attention(*heads_first, is_causal=True).transpose(1, 2)
    expected = torch.autograd.grad((theirs * weight).sum(), (q, k, v))
    ours = torch.autograd.grad((part.cls(4, 8)(q, k, v) * weight).sum(), (q, k, v))
    assert max(map(relative_error, ours, expected)) < 1e-5


# --- positions


def llama_config(**changes):
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4, vocab_size=50)
    sizes |= dict(intermediate_size=96, max_position_embeddings=64, rms_norm_eps=1e-6, pad_token_id=None)
    return LlamaConfig(**{**sizes, **changes})


def test_rope_turns_pairs_as_complex_numbers():
    q, k = torch.randn(1, 64, 4, 8), torch.randn(1, 64, 2, 8)
    turned = RoPE(32, 4, 8, 64).rotate(q, k, torch.arange(64)[None])
    for before, after in zip((q, k), turned, strict=True):
        expected = torch.zeros_like(before, dtype=torch.float64)
        for position in range(64):
            for pair in range(4):
                turn = cmath.exp(1j * position * 10_000 ** (-2 * pair / 8))
                z = torch.complex(before[..., pair], before[..., pair + 4])[:, position].to(torch.complex128) * turn
                expected[:, position, :, pair], expected[:, position, :, pair + 4] = z.real, z.imag
        assert relative_error(after, expected) < 1e-6


@pytest.mark.parametrize("theirs", [llama, neox], ids=["llama", "gpt-neox"])
@pytest.mark.parametrize("built_for", [8, 4], ids=["built for this head size", "for another"])
def test_rope_equals_transformers(theirs, built_for):
    q, k, positions = torch.randn(2, 64, 4, 8), torch.randn(2, 64, 2, 8), torch.arange(64)[None]
    cos, sin = llama.LlamaRotaryEmbedding(llama_config())(q, positions)
    expected = theirs.apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=2)
    turned = RoPE(4 * built_for, 4, built_for, 64).rotate(q, k, positions)
    assert max(map(relative_error, turned, expected)) < 1e-6


def test_rope_takes_positions_per_row_and_its_own_theta():
    q, positions = torch.randn(2, 9, 4, 8), torch.stack((torch.arange(9), torch.arange(40, 49)))
    config = llama_config(rope_parameters={"rope_type": "default", "rope_theta": 500_000.0})
    cos, sin = llama.LlamaRotaryEmbedding(config)(q, positions)
    expected = llama.apply_rotary_pos_emb(q, q, cos, sin, unsqueeze_dim=2)[0]
    assert relative_error(RoPE(32, 4, 8, 64, theta=500_000.0).rotate(q, q, positions)[0], expected) < 1e-6


def test_rope_scores_depend_on_the_distance_alone():
    rope, q, k = RoPE(32, 4, 8, 1024), torch.randn(1, 1, 4, 8), torch.randn(1, 1, 4, 8)

    def score(i, j):
        return (rope.rotate(q, q, torch.tensor([[i]]))[0] * rope.rotate(k, k, torch.tensor([[j]]))[0]).sum(-1)

    for shift in (1, 100, 1000):
        assert relative_error(score(20 + shift, 3 + shift), score(20, 3)) < 1e-4
    assert relative_error(score(20, 3), score(20, 4)) > 1e-2


def paper_slopes(n):
    """The function of the ALiBi paper's repository (ofirpress/attention_with_linear_biases)."""

    def power_of_2(n):
        start = 2 ** (-(2 ** -(math.log2(n) - 3)))
        return [start * start**i for i in range(n)]

    closest = 2 ** math.floor(math.log2(n))
    if closest == n:
        return power_of_2(n)
    return power_of_2(closest) + paper_slopes(2 * closest)[0::2][: n - closest]


@pytest.mark.parametrize("n_head", [1, 2, 6, 8, 12, 16, 20])
def test_alibi_equals_bloom_and_the_paper(n_head):
    alibi, at = ALiBi(32, n_head, 8, 64), torch.arange(64)
    assert relative_error(alibi.slopes, paper_slopes(n_head)) < 1e-6
    bias = alibi.score_bias(at, at)
    assert relative_error(bias[:, 40, 15], [-slope * 25 for slope in paper_slopes(n_head)]) < 1e-6
    theirs = build_alibi_tensor(torch.ones(1, 64), n_head, torch.float32)  # (H, 1, S): equal up to a constant a row
    assert relative_error(bias - bias[..., :1], (theirs - theirs[..., :1]).expand_as(bias)) < 1e-6


def test_sinusoidal_equals_the_formula():
    table = Sinusoidal(16, 4, 4, 1024, scale=1.0).embed(torch.zeros(1, 1024, 16), torch.arange(1024)[None])[0]
    expected = torch.zeros(1024, 16, dtype=torch.float64)
    for position in range(1024):
        for i in range(8):
            angle = position / 10_000 ** (2 * i / 16)
            expected[position, i], expected[position, 8 + i] = math.sin(angle), math.cos(angle)
    assert relative_error(table, expected) < 1e-4  # angles of up to 1023 in float32
    assert torch.equal(Sinusoidal(16, 4, 4, 1024).table, 0.02 * table)


# --- norms and feed-forward networks


def test_layernorm_equals_torch_and_the_formula():
    x, ours, torchs = torch.randn(5, 32).double() * 3 + 2, LayerNorm(32).double(), nn.LayerNorm(32).double()
    randomize(ours)
    torchs.load_state_dict(ours.state_dict())
    mean = x.mean(-1, keepdim=True)
    formula = (x - mean) / ((x - mean).square().mean(-1, keepdim=True) + 1e-5).sqrt() * ours.weight + ours.bias
    assert relative_error(ours(x), torchs(x)) < 1e-14 and relative_error(ours(x), formula) < 1e-14


@pytest.mark.parametrize("eps", [1e-6, 0.1])
def test_rmsnorm_equals_llama_torch_and_the_formula(eps):
    x, ours = torch.randn(5, 32).double() * 3 + 2, randomize(RMSNorm(32, eps=eps).double())
    torchs, llamas = nn.RMSNorm(32, eps=eps).double(), llama.LlamaRMSNorm(32, eps=eps)
    for reference in (torchs, llamas):
        reference.load_state_dict(ours.state_dict())
    formula = x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * ours.weight
    assert relative_error(ours(x), torchs(x)) < 1e-14 and relative_error(ours(x), formula) < 1e-14
    assert relative_error(ours.float()(x.float()), llamas(x.float())) < 1e-6
    plain = RMSNorm(32, eps=eps, gain=False)
    assert not list(plain.parameters()) and relative_error(plain(x), formula / ours.weight.double()) < 1e-6


@pytest.mark.parametrize("bias", [False, True])
def test_swiglu_equals_llama_and_the_formula(bias):
    x, ours = torch.randn(2, 5, 32), randomize(SwiGLU(32, hidden=96, bias=bias))
    theirs = llama.LlamaMLP(llama_config(mlp_bias=bias))
    halves = {"gate_proj": slice(0, 96), "up_proj": slice(96, 192)}
    with torch.no_grad():
        for ours_leaf, theirs_leaf in (("weight", "weight"), ("bias", "bias"))[: 1 + bias]:
            for name, rows in halves.items():
                getattr(getattr(theirs, name), theirs_leaf).copy_(getattr(ours.gate_up, ours_leaf)[rows])
            getattr(theirs.down_proj, theirs_leaf).copy_(getattr(ours.down, ours_leaf))
    assert relative_error(ours(x, Context()), theirs(x)) < 1e-6
    gate, up = (x @ ours.gate_up.weight[rows].T + (ours.gate_up.bias[rows] if bias else 0) for rows in halves.values())
    formula = (gate / (1 + (-gate).exp()) * up) @ ours.down.weight.T + (ours.down.bias if bias else 0)
    assert relative_error(ours(x, Context()), formula) < 1e-6


def test_gelu_equals_the_formula():
    x, ours = torch.randn(2, 5, 32), randomize(GELU(32, bias=True))
    up = x @ ours.up.weight.T + ours.up.bias
    formula = (0.5 * up * (1 + torch.erf(up / 2**0.5))) @ ours.down.weight.T + ours.down.bias
    assert relative_error(ours(x, Context()), formula) < 1e-6


@pytest.mark.parametrize("dim", [384, 768, 1024])
def test_default_widths_hold_as_many_parameters_as_the_plain_4c_network(dim):
    swiglu, gelu = (sum(p.numel() for p in ffn(dim).parameters()) for ffn in (SwiGLU, GELU))
    assert gelu == 8 * dim * dim and gelu <= swiglu < gelu + 3 * dim * 256


# --- mixer and blocks


def lone_context(position):
    context = Context(positions=torch.arange(13)[None])
    context.position, context.bias = [position], [None]
    return context


def copy_into(module, **tensors):
    """Load tensors by name, dots written as two underscores; every parameter has to be named."""
    module.load_state_dict({name.replace("__", "."): value for name, value in tensors.items()})
    return module


def test_self_attention_equals_torch_multihead_attention():
    x, ours = torch.randn(2, 13, 32), randomize(SelfAttention(32, 4, 4, 0, MathAttention, (0, 1), bias=True))
    theirs = copy_into(
        nn.MultiheadAttention(32, 4, batch_first=True),
        in_proj_weight=ours.qkv.weight,
        in_proj_bias=ours.qkv.bias,
        out_proj__weight=ours.out.weight,
        out_proj__bias=ours.out.bias,
    )
    future = torch.ones(13, 13, dtype=torch.bool).triu(1)
    expected = theirs(x, x, x, attn_mask=future, need_weights=False)[0]
    assert relative_error(ours(x, lone_context(NoPE(32, 4, 8, 13))), expected) < 1e-6


@pytest.mark.parametrize("block, norm_first", [(PreNorm, True), (PostNorm, False)])
def test_sequential_blocks_equal_torch_transformer_layers(block, norm_first):
    mixer = SelfAttention(32, 4, 4, 0, SDPA, (0, 1), bias=True)
    ours = randomize(block(32, mixer, GELU(32, bias=True), LayerNorm, (0, 1)))
    theirs = nn.TransformerEncoderLayer(32, 4, 128, 0.0, F.gelu, batch_first=True, norm_first=norm_first)
    pairs = {"self_attn.in_proj_": "mixer.qkv.", "self_attn.out_proj.": "mixer.out.", "linear1.": "ffn.up."}
    pairs |= {"linear2.": "ffn.down.", "norm1.": "mixer_norm.", "norm2.": "ffn_norm."}
    state = ours.state_dict()
    theirs.load_state_dict({a + leaf: state[b + leaf] for a, b in pairs.items() for leaf in ("weight", "bias")})
    x, future = torch.randn(2, 13, 32), torch.ones(13, 13, dtype=torch.bool).triu(1)
    expected = theirs(x, src_mask=future)
    assert relative_error(ours(x, lone_context(NoPE(32, 4, 8, 13))), expected) < 1e-6


def test_the_parallel_block_equals_the_formula():
    mixer, x = SelfAttention(32, 4, 4, 0, SDPA, (0, 1), bias=True), torch.randn(2, 13, 32)
    ours = randomize(Parallel(32, mixer, GELU(32, bias=True), LayerNorm, (0, 1)))
    n = F.layer_norm(x, (32,), ours.norm.weight, ours.norm.bias, 1e-5)
    q, k, v = F.linear(n, mixer.qkv.weight, mixer.qkv.bias).view(2, 13, 3, 4, 8).unbind(2)
    mixed = F.linear(attention_loop(q, k, v).flatten(2).float(), mixer.out.weight, mixer.out.bias)
    up, down = ours.ffn.up, ours.ffn.down
    expected = x + mixed + F.linear(F.gelu(F.linear(n, up.weight, up.bias)), down.weight, down.bias)
    assert relative_error(ours(x, lone_context(NoPE(32, 4, 8, 13))), expected) < 1e-6


# --- whole models


def losses_and_gradients(ours, theirs, ids):
    """Next-token cross-entropy of both models: our loss, theirs, and the gradients of the token tables."""
    hidden, head = ours(ids[:, :-1])
    mine = CrossEntropy()(hidden.flatten(0, 1), head, ids[:, 1:].flatten())[0] / ids[:, 1:].numel()
    yours = F.cross_entropy(theirs(ids[:, :-1]).logits.flatten(0, 1), ids[:, 1:].flatten())
    mine.backward()
    yours.backward()
    return mine, yours, ours.embed.weight.grad[:50], theirs.get_input_embeddings().weight.grad


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("n_kv_head", [4, 2])
def test_a_whole_model_equals_llama(n_kv_head, tied):
    slots = dict(block=PreNorm, position=RoPE, ffn=partial(SwiGLU, hidden=96), norm=RMSNorm, attention=SDPA)
    ours = randomize(tiny_gpt(50, 64, n_kv_head=n_kv_head, tie_embeddings=tied, pad_vocab_to=1, **slots))
    theirs = llama.LlamaForCausalLM(llama_config(num_key_value_heads=n_kv_head, tie_word_embeddings=tied)).train()
    state = {"model.embed_tokens.weight": ours.embed.weight, "model.norm.weight": ours.norm.weight}
    state["lm_head.weight"] = ours.embed.weight if tied else ours.unembed.weight
    for i, block in enumerate(ours.blocks):
        q, k, v = block.mixer.qkv.weight.split((32, 8 * n_kv_head, 8 * n_kv_head))
        gate, up = block.ffn.gate_up.weight.chunk(2)
        names = {"self_attn.q_proj": q, "self_attn.k_proj": k, "self_attn.v_proj": v}
        names |= {"self_attn.o_proj": block.mixer.out.weight, "mlp.gate_proj": gate, "mlp.up_proj": up}
        names |= {"mlp.down_proj": block.ffn.down.weight, "input_layernorm": block.mixer_norm.weight}
        names |= {"post_attention_layernorm": block.ffn_norm.weight}
        state |= {f"model.layers.{i}.{name}.weight": value for name, value in names.items()}
    theirs.load_state_dict(state)
    ids = torch.randint(50, (2, 65))
    hidden, head = ours(ids[:, :-1])
    assert relative_error(head.logits(hidden), theirs(ids[:, :-1]).logits) < 1e-5
    mine, yours, my_gradient, your_gradient = losses_and_gradients(ours, theirs, ids)
    assert relative_error(mine, yours) < 1e-5 and relative_error(my_gradient, your_gradient) < 1e-4


def test_a_whole_model_equals_gpt2():
    slots = dict(block=PreNorm, position=Learned, norm=LayerNorm, attention=SDPA)
    slots |= dict(mixer=partial(SelfAttention, bias=True), ffn=partial(GELU, bias=True))
    ours = randomize(tiny_gpt(50, 64, pad_vocab_to=64, **slots))
    config = GPT2Config(vocab_size=50, n_positions=64, n_embd=32, n_layer=2, n_head=4, activation_function="gelu")
    theirs = GPT2LMHeadModel(config).eval()
    pairs = {"ln_1": "mixer_norm", "attn.c_attn": "mixer.qkv", "attn.c_proj": "mixer.out", "ln_2": "ffn_norm"}
    pairs |= {"mlp.c_fc": "ffn.up", "mlp.c_proj": "ffn.down"}
    state = ours.state_dict()
    table = state["embed.weight"][:50]
    loaded = {"transformer.wte.weight": table, "lm_head.weight": table}
    loaded |= {"transformer.wpe.weight": state["positions.0.table.weight"]}
    loaded |= {f"transformer.ln_f.{leaf}": state[f"norm.{leaf}"] for leaf in ("weight", "bias")}
    for i in range(2):
        for theirs_name, ours_name in pairs.items():
            for leaf in ("weight", "bias"):
                value = state[f"blocks.{i}.{ours_name}.{leaf}"]  # their Conv1D holds the transpose of a Linear
                loaded[f"transformer.h.{i}.{theirs_name}.{leaf}"] = value.T if value.ndim == 2 else value
    theirs.load_state_dict(loaded)
    ids = torch.randint(50, (2, 65))
    hidden, head = ours(ids[:, :-1])
    assert relative_error(head.logits(hidden), theirs(ids[:, :-1]).logits) < 1e-5
    mine, yours, my_gradient, your_gradient = losses_and_gradients(ours, theirs, ids)
    assert relative_error(mine, yours) < 1e-5 and relative_error(my_gradient, your_gradient) < 1e-4


# --- optimizers and schedules


def steps(model, optimizer, count=5):
    ids = torch.randint(50, (4, 17), generator=torch.Generator().manual_seed(1))
    for _ in range(count):
        optimizer.zero_grad()
        hidden, head = model(ids[:, :-1])
        F.cross_entropy(head.logits(hidden).flatten(0, 1), ids[:, 1:].flatten()).backward()
        optimizer.step()
    return model.state_dict()


def hand_made_groups(model, weight_decay):
    """Everything with two dimensions decays, but the token table, which the test exempts by its name."""
    named = list(model.named_parameters())
    decay = [p for name, p in named if p.ndim >= 2 and name != "embed.weight"]
    no_decay = [p for name, p in named if p.ndim < 2 or name == "embed.weight"]
    return [{"params": decay, "weight_decay": weight_decay}, {"params": no_decay, "weight_decay": 0.0}]


def test_adamw_equals_torch_over_hand_made_groups():
    ours, theirs = tiny_gpt(), tiny_gpt()
    adamw = AdamW(ours, lr=1e-2, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.5, no_decay=("embed.*",))
    torchs = torch.optim.AdamW(hand_made_groups(theirs, 0.5), lr=1e-2, betas=(0.8, 0.9), eps=1e-6, foreach=False)
    mine, yours = steps(ours, adamw), steps(theirs, torchs)
    assert max(relative_error(mine[name], yours[name]) for name in yours) < 1e-4


def test_adamw_equals_the_formula():
    layer, lr, b1, b2, eps, decay = nn.Linear(8, 8, bias=False), 1e-2, 0.9, 0.95, 1e-8, 0.1
    optimizer, w = AdamW(layer, lr=lr), layer.weight.detach().double().clone()
    m = v = torch.zeros(8, 8)
    for t in range(1, 6):
        gradient = torch.randn(8, 8, dtype=torch.float64)
        layer.weight.grad = gradient.float()
        optimizer.step()
        m, v = b1 * m + (1 - b1) * gradient, b2 * v + (1 - b2) * gradient**2
        w = w * (1 - lr * decay) - lr * (m / (1 - b1**t)) / ((v / (1 - b2**t)).sqrt() + eps)
    assert relative_error(layer.weight, w) < 1e-6


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_equals_torch_over_hand_made_groups(nesterov):
    ours, theirs = tiny_gpt(), tiny_gpt()
    sgd = SGD(ours, lr=1e-2, momentum=0.8, nesterov=nesterov, weight_decay=0.5, no_decay=("embed.*",))
    torchs = torch.optim.SGD(hand_made_groups(theirs, 0.5), lr=1e-2, momentum=0.8, nesterov=nesterov, foreach=False)
    mine, yours = steps(ours, sgd), steps(theirs, torchs)
    assert max(relative_error(mine[name], yours[name]) for name in yours) < 1e-5


def rates(make, count):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule, out = make(optimizer), []
    for _ in range(count):
        out.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return out


def test_warmup_cosine_equals_transformers():
    """Ours takes its first step at 1/warmup, not 0, and ends at the last step, not after it: both shown here."""
    theirs = rates(lambda o: get_cosine_with_min_lr_schedule_with_warmup(o, 20, 99, min_lr_rate=0.1), 100)
    ours = [WarmupCosine(100, warmup_steps=20, final_fraction=0.1)(step) for step in range(100)]
    assert relative_error(ours[:19], theirs[1:20]) < 1e-12 and ours[19] == 1.0
    assert relative_error(ours[20:], theirs[20:]) < 1e-12


def test_warmup_stable_decay_equals_transformers():
    """After the warm-up: theirs ramps up from the minimum, ours from zero."""
    linear = dict(warmup_type="linear", decay_type="linear", num_training_steps=100, min_lr_ratio=0.2)
    theirs = rates(lambda o: get_wsd_schedule(o, num_warmup_steps=20, num_decay_steps=30, **linear), 100)
    schedule = WarmupStableDecay(100, warmup_steps=20, decay_fraction=0.3, final_fraction=0.2)
    ours = [schedule(step) for step in range(100)]
    assert relative_error(ours[:20], [(step + 1) / 20 for step in range(20)]) < 1e-12
    assert relative_error(ours[20:], theirs[20:]) < 1e-12


def test_constant_is_a_ramp_and_then_one():
    assert [Constant(6, warmup_steps=4)(step) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


# --- the chunked loss


def cross_entropy(hidden, weight, targets, softcap, vocab=50):
    logits = (hidden @ weight.T)[:, :vocab]
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits, targets, reduction="sum")


def loss_inputs(dtype=torch.float32):
    hidden, weight, targets = torch.randn(37, 16), torch.randn(64, 16), torch.randint(50, (37,))
    targets[[0, 5, 6, 7, 30]] = -100
    return hidden.to(dtype).requires_grad_(), weight.requires_grad_(), targets


@pytest.mark.parametrize("rows", [1, 8, 36, 37, 1000, None])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_chunked_cross_entropy_equals_torch_in_value_and_gradients(softcap, rows):
    hidden, weight, targets = loss_inputs()
    expected = cross_entropy(hidden, weight, targets, softcap)
    objective, nats, count = ChunkedCrossEntropy(rows=rows)(hidden, Head(weight, 50, softcap), targets)
    assert relative_error(objective, expected) < 1e-6 and torch.equal(objective, nats) and count == 32
    ours = torch.autograd.grad(3.0 * objective, (hidden, weight))  # a factor: the chain rule goes on
    theirs = torch.autograd.grad(3.0 * expected, (hidden, weight))
    assert max(map(relative_error, ours, theirs)) < 1e-5
    with torch.no_grad():
        evaluated = ChunkedCrossEntropy(rows=rows)(hidden, Head(weight, 50, softcap), targets)[0]
    assert relative_error(evaluated, expected) < 1e-6


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_chunked_cross_entropy_differentiates_what_asks_for_it(frozen):
    hidden, weight, targets = loss_inputs()
    {"hidden": hidden, "weight": weight}[frozen].requires_grad_(False)
    wanted = weight if frozen == "hidden" else hidden
    ours = torch.autograd.grad(ChunkedCrossEntropy(rows=8)(hidden, Head(weight, 50, None), targets)[0], wanted)
    assert relative_error(ours[0], torch.autograd.grad(cross_entropy(hidden, weight, targets, None), wanted)[0]) < 1e-5


def test_chunked_cross_entropy_survives_large_logits():
    hidden, weight, targets = loss_inputs()
    value = ChunkedCrossEntropy(rows=8)(hidden * 1e3, Head(weight, 50, None), targets)[0]
    assert relative_error(value, cross_entropy(hidden * 1e3, weight, targets, None)) < 1e-6


def test_chunked_cross_entropy_under_autocast_stays_near_float32():
    hidden, weight, targets = loss_inputs()
    expected = cross_entropy(hidden, weight, targets, None)
    with torch.autocast("cpu", torch.bfloat16):
        value = ChunkedCrossEntropy(rows=8)(hidden, Head(weight, 50, None), targets)[0]
    assert value.dtype == torch.float32 and relative_error(value, expected) < 0.01
    for ours, theirs in zip(*(torch.autograd.grad(x, (hidden, weight)) for x in (value, expected)), strict=True):
        assert ours.dtype == torch.float32 and (ours - theirs).norm() < 0.02 * theirs.norm()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        evaluated = ChunkedCrossEntropy(rows=8)(hidden, Head(weight, 50, None), targets)[0]
    assert relative_error(evaluated, value) < 1e-6


class Loss(nn.Module):
    """Model and loss, as the toolkit compiles them; ``chunked`` or F.cross_entropy over all logits."""

    def __init__(self, model, chunked):
        super().__init__()
        self.model, self.chunked = model, ChunkedCrossEntropy(rows=8) if chunked else None

    def forward(self, ids, targets):
        hidden, head = self.model(ids)
        if self.chunked is not None:
            return self.chunked(hidden.flatten(0, 1), head, targets.flatten())[0]
        return F.cross_entropy(head.logits(hidden).flatten(0, 1), targets.flatten(), reduction="sum")


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own, on any Function
def test_chunked_cross_entropy_compiles_with_the_model_into_one_graph_and_equals_torch():
    model, ids, targets = tiny_gpt(n_layer=1), torch.randint(50, (2, 13)), torch.randint(50, (2, 13))
    targets[0, :5] = -100
    expected = Loss(model, chunked=False)(ids, targets)
    gradients = torch.autograd.grad(expected, list(model.parameters()))
    compiled = Loss(model, chunked=True)
    torch.compiler.reset()
    compiled.compile(backend="aot_eager", fullgraph=True)
    value = compiled(ids, targets)
    assert relative_error(value, expected) < 1e-6
    assert max(map(relative_error, torch.autograd.grad(value, list(model.parameters())), gradients)) < 1e-4
    with torch.no_grad():
        assert relative_error(compiled(ids, targets), expected) < 1e-6


# --- the documented model


def test_gpt2_init_has_the_published_standard_deviations():
    model = tiny_gpt(
        512, init=GPT2Init, dim=256, n_layer=3, mixer=partial(SelfAttention, bias=True), ffn=partial(GELU, bias=True)
    )
    for name, parameter in model.named_parameters():
        if "norm" in name:
            assert (parameter == (1.0 if name.endswith("weight") else 0.0)).all(), name
        elif parameter.ndim == 1:
            assert (parameter == 0).all(), name
        else:
            residual = name.endswith(("mixer.out.weight", "ffn.down.weight"))
            std = 0.02 / (2 * 3) ** 0.5 if residual else 0.02
            assert parameter.std().item() == pytest.approx(std, rel=0.02), name
            assert abs(parameter.mean().item()) < 0.02 * std, name


@pytest.mark.parametrize("vocab_size, expected", [(100_277, 161_985_792), (50_257, 123_570_432)])
def test_the_documented_model_has_the_documented_parameters(vocab_size, expected):
    with torch.device("meta"):
        model = tiny_gpt(vocab_size, 1024, dim=768, n_layer=12, n_head=12, pad_vocab_to=128, init=GPT2Init)
    assert sum(p.numel() for p in model.parameters()) - model.padding == expected


def test_the_loss_at_step_0_is_what_the_init_implies():
    """Hidden states of norm sqrt(768) and rows of std 0.02 give logits of variance 768 * 0.02^2: ln V plus half of it.
    One layer shows it as twelve do, since residual projections shrink with the depth."""
    model = tiny_gpt(100_277, 64, dim=768, n_layer=1, n_head=12, pad_vocab_to=128, attention=SDPA, init=GPT2Init)
    ids = torch.randint(100_277, (4, 65))
    with torch.no_grad():
        hidden, head = model(ids[:, :-1])
        _, nats, count = ChunkedCrossEntropy()(hidden.flatten(0, 1), head, ids[:, 1:].flatten())
    assert (nats / count).item() == pytest.approx(11.67, abs=0.1)
    assert (nats / count).item() == pytest.approx(math.log(100_277) + 0.02**2 * 768 / 2, abs=0.1)
