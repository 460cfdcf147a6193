"""FFA-LoRA: LoRA whose A is frozen, the same for everybody.

    y = W0·x + (α/r)·B·A·x          only B (out, r) is trained; A (r, in) follows from the run's seed

Sun, Li, Li, Ding, "Improving LoRA in Privacy-preserving Federated Learning", arXiv 2403.12313, section 4: mean(Bᵢ)·A is
mean(Bᵢ·A), so the average is exact, half as many numbers travel, and noise for privacy is added to one factor only.
"""

from torch import Tensor

from fedsb.adapters.lora import lora_config
from fedsb.adapters.method import Method, Parts


def _chain(parts: Parts, b: Tensor | None, a: Tensor | None, scale: float) -> tuple[Tensor, ...]:
    assert a is not None
    return scale * parts["B"], a


SAYS = "Each layer computes `y = W0 x + (alpha/r) B A x`; A is frozen and the same for all sites, which train B."
FFA_LORA = Method(lora_config, {"B": ("out", "r")}, ("A",), _chain, exact=True, says=SAYS, rate=4e-3)
