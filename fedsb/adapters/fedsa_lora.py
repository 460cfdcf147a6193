"""FedSA-LoRA: LoRA of which only A travels; B, and a trained head, stay with each client from round to round.

    y = W0·x + (α/r)·Bᵢ·A·x         A (r, in) is averaged; Bᵢ (out, r) is client i's own, zero before its first round

Guo et al., "Selective Aggregation for Low-Rank Adaptation in Federated Learning", arXiv 2410.01463 (ICLR 2025), section 4: A
is found to hold what clients have in common, and B what they have not. Their published configuration for GLUE leaves the
classification head with the clients too, and so does this.
"""

from fedsb.adapters.lora import lora_chain, lora_config
from fedsb.adapters.method import Method

SAYS = "Each layer computes `y = W0 x + (alpha/r) B A x`; A is averaged over the sites, and each site keeps a B of its own."
FEDSA_LORA = Method(
    lora_config, {"A": ("r", "in"), "B": ("out", "r")}, (), lora_chain, exact=False, says=SAYS, rate=2e-3, kept=("B", "head")
)
