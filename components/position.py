"""Position encodings. Each offers any of embed, rotate, score_bias; see toolkit/protocols.py."""

import math
from typing import Annotated

import torch
from annotated_types import Ge, Gt, Interval
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from toolkit.cpu.operation import operation
from toolkit.registry import register


@register("position")
class RoPE(nn.Module):
    """Rotary embedding (Su et al. 2021, arXiv:2104.09864): pair (i, i + R/2) of q and k turns by position *
    theta^(-2i/R). Half-rotation layout, as in GPT-NeoX and Llama checkpoints of Hugging Face; angles in float32.
    ``fraction`` of the head's D channels turn, the first R of them, an even number; the others pass (GPT-J, GPT-NeoX,
    Phi)."""

    def __init__(
        self,
        dim: int,
        n_head: int,
        head_dim: int,
        max_len: int,
        theta: Annotated[float, Gt(0)] = 10_000.0,
        fraction: Annotated[float, Interval(gt=0, le=1)] = 1.0,
    ):
        super().__init__()
        _check_pairs("RoPE", head_dim)
        self.theta, self.fraction, self.last = theta, fraction, (None, 0, None)

    def rotate(self, q, k, positions):
        turning = max(2, 2 * round(self.fraction * q.shape[-1] / 2))  # R
        cos, sin = self._angles_of(positions, turning)
        return _turn(q, cos, sin), _turn(k, cos, sin)

    def _angles_of(self, positions, turning):
        """All layers of a forward pass ask with one tensor of positions, and the first one's angles serve them all. A
        compiled graph finds out by itself."""
        if torch.compiler.is_compiling():
            return _angles(positions, _frequencies(turning, self.theta, positions.device))
        if self.last[0] is not positions or self.last[1] != turning:
            self.last = (positions, turning, _angles(positions, _frequencies(turning, self.theta, positions.device)))
        return self.last[2]


@register("position")
class LinearRoPE(nn.Module):
    """RoPE with positions divided by ``scale``, which fits a longer text into the angles of a shorter one (position
    interpolation: Chen et al. 2023, arXiv:2306.15595)."""

    def __init__(
        self,
        dim: int,
        n_head: int,
        head_dim: int,
        max_len: int,
        scale: Annotated[float, Ge(1)] = 4.0,
        theta: Annotated[float, Gt(0)] = 10_000.0,
    ):
        super().__init__()
        _check_pairs("LinearRoPE", head_dim)
        self.scale, self.theta = scale, theta

    def rotate(self, q, k, positions):
        cos, sin = _angles(positions, _frequencies(q.shape[-1], self.theta, q.device) / self.scale)
        return _turn(q, cos, sin), _turn(k, cos, sin)


@register("position")
class NTKRoPE(nn.Module):
    """RoPE with theta * scale^(D / (D - 2)) for theta: the slowest pair turns ``scale`` times slower, the fastest as
    before (NTK-aware interpolation: bloc97 2023; Peng et al. 2023, arXiv:2309.00071, section 3.1)."""

    def __init__(
        self,
        dim: int,
        n_head: int,
        head_dim: int,
        max_len: int,
        scale: Annotated[float, Ge(1)] = 4.0,
        theta: Annotated[float, Gt(0)] = 10_000.0,
    ):
        super().__init__()
        _check_pairs("NTKRoPE", head_dim)
        self.scale, self.theta = scale, theta

    def rotate(self, q, k, positions):
        width = q.shape[-1]
        theta = self.theta * self.scale ** (width / max(width - 2, 1))  # a lone pair turns at 1 whatever theta is
        cos, sin = _angles(positions, _frequencies(width, theta, q.device))
        return _turn(q, cos, sin), _turn(k, cos, sin)


@register("position")
class YaRN(nn.Module):
    """RoPE that slows its slow pairs down by ``scale`` and leaves its fast ones (Peng et al. 2023, arXiv:2309.00071).

    A pair that turns more than ``beta_fast`` times within ``original_len`` keeps its frequency, one that turns less
    than ``beta_slow`` times has it divided by ``scale``; between the two the blend is linear in the index of the pair,
    bounds rounded outwards, as in the authors' code. Attention gets the temperature of eq. 22: q and k are each
    multiplied by 0.1 ln(scale) + 1, so the scores by its square. ``original_len=None`` is max_len / scale."""

    def __init__(
        self,
        dim: int,
        n_head: int,
        head_dim: int,
        max_len: int,
        scale: Annotated[float, Ge(1)] = 4.0,
        original_len: Annotated[int, Gt(0)] | None = None,
        beta_fast: Annotated[float, Gt(0)] = 32.0,
        beta_slow: Annotated[float, Gt(0)] = 1.0,
        theta: Annotated[float, Gt(1)] = 10_000.0,
    ):
        super().__init__()
        _check_pairs("YaRN", head_dim)
        if beta_fast <= beta_slow:
            raise ValueError(
                f"YaRN.beta_fast = {beta_fast} has to be above YaRN.beta_slow = {beta_slow}: fast pairs turn more often"
            )
        self.scale, self.theta, self.betas = scale, theta, (beta_fast, beta_slow)
        self.original_len = original_len or max_len / scale
        self.gain = 0.1 * math.log(scale) + 1

    def rotate(self, q, k, positions):
        width = q.shape[-1]
        frequencies = _frequencies(width, self.theta, q.device)  # (D/2,)
        turns = (math.log(self.original_len / (2 * math.pi * beta)) for beta in self.betas)
        low, high = (width * turn / (2 * math.log(self.theta)) for turn in turns)  # pairs that turn beta times
        low = max(math.floor(low), 0)
        high = max(low, min(math.ceil(high), width - 1))
        pairs = torch.arange(width // 2, dtype=torch.float32, device=q.device)
        slowed = ((pairs - low) / ((high - low) or 0.001)).clamp(0, 1)  # 0 as before, 1 divided by scale
        cos, sin = _angles(positions, frequencies * (1 - slowed) + frequencies / self.scale * slowed)
        return _turn(q, self.gain * cos, self.gain * sin), _turn(k, self.gain * cos, self.gain * sin)


@register("position")
class XPos(nn.Module):
    """RoPE whose scores fade with distance (Sun et al. 2022, arXiv:2212.10554): pair i of q is multiplied by
    zeta_i^(position / scale_base) and that of k divided by it, zeta_i = (2i/D + 0.4) / 1.4, so that a score depends on
    the distance alone. Positions count from max_len / 2, which keeps both gains small; they are taken in float32."""

    def __init__(
        self,
        dim: int,
        n_head: int,
        head_dim: int,
        max_len: int,
        scale_base: Annotated[float, Gt(0)] = 512.0,
        theta: Annotated[float, Gt(0)] = 10_000.0,
    ):
        super().__init__()
        _check_pairs("XPos", head_dim)
        if max_len > 32 * scale_base:  # beyond gains of 3.5^16 = 5e8, products run towards the end of float32
            raise ValueError(
                f"XPos can't hold its gains in float32 over {max_len} positions (seq_len): they would pass 3.5^16; "
                f"set XPos.scale_base = {math.ceil(max_len / 32)} or more"
            )
        self.scale_base, self.theta, self.middle = scale_base, theta, max_len / 2

    def rotate(self, q, k, positions):
        width = q.shape[-1]
        cos, sin = _angles(positions, _frequencies(width, self.theta, q.device))
        zeta = (torch.arange(0, width, 2, dtype=torch.float32, device=q.device) / width + 0.4) / 1.4  # (D/2,)
        gain = zeta ** ((positions.float() - self.middle) / self.scale_base)[:, :, None, None]  # (B|1, T, 1, D/2)
        gain = torch.cat((gain, gain), dim=-1)
        return _turn(q, cos * gain, sin * gain), _turn(k, cos / gain, sin / gain)


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
class T5Bias(nn.Module):
    """A learned number per head and bucket of distances, added to the scores (Raffel et al. 2020, arXiv:1910.10683,
    section 2.1). The first half of the buckets are the distances 0, 1, 2 ..., the other half grow geometrically up to
    ``max_distance``, beyond which all share the last. T5 itself does not divide its scores by sqrt(D); ours are."""

    def __init__(
        self,
        dim: int,
        n_head: int,
        head_dim: int,
        max_len: int,
        num_buckets: Annotated[int, Ge(2)] = 32,
        max_distance: Annotated[int, Gt(0)] = 128,
    ):
        super().__init__()
        if max_distance <= num_buckets // 2:
            raise ValueError(
                f"T5Bias.max_distance = {max_distance} lies within the first {num_buckets // 2} buckets, which hold "
                f"a single distance each; set it above that, or lower T5Bias.num_buckets"
            )
        self.num_buckets, self.max_distance = num_buckets, max_distance
        self.table = nn.Embedding(num_buckets, n_head)

    def score_bias(self, q_positions, k_positions):
        distance = (q_positions[:, None] - k_positions).clamp(min=0)  # (T, S)
        exact = self.num_buckets // 2
        growth = (distance.clamp(min=exact) / exact).log() / math.log(self.max_distance / exact)
        far = exact + (growth * (self.num_buckets - exact)).long()
        buckets = torch.where(distance < exact, distance, far.clamp(max=self.num_buckets - 1))
        return self.table(buckets).permute(2, 0, 1)


@register("position")
class Kerple(nn.Module):
    """Scores fall with the logarithm of the distance, -r1_h * log(1 + r2_h * (i - j)), r1 and r2 learned per head
    (Chi et al. 2022, arXiv:2205.09921, the logarithmic variant). Both stay positive as exponentials of what is learned;
    they start uniform, r1 in (0, 2) and r2 in (0, 1), as in the authors' code."""

    def __init__(self, dim: int, n_head: int, head_dim: int, max_len: int):
        super().__init__()
        self.log_r1 = nn.Parameter((2 * torch.rand(n_head)).clamp(min=0.01).log())
        self.log_r2 = nn.Parameter(torch.rand(n_head).clamp(min=0.01).log())

    def score_bias(self, q_positions, k_positions):
        distance = (q_positions[:, None] - k_positions).clamp(min=0)  # (T, S)
        r1, r2 = (log.float().exp()[:, None, None] for log in (self.log_r1, self.log_r2))  # (H, 1, 1)
        return -r1 * torch.log1p(r2 * distance)


@register("position")
class NoPE(nn.Module):
    """No encoding at all: a causal model can still tell positions apart (Kazemnejad et al. 2023, arXiv:2305.19466)."""

    def __init__(self, dim: int, n_head: int, head_dim: int, max_len: int):
        super().__init__()


def _check_pairs(name, head_dim):
    if head_dim % 2:
        raise ValueError(f"{name} turns pairs: GPT.dim / GPT.n_head has to be even, not {head_dim}; change one of them")


def _frequencies(width, theta, device):
    """theta^(-2i/width) for the pairs i of ``width`` channels: (width/2,) in float32."""
    return theta ** -(torch.arange(0, width, 2, dtype=torch.float32, device=device) / width)


def _angles(positions: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine for positions (B|1, T) and frequencies (R/2,), each (B|1, T, 1, R) in float32: those of pair i
    stand at i and at i + R/2, the sine negative at i."""
    if torch.compiler.is_compiling() and positions.device.type == "cpu":  # else each kernel computes them once more
        return _angles_at_once(positions, frequencies)
    angles = positions.float()[:, :, None, None] * frequencies
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def _fake_angles(positions, frequencies):
    shape = (*positions.shape, 1, 2 * len(frequencies))
    return frequencies.new_empty(shape), frequencies.new_empty(shape)


_angles_at_once = operation("angles", _angles, _fake_angles)


def _turn(x, cos, sin):
    """The first R channels of x (B, T, H, D) turned, pair (i, i + R/2) by its angle; the rest as it was."""
    turning, rest = cos.shape[-1], x.shape[-1] - cos.shape[-1]
    wide = (x[..., :turning] if rest else x).float()
    if x.shape[1] > 1:  # for every head (B|1, T, H, R): long rows are what a CPU multiplies fast
        heads = (-1, -1, x.shape[2], -1)
        cos, sin = cos.expand(heads).contiguous(), sin.expand(heads).contiguous()
    if torch.compiler.is_compiling():  # which makes one pass of it, forward and backward
        partners = wide.unflatten(-1, (2, -1)).flip(-2).flatten(-2)  # channel i + R/2 in the place of i, and back
        turned = wide * cos + partners * sin
    else:
        turned = (_Turn.apply if torch.is_grad_enabled() else _turned)(wide, cos, sin)
    turned = turned.to(x.dtype)
    return torch.cat((turned, x[..., turning:]), dim=-1) if rest else turned


class _Turn(torch.autograd.Function):
    """The same in fewer passes over memory. Its gradient is turned back: by the same angles, the sines negated."""

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        cos, sin = ctx.saved_tensors
        return _turned(grad, cos, sin, -1), None, None


def _turned(x, cos, sin, sign=1):
    turned = x * cos
    (one, other), (x_one, x_other), (sin_one, sin_other) = (t.chunk(2, dim=-1) for t in (turned, x, sin))
    one.addcmul_(x_other, sin_one, value=sign)
    other.addcmul_(x_one, sin_other, value=sign)
    return turned
