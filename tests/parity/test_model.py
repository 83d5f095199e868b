"""Whole models against references that are not ours."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_gpt
from transformers.models.gpt2.modeling_gpt2 import GPT2Config, GPT2LMHeadModel
from transformers.models.llama import modeling_llama as llama

from components.attention import SDPA
from components.block import PreNorm
from components.ffn import GELU, SwiGLU
from components.loss import CrossEntropy
from components.mixer import SelfAttention
from components.norm import LayerNorm, RMSNorm
from components.position import Learned, RoPE
from parity.reference import llama_config, randomize


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
def test_a_whole_model_equals_llama(n_kv_head, tied, parity):
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
    parity("GPT", "transformers Llama, logits", head.logits(hidden), theirs(ids[:, :-1]).logits, 1e-5)
    mine, yours, my_gradient, your_gradient = losses_and_gradients(ours, theirs, ids)
    parity("GPT", "transformers Llama, loss", mine, yours, 1e-5)
    parity("GPT", "transformers Llama, gradient", my_gradient, your_gradient, 1e-4)


def test_a_whole_model_equals_gpt2(parity):
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
    parity("GPT", "transformers GPT-2, logits", head.logits(hidden), theirs(ids[:, :-1]).logits, 1e-5)
    mine, yours, my_gradient, your_gradient = losses_and_gradients(ours, theirs, ids)
    parity("GPT", "transformers GPT-2, loss", mine, yours, 1e-5)
    parity("GPT", "transformers GPT-2, gradient", my_gradient, your_gradient, 1e-4)
