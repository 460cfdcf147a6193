"""LoRA of different ranks: a client of rank rᵢ holds the leading rᵢ rows of A and columns of B; two ways of averaging them.

    y = W0·x + (α/r)·B[:, :rᵢ]·A[:rᵢ]·x          r: the largest rank, whoever trains, so that all mean the same by their factors

HetLoRA: Cho et al., "Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation Models", arXiv 2401.06432 (EMNLP 2024),
without its self-pruning, by which a client lowers its own rank. FlexLoRA: Bai et al., "Federated Fine-tuning of Large Language
Models under Heterogeneous Tasks and Client Resources", arXiv 2402.11505 (NeurIPS 2024). `fedsb.aggregation.factors` has the
means. What a client does not hold is zero there, and with it the gradient: it stays zero without a mask.
"""

from dataclasses import replace

from fedsb.adapters.lora import LORA

HETLORA = replace(
    LORA,
    says="Each layer computes `y = W0 x + (alpha/r) B A x`; sites have different ranks, and A and B, filled up with zeros, are "
    "averaged apart, each site weighed by the norm of its update (HetLoRA).",
)
FLEXLORA = replace(
    LORA,
    says="Each layer computes `y = W0 x + (alpha/r) B A x`; sites have different ranks, and get leading singular vectors of the "
    "mean update (FlexLoRA).",
)
