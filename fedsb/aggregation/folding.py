"""What a round leaves for the weights, layer by layer, where a method's mean does not fit into a state."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from fedsb.adapters.method import FoldOf
from fedsb.adapters.state import HEAD
from fedsb.basis.frames import Fold, beside


def fold_of(
    rule: FoldOf, clients: Sequence[tuple[Mapping[str, Tensor], float]], mean: Mapping[str, Tensor], scale: float
) -> Fold:
    """U (out, k) and V (k, in) of every layer, fp32, as the method's rule has them; k at most the layer's smaller side.

    Args:
        rule: `Method.fold`.
        clients: states and weights; the weights need not add up to 1.
        mean: the state that is their weighted mean.
        scale: α/r.
    """
    total = sum(weight for _, weight in clients)
    shares = [weight / total for _, weight in clients]
    parts: dict[str, set[str]] = {}
    for name in mean:
        layer, _, part = name.rpartition(".")
        if not name.startswith(HEAD):
            parts.setdefault(layer, set()).add(part)
    found = {}
    for layer, own in parts.items():
        states = [{part: state[f"{layer}.{part}"] for part in own} for state, _ in clients]
        u, v = rule(states, shares, {part: mean[f"{layer}.{part}"] for part in own}, scale)
        u, v = beside([(u, v)])
        found[layer] = u.float().contiguous(), v.float().contiguous()
    return found
