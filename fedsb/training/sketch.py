"""A client's sketch of its first gradient, as a sum over its examples: plain, or each example clipped.

The gradient of an example is that of its own loss, the mean over its labelled tokens. What comes out is one fp32 vector, laid
out by `SketchPlan.tensors`; those of several clients may be added up (`fedsb.basis.sketch`).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fedsb.basis.sketch import SketchPlan, sketches
from fedsb.data.batches import Encoded, Kind, collate
from fedsb.privacy.clipping import Clipped, clipped_sum
from fedsb.training.loss import causal_loss, classification_loss

MICROBATCH = 4  # examples per backward pass: half a training step's activations or fewer
CLIPPED_MICROBATCH = 2  # each has a sketch of its own in memory


@dataclass(frozen=True)
class Sketcher:
    """Sketches the gradient of a model at the weights that it has.

    Attributes:
        plan: what a sketch consists of.
        layers: layer name → linear layer, those of the plan (`get_base_layer()` of the adapted ones).
        model: the transformers model (not the PEFT wrapper), in eval mode, with the cores and head that training starts from.
        kind: whether it is a language model or a classifier.
        pad_id: the token that fills up rows.
    """

    plan: SketchPlan
    layers: Mapping[str, nn.Module]
    model: Any
    kind: Kind
    pad_id: int

    def summed(self, rows: Sequence[Encoded], microbatch: int = MICROBATCH) -> Tensor:
        """Σ over rows of the sketch of the row's gradient: (size,), fp32 on the CPU; zeros for no rows.

        `microbatch`: rows per backward pass; changes nothing but rounding.
        """
        total = torch.zeros(self.plan.size)
        for part in _parts(rows, microbatch):
            total += self._sketches(part, 1)[0].cpu()
        return total

    def clipped(self, rows: Sequence[Encoded], bound: float, microbatch: int = CLIPPED_MICROBATCH) -> Clipped:
        """As `summed`, with each row's sketch, all layers together, clipped to an L2 norm of `bound`. No noise is added.

        Guarantees:
            - adding or removing one row changes the sum by at most `bound`; `clipped_sum` says how it rounds.
            - a row's sketch does not depend on the other rows of its microbatch, but for rounding: losses are per sequence and
              padding is masked.

        | case | result |
        |---|---|
        | no rows | zeros |
        | a row whose gradient is zero or not finite | adds zeros |
        | a bound that is no positive finite number | PrivacyError |
        | a layer that sees the tokens of several rows as one list | BasisError, unless `microbatch` is 1 |

        A sketch is about as long as the gradient, whatever rank and oversampling: `bound` means what the clip of DP-SGD on all
        weights of these layers would. Memory: `microbatch` sketches, one more to clip it, and the sum in fp64.
        """
        return clipped_sum(self._one_by_one(rows, microbatch), bound, self.plan.size)

    def _one_by_one(self, rows: Sequence[Encoded], microbatch: int) -> Iterator[Tensor]:
        for part in _parts(rows, microbatch):
            yield from self._sketches(part, len(part))

    def _sketches(self, part: Sequence[Encoded], told_apart: int) -> Tensor:
        """(told_apart, size): one sketch a row, or one of their sum."""
        loss_of = classification_loss if self.kind == "classification" else causal_loss
        device: torch.device = next(iter(self.layers.values())).weight.device  # type: ignore[assignment,union-attr]
        batch = collate(part, self.pad_id, self.kind).to(device)
        return sketches(self.plan, self.layers, lambda: loss_of(self.model, batch) * len(part), told_apart)  # sum, not mean


def _parts(rows: Sequence[Encoded], size: int) -> Iterator[Sequence[Encoded]]:
    """Neighbours of like length have little padding."""
    ordered = sorted(rows, key=len)
    for start in range(0, len(ordered), size):
        yield ordered[start : start + size]
