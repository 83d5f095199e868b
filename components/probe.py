"""Probes: statistics of what happens inside the model, at some steps of training (docs/probes.md).

Names are STATISTIC/MODULE. The figures are of the probe batch, a few validation sequences that are always the same."""

from typing import Annotated

import torch
from annotated_types import Ge, Gt
from torch import Tensor

from toolkit.attention_weights import is_distribution
from toolkit.protocols import Views
from toolkit.registry import register

Values = dict[str, float | Tensor | None]


@register("probe")
class Activations:
    """The size and the outliers of the outputs of each block, mixer and ffn. Over all entries x of an output,

        rms = sqrt(mean(x^2)),    largest = max |x|,    kurtosis = mean((x - m)^4) / mean((x - m)^2)^2,    m = mean(x)

    The kurtosis of a normal distribution is 3; a few channels with outliers give 100 and more (He et al. 2024,
    arXiv:2405.19279, who measure it per token)."""

    needs = {"activations"}
    statistics = ("rms/MODULE", "largest/MODULE", "kurtosis/MODULE")

    def observe(self, views: Views) -> Values:
        values: Values = {}
        outputs = views.activations
        for name in (name for name in views.places if name in outputs):
            x = outputs[name].float()
            squared = (x - x.mean()).square()
            values[f"rms/{name}"] = x.square().mean().sqrt()
            values[f"largest/{name}"] = x.abs().max()
            values[f"kurtosis/{name}"] = squared.square().mean() / squared.mean().square()
        return values


@register("probe")
class Updates:
    """The gradient and the update of each parameter W of the model,

        gradient_norm = ||dL/dW||,    update_ratio = ||W_after - W|| / ||W||

    with Frobenius norms. L is the mean loss of the probe batch; the update is what the optimizer did at this step. A
    ratio near 1e-3 is a common aim. It is left out while W is 0."""

    needs = {"updates", "weight_gradients"}
    statistics = ("gradient_norm/MODULE", "update_ratio/MODULE")

    def observe(self, views: Views) -> Values:
        gradients, updates = views.weight_gradients, views.updates
        values: Values = {f"gradient_norm/{name}": gradient.float().norm() for name, gradient in gradients.items()}
        norms = {name: weight.float().norm() for name, weight in views.weights.items()}
        is_zero = (torch.stack(list(norms.values())) == 0).tolist()
        for (name, norm), zero in zip(norms.items(), is_zero, strict=True):
            if not zero:
                values[f"update_ratio/{name}"] = updates[name].float().norm() / norm
        return values


@register("probe")
class AttentionEntropy:
    """The entropy -sum_s a_s ln a_s of the attention weights a of a query, in nats: 0 if it reads one key, ln S if it
    reads S keys alike (Zhai et al. 2023, arXiv:2303.06296).

    ``entropy_nats`` is the mean over sequences, heads and queries, ``head_entropy_nats`` the mean of each head, an
    array (H,). Kernels whose weights are no softmax are left out."""

    needs = {"attention"}
    statistics = ("entropy_nats/MODULE",)

    def observe(self, views: Views) -> Values:
        values: Values = {}
        for name, weights in views.attention.items():  # (B,H,T,S)
            if weights is None or not is_distribution(weights):
                values[f"entropy_nats/{name}"] = None
                continue
            heads = torch.special.entr(weights.clamp_min(0)).sum(-1).mean((0, 2))  # (H,)
            values[f"entropy_nats/{name}"] = heads.mean()
            values[f"head_entropy_nats/{name}"] = heads
        return values


@register("probe")
class DeadUnits:
    """The share of an ffn's hidden units that are active on no token (Lu et al. 2019, arXiv:1903.06733).

    The hidden units are the inputs of the Linear that projects back into the residual stream (``linear.residual``), so
    those of a gated ffn are the products of both branches. A unit is dead if its absolute value is at most
    ``threshold`` times the rms of all units, on all tokens. An ffn without such a Linear, or that does not call it, as
    a mixture of experts, is left out."""

    needs = {"inputs"}
    statistics = ("dead_share/MODULE",)

    def __init__(self, threshold: Annotated[float, Ge(0)] = 0.01):
        self.threshold = threshold

    def observe(self, views: Views) -> Values:
        inputs, values = views.inputs, Values()
        for ffn in (name for name, kind in views.places.items() if kind in ("ffn", "part")):
            names = [name for name in inputs if f"{name.partition('#')[0]}.".startswith(f"{ffn}.")]
            names = [n for n in names if getattr(views.model.get_submodule(n.partition("#")[0]), "residual", False)]
            for name in names:
                units = inputs[name].float().abs().flatten(0, -2)  # (N, hidden)
                largest = units.amax(0)
                values[f"dead_share/{name}"] = (largest <= self.threshold * units.square().mean().sqrt()).float().mean()
            if not names:
                values[f"dead_share/{ffn}"] = None
        return values


@register("probe")
class EffectiveRank:
    """The number of directions that the output of each block uses: exp(-sum_i p_i ln p_i) with p_i = s_i / sum_j s_j,
    where s are the singular values of the outputs, one row per token (Roy & Vetterli 2007, EUSIPCO, "The effective
    rank").

    It lies between 1 and the number of rows or channels, whichever is smaller. At most ``tokens`` rows are used, at
    equal distances, so the cost is bounded."""

    needs = {"activations"}
    statistics = ("rank/MODULE",)

    def __init__(self, tokens: Annotated[int, Gt(1)] = 128):
        self.tokens = tokens

    def observe(self, views: Views) -> Values:
        outputs, values = views.activations, Values()
        for name in (name for name, kind in views.places.items() if kind == "block" and name in outputs):
            x = outputs[name].flatten(0, -2)  # (N,C)
            x = x[:: -(-len(x) // self.tokens)].cpu().double()
            values[f"rank/{name}"] = self.effective_rank(x) if x.isfinite().all() else float("nan")
        return values

    @staticmethod
    def effective_rank(x: Tensor) -> Tensor:
        """(N,C), finite -> the effective rank, a scalar."""
        gram = x @ x.T if x.shape[0] < x.shape[1] else x.T @ x
        singular = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()
        return torch.special.entr(singular / singular.sum()).sum().exp()


@register("probe")
class LogitScale:
    """The scale of the logits over all positions and tokens of the vocabulary: ``rms``, ``largest`` in absolute value,
    and ``log_z_nats``, the mean over positions of ln sum exp(logits), which drifts away from 0 where training becomes
    unstable (Chowdhery et al. 2022, arXiv:2204.02311, section 5)."""

    needs = {"logits"}
    statistics = ("rms", "largest", "log_z_nats")

    def observe(self, views: Views) -> Values:
        logits = views.logits  # (B,T,V)
        return {
            "rms": logits.square().mean().sqrt(),
            "largest": logits.abs().max(),
            "log_z_nats": logits.logsumexp(-1).mean(),
        }
