"""Initialisation: fills the weights and biases of every Linear and Embedding."""

from typing import Annotated

import torch
from annotated_types import Gt

from toolkit.registry import register


@register("init")
class GPT2Init:
    """N(0, std^2) for matrices, 0 for biases; projections back into the residual stream divided by sqrt(2 * n_layer),
    the number of such additions (Radford et al. 2019, section 2.3)."""

    def __init__(self, n_layer: int, std: Annotated[float, Gt(0)] = 0.02):
        self.std, self.residual_std = std, std / (2 * n_layer) ** 0.5

    def __call__(self, name: str, parameter: torch.Tensor, generator: torch.Generator) -> None:
        if parameter.ndim < 2:
            parameter.zero_()
        else:
            parameter.normal_(0.0, self.residual_std if parameter.residual else self.std, generator=generator)


@register("init")
class SmallInit:
    """N(0, 2 / (5 C)) for matrices with C inputs, 0 for biases (Nguyen & Salazar 2019, arXiv:1910.05895, section 2.2);
    projections back into the residual stream, with C outputs, N(0, (2 / (n_layer * sqrt(C)))^2), the pair that GPT-NeoX
    calls small_init and wang_init. No knobs: the width sets all."""

    def __init__(self, n_layer: int):
        self.n_layer = n_layer

    def __call__(self, name: str, parameter: torch.Tensor, generator: torch.Generator) -> None:
        if parameter.ndim < 2:
            parameter.zero_()
        elif parameter.residual:
            parameter.normal_(0.0, 2 / (self.n_layer * parameter.shape[0] ** 0.5), generator=generator)
        else:
            parameter.normal_(0.0, (2 / (5 * parameter.shape[1])) ** 0.5, generator=generator)


@register("init")
class DepthScaled:
    """N(0, std^2) for matrices, 0 for biases; projections of layer l = 0, 1, ... back into the residual stream divided
    by sqrt(2 * (l + 1)). That later layers start smaller is the idea of Zhang et al. 2019 (arXiv:1908.11365), who
    shrink all matrices of a layer; this factor, on these projections alone, is that of OLMo's "mitchell" init
    (Groeneveld et al. 2024, arXiv:2402.00838)."""

    def __init__(self, n_layer: int, std: Annotated[float, Gt(0)] = 0.02):
        self.std = std

    def __call__(self, name: str, parameter: torch.Tensor, generator: torch.Generator) -> None:
        if parameter.ndim < 2:
            parameter.zero_()
            return
        root, layer = (name + "..").split(".")[:2]
        scale = (2 * (int(layer) + 1)) ** -0.5 if parameter.residual and root == "blocks" else 1.0
        parameter.normal_(0.0, self.std * scale, generator=generator)


@register("init")
class Orthogonal:
    """Matrices with orthonormal rows, or columns where those are fewer, times ``gain``; 0 for biases (Saxe et al. 2013,
    arXiv:1312.6120). Matrices that a layer merges are orthogonal each on its own; projections back into the residual
    stream are divided by sqrt(2 * n_layer), as GPT2Init does. Tables (embedding, output, positions) are N(0, 0.02^2):
    their rows stand for tokens, far more than there are dimensions to be orthogonal in."""

    def __init__(self, n_layer: int, gain: Annotated[float, Gt(0)] = 1.0):
        self.gain, self.residual_gain = gain, gain / (2 * n_layer) ** 0.5

    def __call__(self, name: str, parameter: torch.Tensor, generator: torch.Generator) -> None:
        if parameter.ndim < 2:
            parameter.zero_()
        elif _is_table(name):
            parameter.normal_(0.0, 0.02, generator=generator)
        else:
            gain = self.residual_gain if parameter.residual else self.gain
            for _, matrix in _matrices(name, parameter):
                torch.nn.init.orthogonal_(matrix, gain, generator=generator)


@register("init")
class DeepNormInit:
    """Xavier-normal matrices, N(0, gain^2 * 2 / (inputs + outputs)), with gain 1 for q and k and (8 * n_layer)^(-1/4)
    for all others in a layer; 0 for biases (Wang et al. 2022, arXiv:2203.00555, table 1, decoders). It goes with
    GPT.block = @DeepNorm. Matrices that a layer merges count one by one. The paper says nothing of tables (embedding,
    output, positions): N(0, std^2)."""

    def __init__(self, n_layer: int, std: Annotated[float, Gt(0)] = 0.02):
        self.std, self.beta = std, (8 * n_layer) ** -0.25

    def __call__(self, name: str, parameter: torch.Tensor, generator: torch.Generator) -> None:
        if parameter.ndim < 2:
            parameter.zero_()
        elif _is_table(name):
            parameter.normal_(0.0, self.std, generator=generator)
        else:
            for role, matrix in _matrices(name, parameter):
                gain = 1.0 if role in ("q", "k") else self.beta
                matrix.normal_(0.0, gain * (2 / sum(matrix.shape)) ** 0.5, generator=generator)


@register("init")
class MuP:
    """Maximal update parametrisation for Adam: the best learning rate stays the same as the width C grows (Yang et al.
    2022, arXiv:2203.03466, table 3). With m = C / base_dim,

        matrices in the layers          standard deviation std / sqrt(m)    learning rate x 1/m
        output matrix                   std / m                             x 1/m
        embedding, positions            std                                 x 1
        biases                          0                                   x 1

    and projections back into the residual stream divided by sqrt(2 * n_layer), as GPT2Init does; at C = base_dim it is
    GPT2Init. Grow GPT.n_head with GPT.dim: at a fixed head dimension the scores keep their 1 / sqrt(D). A tied table
    can't follow two rules at once, and is refused."""

    def __init__(self, n_layer: int, base_dim: Annotated[int, Gt(0)] = 256, std: Annotated[float, Gt(0)] = 0.02):
        self.n_layer, self.base_dim, self.std = n_layer, base_dim, std

    def __call__(self, name: str, parameter: torch.Tensor, generator: torch.Generator) -> None:
        if getattr(parameter, "tied", False):
            raise ValueError(
                "MuP gives the embedding and the output matrix different scales and learning rates, so one table can't "
                "be both; set GPT.tie_embeddings = False"
            )
        if parameter.ndim < 2:
            parameter.zero_()
            return
        m = parameter.shape[0 if parameter.residual else 1] / self.base_dim
        output = name == "unembed.weight"
        if _is_table(name) and not output:
            parameter.normal_(0.0, self.std, generator=generator)
            return
        std = self.std / (m if output else m**0.5)
        parameter.normal_(0.0, std / (2 * self.n_layer) ** 0.5 if parameter.residual else std, generator=generator)
        parameter.lr_scale = 1 / m


def _is_table(name):
    """Whether the rows of this matrix stand for tokens or positions."""
    return name.startswith(("embed.", "unembed.", "positions."))


def _matrices(name, parameter):
    """The matrices that a parameter merges, each with its role; one that merges none has its layer's name for it."""
    merged = getattr(parameter, "merged", None) or {name.split(".")[-2]: parameter.shape[0]}
    return zip(merged, parameter.split(list(merged.values())), strict=True)
