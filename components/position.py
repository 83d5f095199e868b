"""Position encodings. Each has one or more of the methods embed, rotate and score_bias; see toolkit/protocols.py."""

import math
from typing import Annotated

import torch
from annotated_types import Ge, Gt, Interval
from torch import Tensor, nn

from toolkit.cpu import rotation
from toolkit.cpu.rotation import OncePerPass, opaque
from toolkit.registry import register


@register("position")
class RoPE(nn.Module):
    """Rotary embedding (Su et al. 2021, arXiv:2104.09864): pair (i, i + R/2) of q and k is rotated by the angle
    position * theta^(-2i/R). The pairs are those of GPT-NeoX and of Llama checkpoints of Hugging Face; angles are
    computed in float32.

    theta     base of the frequencies
    fraction  how many of the D channels of a head are rotated: the first R = fraction * D, rounded to an even number;
              the others stay as they are (GPT-J, GPT-NeoX, Phi)
    """

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
        self.theta, self.fraction, self.angles = theta, fraction, OncePerPass(_rope_angles)

    def rotate(self, q: Tensor, k: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:  # (B,T,H,D), (B,T,G,D), (B|1,T)
        width = max(2, 2 * round(self.fraction * q.shape[-1] / 2))  # R
        cos, sin = self.angles(positions, width, self.theta)
        return _rotate(q, cos, sin), _rotate(k, cos, sin)


@register("position")
class LinearRoPE(nn.Module):
    """RoPE with positions divided by ``scale``, so that a longer text uses the angles of a shorter one (position
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

    def rotate(self, q: Tensor, k: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:  # (B,T,H,D), (B,T,G,D), (B|1,T)
        cos, sin = _angles(positions, _frequencies(q.shape[-1], self.theta, q.device) / self.scale)
        return _rotate(q, cos, sin), _rotate(k, cos, sin)


@register("position")
class NTKRoPE(nn.Module):
    """RoPE with theta * scale^(D / (D - 2)) in place of theta: the slowest pair rotates ``scale`` times slower, and the
    fastest pair rotates as before (NTK-aware interpolation: bloc97 2023; Peng et al. 2023, arXiv:2309.00071, section
    3.1)."""

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

    def rotate(self, q: Tensor, k: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:  # (B,T,H,D), (B,T,G,D), (B|1,T)
        width = q.shape[-1]
        theta = self.theta * self.scale ** (width / max(width - 2, 1))  # a single pair has frequency 1 with any theta
        cos, sin = _angles(positions, _frequencies(width, theta, q.device))
        return _rotate(q, cos, sin), _rotate(k, cos, sin)


@register("position")
class YaRN(nn.Module):
    """RoPE whose slow pairs rotate ``scale`` times slower, with unchanged fast pairs (Peng et al. 2023,
    arXiv:2309.00071).

    A pair that makes more than ``beta_fast`` rotations within ``original_len`` positions keeps its frequency. The
    frequency of a pair that makes fewer than ``beta_slow`` is divided by ``scale``. Between the two, the frequency is
    interpolated linearly in the index of the pair, with the bounds rounded outwards, as in the authors' code. Following
    eq. 22, q and k are each multiplied by 0.1 ln(scale) + 1, so that the scores are multiplied by its square.
    ``original_len=None`` means max_len / scale."""

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
                f"YaRN.beta_fast = {beta_fast} must be above YaRN.beta_slow = {beta_slow}: fast pairs rotate more often"
            )
        self.scale, self.theta, self.betas = scale, theta, (beta_fast, beta_slow)
        self.original_len = original_len or max_len / scale
        self.gain = 0.1 * math.log(scale) + 1

    def rotate(self, q: Tensor, k: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:  # (B,T,H,D), (B,T,G,D), (B|1,T)
        width = q.shape[-1]
        frequencies = _frequencies(width, self.theta, q.device)  # (D/2,)
        wavelengths = (math.log(self.original_len / (2 * math.pi * beta)) for beta in self.betas)
        low, high = (
            width * log / (2 * math.log(self.theta)) for log in wavelengths
        )  # indices of the pairs with beta rotations
        low = max(math.floor(low), 0)
        high = max(low, min(math.ceil(high), width - 1))
        pairs = torch.arange(width // 2, dtype=torch.float32, device=q.device)
        slowed = ((pairs - low) / ((high - low) or 0.001)).clamp(0, 1)  # 0: frequency as before, 1: divided by scale
        cos, sin = _angles(positions, frequencies * (1 - slowed) + frequencies / self.scale * slowed)
        return _rotate(q, self.gain * cos, self.gain * sin), _rotate(k, self.gain * cos, self.gain * sin)


@register("position")
class Llama3RoPE(nn.Module):
    """RoPE whose slow pairs rotate ``scale`` times slower, with unchanged fast pairs, as in Llama 3.1 (Grattafiori et
    al. 2024, arXiv:2407.21783; the formula is in the authors' code).

    A pair that makes more than ``beta_fast`` rotations within ``original_len`` positions keeps its frequency. The
    frequency of a pair that makes fewer than ``beta_slow`` is divided by ``scale``. Between the two, the frequency is
    interpolated linearly in the number of rotations. ``original_len=None`` means max_len / scale."""

    def __init__(
        self,
        dim: int,
        n_head: int,
        head_dim: int,
        max_len: int,
        scale: Annotated[float, Ge(1)] = 8.0,
        original_len: Annotated[int, Gt(0)] | None = None,
        beta_fast: Annotated[float, Gt(0)] = 4.0,
        beta_slow: Annotated[float, Gt(0)] = 1.0,
        theta: Annotated[float, Gt(0)] = 10_000.0,
    ):
        super().__init__()
        _check_pairs("Llama3RoPE", head_dim)
        if beta_fast <= beta_slow:
            raise ValueError(
                f"Llama3RoPE.beta_fast = {beta_fast} must be above Llama3RoPE.beta_slow = {beta_slow}: fast pairs "
                "rotate more often"
            )
        self.scale, self.theta, self.betas = scale, theta, (beta_fast, beta_slow)
        self.original_len = original_len or max_len / scale

    def rotate(self, q: Tensor, k: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:  # (B,T,H,D), (B,T,G,D), (B|1,T)
        fast, slow = self.betas
        frequencies = _frequencies(q.shape[-1], self.theta, q.device)  # (D/2,)
        rotations = self.original_len * frequencies / (2 * math.pi)
        kept = ((rotations - slow) / (fast - slow)).clamp(0, 1)  # 1: frequency as before, 0: divided by scale
        cos, sin = _angles(positions, frequencies * kept + frequencies / self.scale * (1 - kept))
        return _rotate(q, cos, sin), _rotate(k, cos, sin)


@register("position")
class XPos(nn.Module):
    """RoPE whose scores decay with distance (Sun et al. 2022, arXiv:2212.10554). Pair i of q is multiplied by
    zeta_i^(position / scale_base) and pair i of k is divided by it, with zeta_i = (2i/D + 0.4) / 1.4. A score therefore
    depends only on the distance. Positions count from max_len / 2, which keeps both gains small; the gains are computed
    in float32."""

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
        if max_len > 32 * scale_base:  # with gains above 3.5^16 = 5e8, products come close to the largest float32
            raise ValueError(
                f"XPos can't hold its gains in float32 over {max_len} positions (seq_len): they would exceed 3.5^16; "
                f"set XPos.scale_base = {math.ceil(max_len / 32)} or more"
            )
        self.scale_base, self.theta, self.middle = scale_base, theta, max_len / 2

    def rotate(self, q: Tensor, k: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:  # (B,T,H,D), (B,T,G,D), (B|1,T)
        width = q.shape[-1]
        cos, sin = _angles(positions, _frequencies(width, self.theta, q.device))
        zeta = (torch.arange(0, width, 2, dtype=torch.float32, device=q.device) / width + 0.4) / 1.4  # (D/2,)
        gain = zeta ** ((positions.float() - self.middle) / self.scale_base)[:, :, None, None]  # (B|1, T, 1, D/2)
        gain = torch.cat((gain, gain), dim=-1)
        return _rotate(q, cos * gain, sin * gain), _rotate(k, cos / gain, sin / gain)


@register("position")
class Learned(nn.Module):
    """A learned vector for each position, added to the embedded token (GPT-2): max_len * C parameters."""

    def __init__(self, dim: int, n_head: int, head_dim: int, max_len: int):
        super().__init__()
        self.table = nn.Embedding(max_len, dim)

    def embed(self, x: Tensor, positions: Tensor) -> Tensor:  # (B,T,C), (B|1,T) -> (B,T,C)
        return x + self.table(positions)


@register("position")
class Sinusoidal(nn.Module):
    """Fixed sines and cosines, whose wavelengths form a geometric series, added to the embedded token (Vaswani et al.
    2017, section 3.5). Sines are in the first half of the channels, cosines in the second half. ``scale`` is the
    amplitude. The paper uses amplitude 1 with embeddings of about size 1; here embeddings start with a standard
    deviation of 0.02."""

    table: Tensor

    def __init__(self, dim: int, n_head: int, head_dim: int, max_len: int, scale: Annotated[float, Gt(0)] = 0.02):
        super().__init__()
        if dim % 2:
            raise ValueError(f"Sinusoidal needs an even width, not {dim}; change GPT.dim")
        exponent = torch.arange(0, dim, 2, dtype=torch.float32) / dim
        angles = torch.arange(max_len)[:, None] * 10_000.0**-exponent  # (max_len, C/2)
        self.register_buffer("table", scale * torch.cat((angles.sin(), angles.cos()), dim=-1), persistent=False)

    def embed(self, x: Tensor, positions: Tensor) -> Tensor:  # (B,T,C), (B|1,T) -> (B,T,C)
        return x + self.table[positions].to(x.dtype)


@register("position")
class ALiBi(nn.Module):
    """Scores decrease linearly with distance: -slope_h * (i - j) is added (Press et al. 2021, arXiv:2108.12409). If H
    is a power of two, slope_h = 2^(-8h/H). Otherwise the first heads have the slopes for the next lower power of two,
    P, and the others have every second slope for 2P, beginning with the first."""

    slopes: Tensor

    def __init__(self, dim: int, n_head: int, head_dim: int, max_len: int):
        super().__init__()
        power = 2 ** math.floor(math.log2(n_head))
        slopes = [2 ** (-8 * h / power) for h in range(1, power + 1)]
        slopes += [2 ** (-4 * h / power) for h in range(1, 2 * (n_head - power) + 1, 2)]
        self.register_buffer("slopes", torch.tensor(slopes), persistent=False)  # (H,)

    def score_bias(self, q_positions: Tensor, k_positions: Tensor) -> Tensor:  # (T,), (S,) -> (H,T,S)
        distance = q_positions[:, None] - k_positions  # (T, S)
        return -self.slopes[:, None, None] * distance


@register("position")
class T5Bias(nn.Module):
    """A learned number for each head and bucket of distances, added to the scores (Raffel et al. 2020,
    arXiv:1910.10683, section 2.1). Each bucket of the first half is one distance: 0, 1, 2 and so on. The buckets of the
    other half grow geometrically up to ``max_distance``; all larger distances share the last bucket. T5 does not divide
    its scores by sqrt(D); here they are divided."""

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
                f"T5Bias.max_distance = {max_distance} lies within the first {num_buckets // 2} buckets, each "
                f"of which is a single distance; set it above that, or lower T5Bias.num_buckets"
            )
        self.num_buckets, self.max_distance = num_buckets, max_distance
        self.table = nn.Embedding(num_buckets, n_head)

    def score_bias(self, q_positions: Tensor, k_positions: Tensor) -> Tensor:  # (T,), (S,) -> (H,T,S)
        distance = (q_positions[:, None] - k_positions).clamp(min=0)  # (T, S)
        exact = self.num_buckets // 2
        growth = (distance.clamp(min=exact) / exact).log() / math.log(self.max_distance / exact)
        far = exact + (growth * (self.num_buckets - exact)).long()
        buckets = torch.where(distance < exact, distance, far.clamp(max=self.num_buckets - 1))
        return self.table(buckets).permute(2, 0, 1)


@register("position")
class Kerple(nn.Module):
    """Scores decrease with the logarithm of the distance: -r1_h * log(1 + r2_h * (i - j)) is added, with r1 and r2
    learned for each head (Chi et al. 2022, arXiv:2205.09921, the logarithmic variant). The learned parameters are the
    logarithms of r1 and r2, which therefore stay positive. r1 starts uniform in (0, 2) and r2 in (0, 1), as in the
    authors' code."""

    def __init__(self, dim: int, n_head: int, head_dim: int, max_len: int):
        super().__init__()
        self.log_r1 = nn.Parameter((2 * torch.rand(n_head)).clamp(min=0.01).log())
        self.log_r2 = nn.Parameter(torch.rand(n_head).clamp(min=0.01).log())

    def score_bias(self, q_positions: Tensor, k_positions: Tensor) -> Tensor:  # (T,), (S,) -> (H,T,S)
        distance = (q_positions[:, None] - k_positions).clamp(min=0)  # (T, S)
        r1, r2 = (log.float().exp()[:, None, None] for log in (self.log_r1, self.log_r2))  # (H, 1, 1)
        return -r1 * torch.log1p(r2 * distance)


@register("position")
class NoPE(nn.Module):
    """No position encoding: a causal model can still distinguish positions (Kazemnejad et al. 2023,
    arXiv:2305.19466)."""

    def __init__(self, dim: int, n_head: int, head_dim: int, max_len: int):
        super().__init__()


def _check_pairs(name: str, head_dim: int) -> None:
    if head_dim % 2:
        raise ValueError(f"{name} rotates pairs: GPT.dim / GPT.n_head must be even, not {head_dim}; change one of them")


def _frequencies(width: int, theta: float, device: torch.device) -> Tensor:
    """theta^(-2i/width) for the pairs i of ``width`` channels: (width/2,) in float32."""
    return theta ** -(torch.arange(0, width, 2, dtype=torch.float32, device=device) / width)


@opaque
def _angles(positions: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """The cosine and sine of position * frequency: (B|1, T), (R/2,) -> two tensors (B|1, T, 1, R), in float32. Those of
    pair i stand at i and at i + R/2, and the sine at i is negative."""
    angles = positions.float()[:, :, None, None] * frequencies
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def _rope_angles(positions: Tensor, width: int, theta: float) -> tuple[Tensor, Tensor]:
    """``_angles`` with the frequencies of plain RoPE for R = ``width``."""
    return _angles(positions, _frequencies(width, theta, positions.device))


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pair (i, i + R/2) of the first R channels of x (B, T, H, D) by its angle, in float32; the channels after
    them stay as they are."""
    width = cos.shape[-1]  # R
    rotating = x[..., :width].float()
    if rotation.fits(x):
        rotated = rotation.rotate(rotating, cos, sin)
    else:
        partners = rotating.unflatten(-1, (2, -1)).flip(-2).flatten(-2)  # the two halves, swapped
        rotated = rotating * cos + partners * sin
    rotated = rotated.to(x.dtype)
    return torch.cat((rotated, x[..., width:]), dim=-1) if width < x.shape[-1] else rotated
