"""Position encodings. Each offers any of embed, rotate, score_bias; see toolkit/protocols.py."""

import math
from typing import Annotated

import torch
from annotated_types import Gt
from torch import nn

from toolkit.registry import register


@register("position")
class RoPE(nn.Module):
    """Rotary embedding (Su et al. 2021, arXiv:2104.09864): pair (i, i + D/2) of q and k turns by position *
    theta^(-2i/D). Half-rotation layout, as in GPT-NeoX and Llama checkpoints of Hugging Face; angles in float32."""

    def __init__(self, dim: int, n_head: int, head_dim: int, max_len: int, theta: Annotated[float, Gt(0)] = 10_000.0):
        super().__init__()
        if head_dim % 2:
            raise ValueError(f"RoPE turns pairs, so it needs an even head dimension, not {head_dim}; change GPT.n_head")
        self.theta = theta
        cos, sin = self._angles(torch.arange(max_len), head_dim)
        self.register_buffer("cos", cos, persistent=False)  # (max_len, D/2)
        self.register_buffer("sin", sin, persistent=False)

    def rotate(self, q, k, positions):
        if q.shape[-1] == 2 * self.cos.shape[-1]:
            cos, sin = self.cos[positions], self.sin[positions]
        else:  # a mixer with heads of another size
            cos, sin = self._angles(positions, q.shape[-1])
        cos, sin = cos[:, :, None], sin[:, :, None]  # (B|1, T, 1, D/2)
        return self._turn(q, cos, sin), self._turn(k, cos, sin)

    def _angles(self, positions, head_dim):
        exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device) / head_dim
        angles = positions.float()[..., None] * self.theta**-exponent
        return angles.cos(), angles.sin()

    @staticmethod
    def _turn(x, cos, sin):
        a, b = x.float().chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


@register("position")
class Learned(nn.Module):
    """A trained vector per position, added to the embedded token (GPT-2): max_len * C parameters."""

    def __init__(self, dim: int, n_head: int, head_dim: int, max_len: int):
        super().__init__()
        self.table = nn.Embedding(max_len, dim)

    def embed(self, x, positions):
        return x + self.table(positions)


@register("position")
class Sinusoidal(nn.Module):
    """Fixed sines and cosines of geometric wavelengths, added to the embedded token (Vaswani et al. 2017, section 3.5;
    sines in the first half of the channels, cosines in the second). ``scale`` is the amplitude: the paper adds
    amplitude 1 to embeddings of about unit size, ours are drawn with a standard deviation of 0.02."""

    def __init__(self, dim: int, n_head: int, head_dim: int, max_len: int, scale: Annotated[float, Gt(0)] = 0.02):
        super().__init__()
        if dim % 2:
            raise ValueError(f"Sinusoidal needs an even width, not {dim}; change GPT.dim")
        exponent = torch.arange(0, dim, 2, dtype=torch.float32) / dim
        angles = torch.arange(max_len)[:, None] * 10_000.0**-exponent  # (max_len, C/2)
        self.register_buffer("table", scale * torch.cat((angles.sin(), angles.cos()), dim=-1), persistent=False)

    def embed(self, x, positions):
        return x + self.table[positions].to(x.dtype)


@register("position")
class ALiBi(nn.Module):
    """Scores fall linearly with distance, -slope_h * (i - j) (Press et al. 2021, arXiv:2108.12409). The slopes are
    2^(-8h/H) for H a power of two; otherwise those of the next lower power, then every other one of twice that."""

    def __init__(self, dim: int, n_head: int, head_dim: int, max_len: int):
        super().__init__()
        power = 2 ** math.floor(math.log2(n_head))
        slopes = [2 ** (-8 * h / power) for h in range(1, power + 1)]
        slopes += [2 ** (-4 * h / power) for h in range(1, 2 * (n_head - power) + 1, 2)]
        self.register_buffer("slopes", torch.tensor(slopes), persistent=False)  # (H,)

    def score_bias(self, q_positions, k_positions):
        distance = q_positions[:, None] - k_positions  # (T, S)
        return -self.slopes[:, None, None] * distance


@register("position")
class NoPE(nn.Module):
    """No encoding at all: a causal model can still tell positions apart (Kazemnejad et al. 2023, arXiv:2305.19466)."""

    def __init__(self, dim: int, n_head: int, head_dim: int, max_len: int):
        super().__init__()
