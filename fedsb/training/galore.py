"""GaLore on one machine: full fine-tuning by AdamW whose moments are those of projected gradients.

    every T steps:  P (m, r) = leading left singular vectors of G (m, n), m ≤ n; otherwise of Gᵀ, and everything below transposed
    each step:      R = Pᵀ·G (r, n)      N = Adam(R)      W ← W - lr·scale·P·N

Zhao, Zhang, Chen, Wang, Anandkumar, Tian, arXiv 2403.03507, algorithm 2; as there, moments go on when P changes. States of a
matrix are m·r + 2·r·n numbers instead of 2·m·n.

With `per_layer` a gradient is projected and dropped in the backward pass, as soon as it is there (post-accumulate hooks), so
that never more than one whole gradient lives. What is projected of several backward passes is added up (projecting is linear),
and `step()` takes the step: so gradient accumulation is what it is without `per_layer`, but that a P which is due is taken from
the first of them. The released per-layer mode steps in every backward pass. Nobody else sees such gradients: clipping them has no
effect, and only the optimiser's own `zero_grad()` drops what was gathered.
"""

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from fedsb.basis.spectral import ITERATIONS, OVERSAMPLING

EXACT_BELOW = 256  # sides up to which the SVD is not randomised


class GaLoreAdamW(Optimizer):
    """AdamW in which matrices of some groups have projected gradients.

        matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
        others = [p for p in model.parameters() if not any(p is m for m in matrices)]
        optimiser = GaLoreAdamW([{"params": matrices, "rank": 128}, {"params": others}], lr=1e-3, per_layer=True)

    State is tensors and numbers alone, so it is saved and read with `weights_only=True`; read again it goes on to the same bits.

    Args:
        params: parameters, or groups; a group with `rank` projects its parameters, which must be matrices.
        lr: learning rate.
        betas, eps, weight_decay: AdamW's.
        gap: T, steps for which a projection stays.
        scale: α of the paper; not divided by the rank.
        per_layer: whether gradients are projected in the backward pass and dropped.

    Raises ValueError for a projected parameter that is no matrix, and a rank below 1.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        gap: int = 200,
        scale: float = 0.25,
        per_layer: bool = False,
    ) -> None:
        self._per_layer = per_layer
        self._hooks: list[RemovableHandle] = []
        self._gathered: dict[nn.Parameter, Tensor] = {}  # per layer: R of this step so far
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "rank": None, "gap": gap, "scale": scale}
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's, with `rank` checked; raises as `__init__`."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        if group["rank"] is None:
            return
        if group["rank"] < 1 or any(p.ndim != 2 for p in group["params"]):
            self.param_groups.pop()
            raise ValueError(f"rank = {group['rank']}: matrices alone are projected, at a rank from 1 on; take others out")
        for p in group["params"] if self._per_layer else ():
            self._hooks.append(p.register_post_accumulate_grad_hook(_gather_into(weakref.ref(self))))

    def close(self) -> None:
        """Leave the parameters' gradients alone from now on, for another optimiser."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._gathered.clear()

    def gather(self, p: nn.Parameter) -> None:
        """Add a gradient's projection to what there is of this step, and drop the gradient."""
        if p.grad is None:
            raise RuntimeError("another per-layer optimiser has taken this gradient; close() that one first")
        group = next(group for group in self.param_groups if any(q is p for q in group["params"]))
        projected = self._project(p, p.grad, group)
        self._gathered[p] = projected if p not in self._gathered else self._gathered[p].add_(projected)
        p.grad = None

    def _project(self, p: nn.Parameter, gradient: Tensor, group: dict[str, Any]) -> Tensor:
        """Pᵀ·G (r, n), or G·P (m, r) of a tall matrix; fp32. A P that is due is taken from this gradient."""
        state = self.state[p]
        if not state:
            state["step"] = 0
        due = "P" not in state or (state["step"] % group["gap"] == 0 and state["projected"] != state["step"])
        if due:
            if not gradient.isfinite().all():
                raise FloatingPointError(f"a gradient of shape {tuple(p.shape)} holds NaN or infinity; lower the learning rate")
            state["P"] = leading(gradient.float() if _wide(p) else gradient.float().T, group["rank"])
            state["projected"] = state["step"]
        projector: Tensor = state["P"]
        return projector.T @ gradient.float() if _wide(p) else gradient.float() @ projector

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch's; what was gathered is dropped too."""
        super().zero_grad(set_to_none)
        self._gathered.clear()

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step of everything that has a gradient."""
        if closure is not None:
            with torch.enable_grad():
                closure()
        for group in self.param_groups:
            for p in group["params"]:
                projected = group["rank"] is not None
                if p in self._gathered:
                    gradient = self._gathered.pop(p)
                elif p.grad is not None:
                    gradient = self._project(p, p.grad, group) if projected else p.grad.float()
                else:
                    continue
                move = self._adam(self.state[p], gradient, group)
                if projected:
                    projector = self.state[p]["P"]
                    move = group["scale"] * (projector @ move if _wide(p) else move @ projector.T)
                if group["weight_decay"]:
                    p.mul_(1 - group["lr"] * group["weight_decay"])  # before the update, as torch's AdamW
                p.add_(move.to(p.dtype), alpha=-group["lr"])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but for the dtype: torch makes it the parameter's, which rounds the moments of a bf16 model."""
        super().load_state_dict(state_dict)
        parameters = [p for group in self.param_groups for p in group["params"]]
        for number, saved in state_dict["state"].items():
            p = parameters[number]
            self.state[p] |= {key: value.to(p.device, copy=True) for key, value in saved.items() if isinstance(value, Tensor)}

    @staticmethod
    def _adam(state: dict[str, Any], gradient: Tensor, group: dict[str, Any]) -> Tensor:
        (first, second), eps = group["betas"], group["eps"]
        if "exp_avg" not in state:
            state |= {
                "step": state.get("step", 0),
                "exp_avg": torch.zeros_like(gradient),
                "exp_avg_sq": torch.zeros_like(gradient),
            }
        state["step"] += 1
        mean, square = state["exp_avg"], state["exp_avg_sq"]
        mean.lerp_(gradient, 1 - first)
        square.mul_(second).addcmul_(gradient, gradient, value=1 - second)
        size = (square / (1 - second ** state["step"])).sqrt_().add_(eps)
        move: Tensor = mean / (1 - first ** state["step"]) / size
        return move


def _gather_into(optimiser: "weakref.ref[GaLoreAdamW]") -> Callable[[Tensor], None]:
    """A hook that outlives no optimiser."""

    def gather(p: Tensor) -> None:
        found = optimiser()
        if found is not None:
            assert isinstance(p, nn.Parameter)
            found.gather(p)

    return gather


def _wide(p: Tensor) -> bool:
    """Whether P stands on the left."""
    return p.shape[0] <= p.shape[1]


def leading(matrix: Tensor, rank: int) -> Tensor:
    """The leading left singular vectors (m, min(rank, m)) of a matrix (m, n), fp32, up to sign.

    Of large ones by a randomised SVD (Halko et al., arXiv 0909.4061), from a generator of its own. PᵀP is the identity in either
    case, also of a gradient of zeros.
    """
    m, n = matrix.shape
    rank = min(rank, m)
    if min(m, n) <= EXACT_BELOW or rank + OVERSAMPLING >= m:
        gram = matrix.double() @ matrix.double().T
        vectors: Tensor = torch.linalg.eigh(gram).eigenvectors
        return vectors[:, -rank:].flip(1).float().contiguous()
    draw = torch.Generator(device="cpu").manual_seed(0)
    y = matrix @ torch.randn(n, rank + OVERSAMPLING, generator=draw).to(matrix)
    for _ in range(ITERATIONS):
        y = matrix @ (matrix.T @ torch.linalg.qr(y).Q)
    q = torch.linalg.qr(y).Q
    found: Tensor = q @ torch.linalg.svd(q.T @ matrix, full_matrices=False).U
    return found[:, :rank].contiguous()
