"""What the parity tests share: an error measure, random parameters, a Llama config."""

import math

import torch
from transformers.models.llama.configuration_llama import LlamaConfig

from toolkit.context import Context


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


def llama_config(**changes):
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4, vocab_size=50)
    sizes |= dict(intermediate_size=96, max_position_embeddings=64, rms_norm_eps=1e-6, pad_token_id=None)
    return LlamaConfig(**{**sizes, **changes})


def attention_loop(q, k, v, start=0, documents=None, bias=None, window=None, softcap=None, weigh=None):
    """softmax(q k^T / sqrt(D) + bias) v, one query at a time, in float64. ``window`` leaves the last keys alone,
    ``softcap`` bounds the scores before the bias, ``weigh`` maps a list of scores to weights in place of softmax."""
    q, k, v = (t.detach().double() for t in (q, k, v))
    out, share = torch.zeros(*q.shape[:3], v.shape[-1], dtype=torch.float64), q.shape[2] // k.shape[2]
    for b in range(q.shape[0]):
        for t in range(q.shape[1]):
            for h in range(q.shape[2]):
                at = start + t
                seen = [s for s in range(at + 1) if documents is None or documents[b, s] == documents[b, at]]
                seen = [s for s in seen if window is None or s > at - window]
                scores = [float(q[b, t, h] @ k[b, s, h // share]) / q.shape[3] ** 0.5 for s in seen]
                if softcap is not None:
                    scores = [softcap * math.tanh(score / softcap) for score in scores]
                if bias is not None:
                    scores = [score + float(bias[h, t, s]) for score, s in zip(scores, seen, strict=True)]
                for weight, s in zip((weigh or softmax)(scores), seen, strict=True):
                    out[b, t, h] += weight * v[b, s, h // share]
    return out


def softmax(scores):
    weights = [math.exp(score - max(scores)) for score in scores]
    return [weight / sum(weights) for weight in weights]


def lone_context(position):
    context = Context(positions=torch.arange(13)[None])
    context.position, context.bias = [position], [None]
    return context
