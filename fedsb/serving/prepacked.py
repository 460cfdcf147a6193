"""Linear layers whose weights lie in the order in which oneDNN multiplies with them. A plain layer's are put into it at each
call, and with few rows, as when a batch of requests gets its next tokens, that takes as long as the product. The bits
are the same.

bf16 on CPUs alone. torch's compiler (Inductor) uses the same two operators when it freezes a model;
`tests/serving/test_prepacked.py` fails when they are not what they were.
"""

import torch
from torch import Tensor, nn

ROWS = 32  # of a product; a hint, for which oneDNN may choose another order


def can_prepack(layer: nn.Linear) -> bool:
    """Whether it is a plain layer in bf16 on a CPU that multiplies that."""
    weight = layer.weight
    return (
        type(layer) is nn.Linear
        and type(weight.data) is Tensor
        and weight.device.type == "cpu"
        and weight.dtype == torch.bfloat16
        and torch.backends.mkldnn.is_available()
        and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )


class PrepackedLinear(nn.Module):
    """For inference only. It does not hold the layer's own weight."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bias = layer.in_features, layer.out_features, layer.bias
        self._packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), ROWS)

    def forward(self, x: Tensor) -> Tensor:
        """x (…, in) bf16 → (…, out)."""
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, self.bias, "none", [], "")
        return y

    @property
    def weight(self) -> Tensor:
        """(out, in), made anew."""
        return self._packed.to_dense()
