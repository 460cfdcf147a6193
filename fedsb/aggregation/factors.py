"""Means of LoRA's factors where clients have different ranks (`fedsb.adapters.ranks_lora`); both need each client's own."""

import torch
from torch import Tensor

from fedsb.adapters.state import HEAD, Layout
from fedsb.aggregation.mean import Mean

LEAST = 1e-30  # weight of an update of norm zero: it counts only among its like
WIDE = 2  # times min(out, in): how many columns of stacked factors are kept before they are made fewer


class PaddedMean(Mean):
    """HetLoRA's: A and B filled up with zeros to the largest rank, and averaged with weights ‖Bᵢ·Aᵢ‖_F (arXiv 2401.06432, 3.2).

    The norm is over all layers, so a client has one weight; `federation.weighting` multiplies it (the paper's is `uniform`).
    """

    def __init__(self, layout: Layout) -> None:
        super().__init__(layout.size)
        self.layout = layout

    def add(self, vector: Tensor, weight: float = 1.0, index: Tensor | None = None) -> None:
        """Count one client's vector (size,); what is not at `index` counts as zero."""
        whole = padded(vector, index)
        square = sum(float(((b.T @ b) * (a @ a.T)).sum()) for b, a in _factors(self.layout, whole).values())
        super().add(whole, weight * max(square**0.5, LEAST))


class FactorMean(Mean):
    """FlexLoRA's: the leading singular triplets of the mean of the Bᵢ·Aᵢ (arXiv 2402.11505, section 3); B = U·S and A = Vᵀ.

    The mean is kept as a product of stacked factors, (out, k) times (k, in) with k at most 2·min(out, in) + r, and never formed.
    Where there are fewer triplets than the rank, B is filled up with zeros and A with the rows that were sent. The split
    of S is ours: with all of it in B, a direction of singular value zero can still be trained, as at LoRA's start.
    """

    def __init__(self, layout: Layout) -> None:
        super().__init__(layout.size)
        self.layout = layout
        self._stacks: dict[str, tuple[Tensor, Tensor]] = {}

    def add(self, vector: Tensor, weight: float = 1.0, index: Tensor | None = None) -> None:
        """Count one client's vector (size,); what is not at `index` counts as zero."""
        whole = padded(vector, index)
        super().add(whole, weight)  # for a head
        for layer, (b, a) in _factors(self.layout, whole).items():
            held = a.any(1)
            b, a = b[:, held] * weight, a[held]
            if layer in self._stacks:
                before_b, before_a = self._stacks[layer]
                b, a = torch.cat([before_b, b], 1), torch.cat([before_a, a])
            self._stacks[layer] = _fewer(b, a) if len(a) > WIDE * min(len(b), a.shape[1]) else (b, a)

    def result(self, otherwise: Tensor | None = None) -> Tensor:
        """The new state (size,), fp32. `otherwise` (size,): the state that was sent."""
        if otherwise is None:
            raise ValueError("the state that was sent must be given")
        weights = float(self._weight)
        state, sent = self.layout.unflatten(super().result()), self.layout.unflatten(otherwise)
        for layer, (b, a) in self._stacks.items():
            new_b, new_a = torch.zeros_like(state[f"{layer}.B"]), sent[f"{layer}.A"].clone()
            u, s, vh = _triplets(b, a)
            rank = min(len(s), len(new_a))
            new_b[:, :rank] = (u * (s / weights))[:, :rank]
            new_a[:rank] = vh[:rank]
            state |= {f"{layer}.B": new_b, f"{layer}.A": new_a}
        return self.layout.flatten(state)


def mean_of(method: str, layout: Layout) -> Mean:
    """What the states of a method's clients are averaged with in a round."""
    means = {"hetlora": PaddedMean, "flexlora": FactorMean}
    return means[method](layout) if method in means else Mean(layout.size)


def padded(vector: Tensor, index: Tensor | None) -> Tensor:
    """A state (size,) with zeros where `index` does not point; None: the state itself."""
    return vector if index is None else torch.zeros_like(vector).index_copy_(0, index, vector[index])


def _factors(layout: Layout, vector: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Layer → B (out, r), A (r, in), fp64."""
    state = layout.unflatten(vector)
    layers = [name.removesuffix(".A") for name in state if name.endswith(".A") and not name.startswith(HEAD)]
    return {layer: (state[f"{layer}.B"].double(), state[f"{layer}.A"].double()) for layer in layers}


def _fewer(b: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """Factors (out, k), (k, in) with the same product and k = min(out, in)."""
    if b.shape[0] <= a.shape[1]:
        q, r = torch.linalg.qr(b)
        return q, r @ a
    q, r = torch.linalg.qr(a.T)
    return b @ r.T, q.T


def _triplets(b: Tensor, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The SVD of b·a: U (out, k), S (k,) descending, Vᵀ (k, in), by QR of both factors and a small SVD between."""
    (q, r), (p, t) = torch.linalg.qr(b), torch.linalg.qr(a.T)
    u, s, vh = torch.linalg.svd(r @ t.T, full_matrices=False)
    return q @ u, s, vh @ p.T
