"""Inits: fill the weights and biases of every Linear and Embedding. N(0, s^2) is a normal distribution with standard
deviation s. A "residual projection" is the last matrix of a mixer or ffn, whose output is added to the residual
stream."""

from collections.abc import Iterator
from typing import Annotated

import torch
from annotated_types import Gt
from torch import Generator, Tensor

from toolkit.registry import register


class Weight(Tensor):
    """The type of the parameter that an init fills: a tensor with attributes, which toolkit/seeding.py copies from its
    layer. For the type checker only; no tensor is built as one."""

    residual: bool  # it is a residual projection
    merged: dict[str, int] | None  # the matrices that it merges: name -> rows; None: it is a single matrix
    tied: bool  # it is an embedding table that is also the output matrix
    lr_scale: float  # an init may set this factor of the learning rate


@register("init")
class GPT2Init:
    """N(0, std^2) for matrices, 0 for biases, and N(0, std^2 / (2 * n_layer)) for residual projections, whose number is
    2 * n_layer (Radford et al. 2019, section 2.3)."""

    def __init__(self, n_layer: int, std: Annotated[float, Gt(0)] = 0.02):
        self.std, self.residual_std = std, std / (2 * n_layer) ** 0.5

    def __call__(self, name: str, parameter: Weight, generator: Generator) -> None:
        if parameter.ndim < 2:
            parameter.zero_()
        else:
            parameter.normal_(0.0, self.residual_std if parameter.residual else self.std, generator=generator)


@register("init")
class SmallInit:
    """N(0, 2 / (5 C)) for matrices with C inputs, 0 for biases (Nguyen & Salazar 2019, arXiv:1910.05895, section 2.2).
    Residual projections with C outputs are N(0, (2 / (n_layer * sqrt(C)))^2). GPT-NeoX calls the two small_init and
    wang_init. There are no knobs: the width determines everything."""

    def __init__(self, n_layer: int):
        self.n_layer = n_layer

    def __call__(self, name: str, parameter: Weight, generator: Generator) -> None:
        if parameter.ndim < 2:
            parameter.zero_()
        elif parameter.residual:
            parameter.normal_(0.0, 2 / (self.n_layer * parameter.shape[0] ** 0.5), generator=generator)
        else:
            parameter.normal_(0.0, (2 / (5 * parameter.shape[1])) ** 0.5, generator=generator)


@register("init")
class DepthScaled:
    """N(0, std^2) for matrices, 0 for biases, and N(0, std^2 / (2 (l + 1))) for the residual projections of layer l =
    0, 1, ... (Groeneveld et al. 2024, arXiv:2402.00838, the "mitchell" init of OLMo). That later layers start smaller
    is the idea of Zhang et al. 2019 (arXiv:1908.11365), who scale all matrices of a layer."""

    def __init__(self, n_layer: int, std: Annotated[float, Gt(0)] = 0.02):
        self.std = std

    def __call__(self, name: str, parameter: Weight, generator: Generator) -> None:
        if parameter.ndim < 2:
            parameter.zero_()
            return
        root, layer = (name + "..").split(".")[:2]
        scale = (2 * (int(layer) + 1)) ** -0.5 if parameter.residual and root == "blocks" else 1.0
        parameter.normal_(0.0, self.std * scale, generator=generator)


@register("init")
class Orthogonal:
    """Matrices with orthonormal rows, or orthonormal columns if there are fewer columns, times ``gain``; 0 for biases
    (Saxe et al. 2013, arXiv:1312.6120). Each matrix that a layer merges is orthogonal on its own. Residual projections
    are divided by sqrt(2 * n_layer), as in GPT2Init. Tables (embedding, output, positions) are N(0, 0.02^2): they have
    far more rows than columns, so their rows can't be orthogonal."""

    def __init__(self, n_layer: int, gain: Annotated[float, Gt(0)] = 1.0):
        self.gain, self.residual_gain = gain, gain / (2 * n_layer) ** 0.5

    def __call__(self, name: str, parameter: Weight, generator: Generator) -> None:
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
    """N(0, 2 gain^2 / (inputs + outputs)) for matrices, with gain 1 for q and k and (8 * n_layer)^(-1/4) for all others
    in a layer; 0 for biases (Wang et al. 2022, arXiv:2203.00555, the constants for decoders). It belongs to GPT.block =
    @DeepNorm. Each matrix that a layer merges counts on its own. The paper does not mention tables (embedding, output,
    positions); here they are N(0, std^2)."""

    def __init__(self, n_layer: int, std: Annotated[float, Gt(0)] = 0.02):
        self.std, self.beta = std, (8 * n_layer) ** -0.25

    def __call__(self, name: str, parameter: Weight, generator: Generator) -> None:
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
    2022, arXiv:2203.03466, table 3). Tune the learning rate at a small width, then train a wide model with it. With
    m = C / base_dim,

        parameter                       standard deviation     learning rate times
        matrices in the layers          std / sqrt(m)          1 / m
        output matrix                   std / m                1 / m
        embedding, positions            std                    1
        biases                          0                      1

    Residual projections are also divided by sqrt(2 * n_layer), so at C = base_dim this is GPT2Init. Increase GPT.n_head
    together with GPT.dim: the attention scores are scaled by 1 / sqrt(D), which is right for a fixed head dimension D.
    The embedding and the output matrix need different rules, so GPT.tie_embeddings must be False."""

    def __init__(self, n_layer: int, base_dim: Annotated[int, Gt(0)] = 256, std: Annotated[float, Gt(0)] = 0.02):
        self.n_layer, self.base_dim, self.std = n_layer, base_dim, std

    def __call__(self, name: str, parameter: Weight, generator: Generator) -> None:
        if parameter.tied:
            raise ValueError(
                "MuP gives the embedding and the output matrix different scales and learning rates, so they can't be "
                "one table; set GPT.tie_embeddings = False"
            )
        if parameter.ndim < 2:
            parameter.zero_()
            return
        m = parameter.shape[0 if parameter.residual else 1] / self.base_dim  # C: outputs of residual projections
        output = name == "unembed.weight"
        if _is_table(name) and not output:
            parameter.normal_(0.0, self.std, generator=generator)
            return
        std = self.std / (m if output else m**0.5)
        parameter.normal_(0.0, std / (2 * self.n_layer) ** 0.5 if parameter.residual else std, generator=generator)
        parameter.lr_scale = 1 / m


def _is_table(name: str) -> bool:
    """Whether the rows of this matrix belong to tokens or positions."""
    return name.startswith(("embed.", "unembed.", "positions."))


def _matrices(name: str, parameter: Weight) -> Iterator[tuple[str, Tensor]]:
    """The matrices that a parameter merges, as (name, view). A single matrix has the name of its layer."""
    rows = parameter.merged or {name.split(".")[-2]: parameter.shape[0]}
    return zip(rows, parameter.split(list(rows.values())), strict=True)
