"""Optimizers over the toolkit's parameter groups. Each comes from torch.optim or its authors' package, or is the
published formula. In the formulas, w is a parameter, g its gradient, and lr the learning rate of the current step.

Knobs that they share: ``lr`` is the peak learning rate, which the schedule multiplies; ``betas`` are the decay rates of
the running means; ``weight_decay`` applies to matrices and tables, not to gains and biases, nor to parameters whose
names match a glob pattern in ``no_decay``, such as 'embed.*'. Decoupled decay multiplies w by 1 - lr * weight_decay;
coupled decay adds weight_decay * w to g."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import schedulefree
import torch
from annotated_types import Ge, Gt, Interval, Le
from torch import Tensor, nn

from toolkit.groups import parameter_groups
from toolkit.registry import register

Rate = Annotated[float, Gt(0)]
Beta = Annotated[float, Interval(ge=0, lt=1)]
Eps = Annotated[float, Gt(0)]
Decay = Annotated[float, Ge(0)]
State = dict[str, Any]  # of one parameter: name -> tensor or number
Group = dict[str, Any]  # a parameter group of torch.optim: name -> option


@register("optimizer")
class AdamW(torch.optim.AdamW):
    """Adam with decoupled weight decay, w -= lr * m / (sqrt(v) + eps) (Loshchilov & Hutter 2017, arXiv:1711.05101). m
    and v are running means of g and g^2 with the rates ``betas``, divided by 1 - beta^step, since they start at 0. It
    uses torch's fused kernel where there is one."""

    def __init__(
        self,
        model: nn.Module,
        lr: Rate = 3e-4,
        betas: tuple[Beta, Beta] = (0.9, 0.95),
        eps: Eps = 1e-8,
        weight_decay: Decay = 0.1,
        no_decay: Sequence[str] = (),
    ):
        groups = parameter_groups(model, lr, weight_decay, no_decay)
        super().__init__(groups, lr=lr, betas=betas, eps=eps, fused=_fused(groups))


@register("optimizer")
class Adam(torch.optim.Adam):
    """AdamW but with coupled weight decay (Kingma & Ba 2014, arXiv:1412.6980). The decay is part of g, so it is divided
    by sqrt(v) too."""

    def __init__(
        self,
        model: nn.Module,
        lr: Rate = 3e-4,
        betas: tuple[Beta, Beta] = (0.9, 0.95),
        eps: Eps = 1e-8,
        weight_decay: Decay = 0.0,
        no_decay: Sequence[str] = (),
    ):
        groups = parameter_groups(model, lr, weight_decay, no_decay)
        super().__init__(groups, lr=lr, betas=betas, eps=eps, fused=_fused(groups))


@register("optimizer")
class SGD(torch.optim.SGD):
    """Stochastic gradient descent with momentum, m <- momentum * m + g, w -= lr * m (Sutskever et al. 2013). Weight
    decay is coupled. ``nesterov`` steps along g + momentum * m instead of m."""

    def __init__(
        self,
        model: nn.Module,
        lr: Rate = 0.1,
        momentum: Beta = 0.9,
        nesterov: bool = False,
        weight_decay: Decay = 0.0,
        no_decay: Sequence[str] = (),
    ):
        groups = parameter_groups(model, lr, weight_decay, no_decay)
        super().__init__(groups, lr=lr, momentum=momentum, nesterov=nesterov)


@register("optimizer")
class Lion(torch.optim.Optimizer):
    """w -= lr * (sign(b1 m + (1 - b1) g) + weight_decay * w), then m = b2 m + (1 - b2) g (Chen et al. 2023,
    arXiv:2302.06675). Every weight moves by lr, so the paper advises a learning rate 3 to 10 times smaller than
    AdamW's, and a weight decay as many times larger, which keeps their product."""

    def __init__(
        self,
        model: nn.Module,
        lr: Rate = 1e-4,
        betas: tuple[Beta, Beta] = (0.9, 0.99),
        weight_decay: Decay = 0.3,
        no_decay: Sequence[str] = (),
    ):
        super().__init__(parameter_groups(model, lr, weight_decay, no_decay), {"betas": betas})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # torch allows a closure; the toolkit passes none
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p, g in _with_gradient(group):
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                direction = state["momentum"].lerp(g, 1 - beta1).sign_()
                p.mul_(1 - group["lr"] * group["weight_decay"]).add_(direction, alpha=-group["lr"])
                state["momentum"].lerp_(g, 1 - beta2)


@register("optimizer")
class Adafactor(torch.optim.Adafactor):
    """Adam without momentum, whose v is stored as one row and one column per matrix (Shazeer & Stern 2018,
    arXiv:1804.04235). So its state needs little memory. With RMS the root mean square of a tensor,

        w -= lr_t * RMS(w) * u,    u = g / sqrt(v),    lr_t = min(lr, 1 / sqrt(step))

    lr               relative to the size of the parameter; the bound 1 / sqrt(step) matters after 1 / lr^2 steps
    beta2_decay      v is a running mean of g^2 with the rate 1 - step^beta2_decay
    eps              lower bounds of sqrt(v), where None is float32's resolution, and of RMS(w)
    clip_threshold   the largest RMS(u); a larger u is scaled down
    weight_decay     decoupled: w is multiplied by 1 - lr * weight_decay
    """

    def __init__(
        self,
        model: nn.Module,
        lr: Rate = 1e-2,
        beta2_decay: Annotated[float, Le(0)] = -0.8,
        eps: tuple[Eps | None, Eps] = (None, 1e-3),
        clip_threshold: Annotated[float, Ge(1)] = 1.0,
        weight_decay: Decay = 0.0,
        no_decay: Sequence[str] = (),
    ):
        groups = parameter_groups(model, lr, weight_decay, no_decay)
        super().__init__(groups, lr=lr, beta2_decay=beta2_decay, eps=eps, d=clip_threshold)

    def step(self) -> None:  # type: ignore[override]  # torch allows a closure; the toolkit passes none
        if not any(p.is_meta for group in self.param_groups for p in group["params"]):
            super().step()
            return
        for (
            group
        ) in self.param_groups:  # on the meta device torch's step fails, since it reads values: only make the state
            self._init_group(group, [], [], [], [], [], [])


@register("optimizer")
class Muon(torch.optim.Optimizer):
    """Orthogonalised momentum for the hidden matrices, and AdamW for all other parameters (Jordan et al. 2024,
    kellerjordan.github.io/posts/muon). With the momentum matrix M = U S V^T (its singular value decomposition), a
    hidden matrix moves along U V^T, which ``ns_steps`` Newton-Schulz iterations approximate.

    The hidden matrices are the weights of all Linear layers except the output matrix. Each matrix that a layer merges
    (q, k and v, for example) is orthogonalised on its own. Weight decay is decoupled.

    lr, momentum, nesterov    for the hidden matrices
    adjust_lr_fn   "match_rms_adamw" scales updates to the size of AdamW's, so that lr and weight_decay can be taken
                   from AdamW (Liu et al. 2025, arXiv:2502.16982); "original" scales them by sqrt(max(1, rows /
                   columns))
    adamw_lr, adamw_betas, adamw_eps    for all other parameters
    no_matrix      glob patterns of hidden matrices that AdamW shall train
    """

    def __init__(
        self,
        model: nn.Module,
        lr: Rate = 1e-3,
        momentum: Beta = 0.95,
        nesterov: bool = True,
        ns_steps: Annotated[int, Interval(gt=0, lt=100)] = 5,
        adjust_lr_fn: Literal["match_rms_adamw", "original"] = "match_rms_adamw",
        weight_decay: Decay = 0.1,
        adamw_lr: Rate = 3e-4,
        adamw_betas: tuple[Beta, Beta] = (0.9, 0.95),
        adamw_eps: Eps = 1e-8,
        no_decay: Sequence[str] = (),
        no_matrix: Sequence[str] = (),
    ):
        groups = parameter_groups(model, adamw_lr, weight_decay, no_decay, lr, no_matrix)
        if not any("split" in group for group in groups):
            raise ValueError(
                "Muon: the model has no hidden matrix (a trainable nn.Linear other than the output matrix); use "
                "Experiment.optimizer = @AdamW, or exclude fewer in Muon.no_matrix"
            )
        super().__init__(groups, {"fused": _fused(groups)})  # in the groups, where torch looks when it loads a state
        self.options: Group = {"momentum": momentum, "nesterov": nesterov, "ns_steps": ns_steps}
        self.options["adjust_lr_fn"] = adjust_lr_fn
        self.options_adamw: Group = {"betas": adamw_betas, "eps": adamw_eps}

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # torch allows a closure; the toolkit passes none
        """Build torch's AdamW and Muon over the groups and the state of this optimizer, and let them step."""
        for group in self.param_groups:
            common: Group = {"lr": group["lr"], "weight_decay": group["weight_decay"]}
            split = group.get("split")
            if split is None:
                adamw = torch.optim.AdamW(group["params"], **common, **self.options_adamw, fused=group["fused"])
                adamw.state = self.state
                adamw.step()
            else:
                buffers = _matrices(group["params"], split, self.state)
                muon = torch.optim.Muon(list(buffers), **common, **self.options)
                muon.state.update({matrix: {"momentum_buffer": buffer} for matrix, buffer in buffers.items()})
                muon.step()


@register("optimizer")
class ScheduleFreeAdamW(schedulefree.AdamWScheduleFree):
    """AdamW that averages its iterates instead of lowering the learning rate (Defazio et al. 2024, arXiv:2405.15682).
    Gradients are taken at beta1 * average + (1 - beta1) * iterate. Evaluation, checkpoints and generation use the
    average. Combine it with a constant schedule with a warm-up. The authors advise a learning rate of 1 to 10 times
    AdamW's."""

    def __init__(
        self,
        model: nn.Module,
        lr: Rate = 2.5e-3,
        betas: tuple[Annotated[float, Interval(gt=0, lt=1)], Beta] = (0.9, 0.95),
        eps: Eps = 1e-8,
        weight_decay: Decay = 0.1,
        no_decay: Sequence[str] = (),
    ):
        super().__init__(parameter_groups(model, lr, weight_decay, no_decay), lr=lr, betas=betas, eps=eps)
        self.train()


@register("optimizer")
class SOAP(torch.optim.Optimizer):
    """Adam in the eigenbasis of Shampoo's preconditioner (Vyas et al. 2024, arXiv:2409.11321). For the gradient G of a
    matrix W, with L and R the running means of G G^T and G^T G, and Q_L and Q_R their eigenvectors,

        v <- running mean of (Q_L^T G Q_R)^2,    W -= lr * Q_L ((Q_L^T M Q_R) / (sqrt(v) + eps)) Q_R^T

    where M is the running mean of G, and v and M are corrected as in Adam. The first step only computes L and R. Gains
    and biases have no basis: for them this is Adam. A tensor of more than 2 dimensions is a stack of matrices. Weight
    decay is decoupled.

    shampoo_beta             decay rate of the running means L and R
    precondition_frequency   steps between updates of Q_L and Q_R, by one power iteration and a QR decomposition
    max_precondition_dim     a side of a matrix longer than this, such as the vocabulary, has no basis
    """

    def __init__(
        self,
        model: nn.Module,
        lr: Rate = 3e-3,
        betas: tuple[Beta, Beta] = (0.95, 0.95),
        shampoo_beta: Beta = 0.95,
        eps: Eps = 1e-8,
        weight_decay: Decay = 0.01,
        precondition_frequency: Annotated[int, Gt(0)] = 10,
        max_precondition_dim: Annotated[int, Gt(0)] = 10_000,
        no_decay: Sequence[str] = (),
    ):
        defaults = {"betas": betas, "eps": eps}
        super().__init__(parameter_groups(model, lr, weight_decay, no_decay), defaults)
        self.beta, self.every, self.longest = shampoo_beta, precondition_frequency, max_precondition_dim

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # torch allows a closure; the toolkit passes none
        for group in self.param_groups:
            for p, g in _with_gradient(group):
                if self.state[p]:
                    self._update(p, g, self.state[p], group)
                else:
                    self._start(p, g, self.state[p])

    def _start(self, p: Tensor, g: Tensor, state: State) -> None:
        """Create the state of a parameter in its first step, which does not move it."""
        state |= {"steps": 0, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        for side, outer in _outer_products(g, self.longest).items():
            state[side] = outer * (1 - self.beta)
            state[f"{side}_basis"] = torch.linalg.eigh(state[side])[1].flip(-1)  # largest eigenvalue first

    def _update(self, p: Tensor, g: Tensor, state: State, group: Group) -> None:
        """Move a parameter, update L and R, and every ``precondition_frequency`` steps their eigenvectors."""
        beta1, beta2 = group["betas"]
        state["steps"] += 1
        bases = state.get("left_basis"), state.get("right_basis")
        state["exp_avg"].lerp_(g, 1 - beta1)
        state["exp_avg_sq"].lerp_(_rotate(g, *bases).square(), 1 - beta2)
        step = _rotate(state["exp_avg"], *bases) / state["exp_avg_sq"].sqrt().add_(group["eps"])
        correction = (1 - beta2 ** state["steps"]) ** 0.5 / (1 - beta1 ** state["steps"])
        p.add_(_rotate(step, *bases, back=True), alpha=-group["lr"] * correction)
        p.mul_(1 - group["lr"] * group["weight_decay"])
        for side, outer in _outer_products(g, self.longest).items():
            state[side].lerp_(outer, 1 - self.beta)
            if state["steps"] % self.every == 0:
                _update_basis(state, side)


def _fused(groups: list[Group]) -> bool:
    """Whether torch has a fused kernel for all parameters; it has none on the meta device."""
    return {p.device.type for group in groups for p in group["params"]} <= {"cuda", "cpu"}


def _with_gradient(group: Group) -> list[tuple[Tensor, Tensor]]:
    """The parameters of a group that have a gradient, each with it."""
    return [(p, p.grad) for p in group["params"] if p.grad is not None]


def _matrices(
    params: list[nn.Parameter], split: list[list[int] | None], state: dict[Tensor, State]
) -> dict[Tensor, Tensor]:
    """Map each matrix that the parameters merge, with its gradient, to its momentum. ``split`` has the row counts of
    the matrices of each parameter. All tensors are views: writing into them changes the parameter and its state."""
    momenta = {}
    for p, rows in zip(params, split, strict=True):
        if p.grad is not None:
            if not state[p]:
                state[p]["momentum_buffer"] = torch.zeros_like(p)
            parts = (t.split(rows or len(p)) for t in (p.detach(), p.grad, state[p]["momentum_buffer"]))
            for matrix, gradient, momentum in zip(*parts, strict=True):
                matrix.grad = gradient
                momenta[matrix] = momentum
    return momenta


def _outer_products(gradient: Tensor, longest: int) -> dict[str, Tensor]:
    """G (...,M,N) -> {"left": G G^T (...,M,M), "right": G^T G (...,N,N)}, without the sides longer than ``longest``."""
    if gradient.ndim < 2:
        return {}
    sides = {"left": gradient, "right": gradient.mT}
    return {side: g @ g.mT for side, g in sides.items() if g.shape[-2] <= longest}


def _rotate(matrix: Tensor, left: Tensor | None, right: Tensor | None, back: bool = False) -> Tensor:
    """M (...,M,N) -> Q_L^T M Q_R, or with ``back`` Q_L M Q_R^T. A basis of None is the identity."""
    if left is not None:
        matrix = (left if back else left.mT) @ matrix
    if right is not None:
        matrix = matrix @ (right.mT if back else right)
    return matrix


def _update_basis(state: State, side: str) -> None:
    """Update Q_L or Q_R by one power iteration, Q <- QR(L Q), with its columns sorted by eigenvalue. The second moments
    are sorted in the same way."""
    basis, dim = state[f"{side}_basis"], {"left": -2, "right": -1}[side]
    product = state[side] @ basis
    order = (basis * product).sum(-2).argsort(descending=True)  # (...,M), by the estimated eigenvalues
    state["exp_avg_sq"] = state["exp_avg_sq"].take_along_dim(order.unsqueeze(-3 - dim), dim)
    state[f"{side}_basis"] = torch.linalg.qr(product.take_along_dim(order.unsqueeze(-2), -1))[0]
