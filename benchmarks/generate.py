"""``python -m benchmarks.generate``: tokens per second of generation by this toolkit and by transformers, in turn.

The peer is transformers' StableLM, which is our default architecture (rotary positions, LayerNorm, SwiGLU, tied
embeddings), with our weights, so both must generate the same tokens. It runs ``generate`` with its cache, and with
recomputation (``use_cache=False``). The time of a recomputed step depends on the length of the text, so it is the mean
over 8 lengths from the first to the last. Both times include the prompt, except on a GPU, where our step is compiled
and our time starts after the compilation. It takes about four minutes on two cores."""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

from benchmarks import measure
from components.attention import FlashAttention
from components.block import PreNorm
from components.ffn import SwiGLU
from components.init import GPT2Init
from components.mixer import SelfAttention
from components.norm import LayerNorm
from components.position import RoPE
from toolkit.command import run_command
from toolkit.loop.sampling import stream
from toolkit.model import GPT

PROMPT, LENGTHS = 32, 8
SLOTS = {"block": PreNorm, "mixer": SelfAttention, "position": RoPE, "attention": FlashAttention}
# Large initial weights: otherwise an untrained model repeats one token, and near ties between tokens are frequent.
SLOTS |= {"norm": LayerNorm, "ffn": SwiGLU, "init": partial(GPT2Init, std=0.1)}


def main(argv: list[str] | None = None) -> int:
    """The command."""
    arguments = _arguments(argv)
    torch.set_num_threads(arguments.threads or torch.get_num_threads())
    device, started = torch.device("cuda" if torch.cuda.is_available() else "cpu"), time.perf_counter()
    tables = [speed(vocab, batch, arguments, device) for vocab in arguments.vocab for batch in arguments.batch]
    minutes = (time.perf_counter() - started) / 60

    def show() -> None:
        for found in tables:
            measure.table(**found["table"])
        print(f"{minutes:.1f} minutes")

    measure.report(arguments.json, {"benchmark": "generate", "minutes": minutes, "tables": tables}, show)
    return 0


def speed(vocab: int, batch: int, arguments: argparse.Namespace, device: torch.device) -> dict[str, object]:
    """Tokens per second of each way to generate, and the share of its bound that ours reaches."""
    tokens = arguments.tokens or (512 if vocab < 50_000 or device.type == "cuda" else 128)
    model = GPT(vocab, 640, dim=arguments.dim, n_layer=arguments.layers, n_head=arguments.heads, **SLOTS)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model, peer = (one.to(device, dtype).eval() for one in (model, transplant(model)))
    prompt = torch.randint(vocab, (PROMPT,), generator=torch.Generator().manual_seed(1)).tolist()
    wanted = {"temperature": arguments.temperature, "top_p": arguments.top_p}
    compiled = arguments.compile or device.type == "cuda"
    recorded = 8 if compiled else 0  # tokens during which the step is compiled, or recorded as a CUDA graph
    sampled = {"do_sample": arguments.temperature > 0, "eos_token_id": None, "pad_token_id": 0}
    if arguments.temperature > 0:
        sampled |= {"temperature": arguments.temperature, "top_p": arguments.top_p or 1.0, "top_k": 0}

    def ours() -> torch.Tensor:
        return torch.stack(list(stream(model, prompt, tokens, num=batch, compiled=compiled, **wanted)), dim=1)

    def our_rate() -> float:
        texts = stream(model, prompt, tokens, num=batch, compiled=compiled, **wanted)
        for _ in range(recorded):
            next(texts)
        return batch * (tokens - recorded) / timed(lambda: list(texts))

    def theirs(text: list[int], new: int, cache: bool) -> torch.Tensor:
        ids = torch.tensor([text] * batch, device=device)
        options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": new, "min_new_tokens": new}
        return peer.generate(ids, use_cache=cache, **options, **sampled)[:, ids.shape[1] :]

    timed = partial(measure.seconds, device=device, clock=arguments.clock)
    written = ours()
    same = (written == theirs(prompt, tokens, cache=True)).float().mean().item() if arguments.temperature == 0 else None

    def recompute() -> float:
        text = prompt + written[0].tolist()
        lengths = [PROMPT + round(i * (tokens - 1) / (LENGTHS - 1)) for i in range(LENGTHS)]
        return sum(timed(lambda n=n: theirs(text[:n], 1, cache=False)) for n in lengths) / LENGTHS

    turns = {
        "toolkit": our_rate,
        "transformers": lambda: batch * tokens / timed(lambda: theirs(prompt, tokens, cache=True)),
        "transformers, recomputing": lambda: batch / recompute(),
    }
    rounds = measure.interleave(turns, arguments.rounds, probe(model, batch, timed), arguments.repeats)
    bound = rounds.of_bound("toolkit", batch)
    ratios = {peer: rounds.ratio("toolkit", peer) for peer in turns if peer != "toolkit"}
    rows = [[name, rounds.spread(name).show(0), ratios[name].show() if name in ratios else ""] for name in turns]
    title = f"generation, vocabulary {vocab:,}, {arguments.dim} wide, {arguments.layers} layers, batch {batch}: "
    title += f"{tokens} tokens after {PROMPT}, " + _manner(arguments)
    caption = f"Median (lowest to highest): {rounds.summary()}.\nOurs is {bound.show()} of what the matrix products of "
    caption += "a step alone allow." + (f" It is timed from token {recorded} on." if recorded else "")
    if same is not None:
        caption += f" Tokens equal to the peer's: {same:.1%}."
    table = {"title": title, "columns": ["", "tokens/s", "toolkit over it"], "rows": rows, "caption": caption}
    found = {"vocab": vocab, "batch": batch, "tokens": tokens, "manner": _manner(arguments), "same": same}
    return found | {"tokens_per_s": rounds.values, "ratio": ratios, "of_bound": bound, "table": table}


def probe(model: GPT, batch: int, timed: Callable[..., float]) -> Callable[[], float]:
    """A function that returns the seconds of the matrix products of one step, as the mean over 20."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim == 2]
    inputs = [matrix.new_ones(batch, matrix.shape[1]) for matrix in matrices]

    @torch.inference_mode()
    def products() -> None:
        for x, matrix in zip(inputs, matrices, strict=True):
            F.linear(x, matrix)

    products()
    return lambda: timed(products, times=20) / 20


def transplant(model: GPT) -> torch.nn.Module:
    """Build transformers' StableLM with the weights of ``model``."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # from transformers itself, at import
        from transformers import StableLmConfig, StableLmForCausalLM
    mixer, ffn = model.blocks[0].mixer, model.blocks[0].ffn
    heads, width = model.embed.embedding_dim // mixer.head_dim, model.embed.embedding_dim
    config = StableLmConfig(
        vocab_size=model.vocab_size,
        hidden_size=width,
        intermediate_size=ffn.down.in_features,
        num_hidden_layers=len(model.blocks),
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=model.max_len,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 1.0},
        layer_norm_eps=1e-5,
        use_qkv_bias=False,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    peer = StableLmForCausalLM(config)
    ours = {"model.embed_tokens.weight": model.embed.weight[: model.vocab_size]}
    for at, block in enumerate(model.blocks):
        here = f"model.layers.{at}."
        q, k, v = block.mixer.qkv.weight.chunk(3)
        gate, up = block.ffn.gate_up.weight.chunk(2)
        ours |= {f"{here}self_attn.{name}_proj.weight": w for name, w in zip("qkv", (q, k, v), strict=True)}
        ours |= {f"{here}self_attn.o_proj.weight": block.mixer.out.weight, f"{here}mlp.gate_proj.weight": gate}
        ours |= {f"{here}mlp.up_proj.weight": up, f"{here}mlp.down_proj.weight": block.ffn.down.weight}
        for name, norm in (("input_layernorm", block.mixer_norm), ("post_attention_layernorm", block.ffn_norm)):
            ours |= {f"{here}{name}.weight": norm.weight, f"{here}{name}.bias": norm.bias}
    ours |= {"model.norm.weight": model.norm.weight, "model.norm.bias": model.norm.bias}
    left = peer.load_state_dict(ours, strict=False)
    assert left.missing_keys == ["lm_head.weight"] and not left.unexpected_keys, left
    return peer


def _manner(arguments: argparse.Namespace) -> str:
    if arguments.temperature == 0:
        return "greedy"
    return f"temperature {arguments.temperature}" + (f", top_p {arguments.top_p}" if arguments.top_p else "")


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.generate", description=__doc__.split(": ", 1)[1])
    add = parser.add_argument
    add("--vocab", type=int, nargs="+", default=[8192, 100_277])
    add("--batch", type=int, nargs="+", default=[1, 8], help="texts at once (default: 1 8)")
    add("--tokens", type=int, help="new tokens (default: 512; on a CPU 128 for a vocabulary of 50,000 or more)")
    add("--temperature", type=float, default=0.0, help="0 is greedy (default: 0)")
    add("--top-p", type=float)
    gpu = torch.cuda.is_available()
    add("--dim", type=int, default=768 if gpu else 256, help="width (default: 256, on a GPU 768)")
    add("--layers", type=int, default=12 if gpu else 4, help="(default: 4, on a GPU 12)")
    add("--heads", type=int, default=12 if gpu else 4, help="(default: 4, on a GPU 12)")
    add("--compile", action="store_true", help="compile our step on a CPU as well; on a GPU it is always compiled")
    add("--rounds", type=int, default=5)
    add("--repeats", type=int, help="largest number of unsteady rounds to run again (default: as many as rounds)")
    add("--threads", type=int, help="PyTorch's threads on a CPU")
    measure.add_cpu_time_flag(parser)
    add("--json", action="store_true", help="print one JSON object")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_command(main)
