"""Optimizers over the toolkit's parameter groups: torch.optim's, the authors' own, and the published formula."""

from collections.abc import Sequence
from typing import Annotated, Literal

import schedulefree
import torch
from annotated_types import Ge, Gt, Interval, Le
from torch import nn

from toolkit.groups import parameter_groups
from toolkit.registry import register

Rate = Annotated[float, Gt(0)]
Beta = Annotated[float, Interval(ge=0, lt=1)]
Eps = Annotated[float, Gt(0)]
Decay = Annotated[float, Ge(0)]


@register("optimizer")
class AdamW(torch.optim.AdamW):
    """Adam with decoupled weight decay (Loshchilov & Hutter 2017, arXiv:1711.05101), fused where PyTorch has it.
    ``no_decay`` are glob patterns of parameter names that do not decay, beyond gains and biases."""

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
    """Adam (Kingma & Ba 2014, arXiv:1412.6980), fused where PyTorch has it. Weight decay is coupled: an L2 term in the
    gradient, rescaled with it. ``no_decay`` as in AdamW."""

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
    """Stochastic gradient descent with momentum (Sutskever et al. 2013); weight decay is coupled, as in torch."""

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
    arXiv:2302.06675). Every weight moves by lr: the paper takes a 3 to 10 times smaller rate than AdamW's and as much
    more weight decay, so that their product stays. ``no_decay`` as in AdamW."""

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
    def step(self):
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in _with_gradient(group):
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                direction = state["momentum"].lerp(p.grad, 1 - beta1).sign_()
                p.mul_(1 - group["lr"] * group["weight_decay"]).add_(direction, alpha=-group["lr"])
                state["momentum"].lerp_(p.grad, 1 - beta2)


@register("optimizer")
class Adafactor(torch.optim.Adafactor):
    """Second moments kept as one row and one column a matrix, no first moment (Shazeer & Stern 2018,
    arXiv:1804.04235). The rate is relative: lr times the parameter's RMS (at least ``eps[1]``), lr itself bounded by
    1/sqrt(step), which a run of more than 1/lr^2 steps notices. ``clip_threshold`` bounds the RMS of an update;
    ``eps[0]=None`` is float32's resolution. Weight decay is decoupled, times lr alone. ``no_decay`` as in AdamW."""

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

    def step(self):
        if not any(p.is_meta for group in self.param_groups for p in group["params"]):
            super().step()
            return
        for group in self.param_groups:  # a dry run: torch's step reads numbers, so there is only the state to make
            self._init_group(group, [], [], [], [], [], [])


@register("optimizer")
class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised: the hidden matrices move along U V^T of their momentum U S V^T, to which ``ns_steps``
    Newton-Schulz steps come near; AdamW trains the rest (Jordan et al. 2024, kellerjordan.github.io/posts/muon).
    Hidden matrices are the weights of every Linear but the output matrix; ``no_matrix`` are glob patterns of those
    that AdamW is to train all the same. Matrices that a layer merges (q, k and v, say) are orthogonalised each on
    its own. "match_rms_adamw" scales updates to the size of AdamW's, so that ``lr`` and decay compare with its (Liu et
    al. 2025, arXiv:2502.16982), "original" by sqrt(max(1, rows/columns)). ``no_decay`` as in AdamW."""

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
                "Muon: no trainable nn.Linear to orthogonalise is in the model (the output matrix does not count); use "
                "Experiment.optimizer = @AdamW, or let Muon.no_matrix leave one"
            )
        super().__init__(groups, {"fused": _fused(groups)})  # in the group: torch looks there when it loads a state
        self.options = {"momentum": momentum, "nesterov": nesterov, "ns_steps": ns_steps, "adjust_lr_fn": adjust_lr_fn}
        self.options_adamw = {"betas": adamw_betas, "eps": adamw_eps}

    @torch.no_grad()
    def step(self):
        """Both optimizers are torch's, made anew at each step over this one's groups and state."""
        for group in self.param_groups:
            common = {"lr": group["lr"], "weight_decay": group["weight_decay"]}
            split = group.get("split")
            if split is None:
                inner = torch.optim.AdamW(group["params"], **common, **self.options_adamw, fused=group["fused"])
                inner.state = self.state
            else:
                buffers = _pieces(group["params"], split, self.state)
                inner = torch.optim.Muon(list(buffers), **common, **self.options)
                inner.state.update({piece: {"momentum_buffer": buffer} for piece, buffer in buffers.items()})
            inner.step()


@register("optimizer")
class ScheduleFreeAdamW(schedulefree.AdamWScheduleFree):
    """AdamW that averages its iterates instead of lowering the rate (Defazio et al. 2024, arXiv:2405.15682). Gradients
    are taken at beta1 * average + (1 - beta1) * iterate, and the average is what one evaluates, saves and generates
    with. Give it a constant schedule with a warm-up; rates of 1 to 10 times AdamW's are the authors' advice.
    ``no_decay`` as in AdamW."""

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
    """Adam in the eigenbasis of Shampoo's preconditioner (Vyas et al. 2024, arXiv:2409.11321). For a matrix G of
    gradients, L and R are running means of G G^T and G^T G; Adam's second moment is that of Q_L^T G Q_R, and every
    ``precondition_frequency`` steps one power iteration and a QR decomposition renew Q_L and Q_R. The first step only
    fills L and R. A side longer than ``max_precondition_dim`` keeps its own basis (the vocabulary of an embedding,
    say), as do gains and biases; what has more dimensions is a stack of matrices. ``no_decay`` as in AdamW."""

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
    def step(self):
        for group in self.param_groups:
            for p in _with_gradient(group):
                if self.state[p]:
                    self._move(p, self.state[p], group)
                else:
                    self._begin(p, self.state[p])

    def _begin(self, p, state):
        state |= {"steps": 0, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        for side, outer in _outer_products(p.grad, self.longest).items():
            state[side] = outer * (1 - self.beta)
            state[f"{side}_basis"] = torch.linalg.eigh(state[side])[1].flip(-1)  # the largest eigenvalue first

    def _move(self, p, state, group):
        beta1, beta2 = group["betas"]
        state["steps"] += 1
        bases = state.get("left_basis"), state.get("right_basis")
        state["exp_avg"].lerp_(p.grad, 1 - beta1)
        state["exp_avg_sq"].lerp_(_rotate(p.grad, *bases).square_(), 1 - beta2)
        step = _rotate(state["exp_avg"], *bases) / state["exp_avg_sq"].sqrt().add_(group["eps"])
        correction = (1 - beta2 ** state["steps"]) ** 0.5 / (1 - beta1 ** state["steps"])
        p.add_(_rotate(step, *bases, back=True), alpha=-group["lr"] * correction)
        p.mul_(1 - group["lr"] * group["weight_decay"])
        for side, outer in _outer_products(p.grad, self.longest).items():
            state[side].lerp_(outer, 1 - self.beta)
            if state["steps"] % self.every == 0:
                _renew_basis(state, side)


def _fused(groups):
    return {p.device.type for group in groups for p in group["params"]} <= {"cuda", "cpu"}


def _with_gradient(group):
    return [p for p in group["params"] if p.grad is not None]


def _pieces(params, split, state):
    """Each matrix that a parameter merges, with its gradient, -> its momentum. All are views: what torch writes into
    them lands in the parameter and in its state."""
    found = {}
    for p, rows in zip(params, split, strict=True):
        if p.grad is not None:
            if not state[p]:
                state[p]["momentum_buffer"] = torch.zeros_like(p)
            parts = (t.split(rows or len(p)) for t in (p.detach(), p.grad, state[p]["momentum_buffer"]))
            for piece, gradient, buffer in zip(*parts, strict=True):
                piece.grad = gradient
                found[piece] = buffer
    return found


def _outer_products(gradient, longest):
    """(..., M, N) -> G G^T as "left" and G^T G as "right", without the sides that are too long."""
    if gradient.ndim < 2:
        return {}
    sides = {"left": gradient, "right": gradient.mT}
    return {side: g @ g.mT for side, g in sides.items() if g.shape[-2] <= longest}


def _rotate(matrix, left, right, back=False):
    """Q_L^T M Q_R, or back: Q_L M Q_R^T. A basis of None is the identity."""
    if left is not None:
        matrix = (left if back else left.mT) @ matrix
    if right is not None:
        matrix = matrix @ (right.mT if back else right)
    return matrix


def _renew_basis(state, side):
    """One step of power iteration; the second moments move along with the columns that change places."""
    basis, dim = state[f"{side}_basis"], {"left": -2, "right": -1}[side]
    product = state[side] @ basis
    order = (basis * product).sum(-2).argsort(descending=True)  # (..., M), by estimated eigenvalue
    state["exp_avg_sq"] = state["exp_avg_sq"].take_along_dim(order.unsqueeze(-3 - dim), dim)
    state[f"{side}_basis"] = torch.linalg.qr(product.take_along_dim(order.unsqueeze(-2), -1))[0]
