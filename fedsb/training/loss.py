"""Losses: the mean of per-sequence losses, never of all tokens of a batch.

With transformers' own loss (the mean over the tokens of the whole batch) one example's length changes another's gradient,
which would void any bound on what a single example can do; here each sequence counts alike.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedsb.adapters.lopa import prompted
from fedsb.data.batches import Batch

CHUNK_NUMBERS = 1 << 23  # logits held at one time: 32 MiB in fp32
RESHAPED_LOGITS = (  # config keys of heads that are not plain, in transformers 5
    "final_logit_softcapping",
    "lm_head_multiplier",
    "logit_scale",
    "logits_scaling",
    "logits_soft_cap",
    "output_logit_soft_cap",
    "output_multiplier",
)


class _FrozenHead(torch.autograd.Function):
    """Weighted cross entropy of a frozen linear head, in chunks: neither logits nor their gradient are ever whole.

    The gradient towards the hidden states is formed in the forward pass, while a chunk's logits are at hand.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, scale: Tensor) -> Tensor:
        """hidden (N, d), weight (V, d), labels (N,), scale (N,) → Σ scale_i · CE_i, a scalar in fp32."""
        rows = max(1, CHUNK_NUMBERS // weight.shape[0])
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        gradient = torch.empty_like(hidden)
        for h, y, s, g in zip(hidden.split(rows), labels.split(rows), scale.split(rows), gradient.split(rows), strict=True):
            logits = (h @ weight.T).float()  # (rows, V)
            normaliser = logits.logsumexp(-1)
            chosen = logits.gather(1, y[:, None])[:, 0]
            total += (s * (normaliser - chosen)).sum()
            residual = logits.sub_(normaliser[:, None]).exp_()  # softmax, in place
            residual.scatter_add_(1, y[:, None], torch.full_like(y, -1, dtype=residual.dtype)[:, None])
            torch.matmul(residual.mul_(s[:, None]).to(weight.dtype), weight, out=g)
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream[0].to(gradient.dtype), None, None, None


def head_of(model: Any) -> Tensor | None:
    """The weight (V, d) of a frozen plain linear output head, or None if the model does more to its logits."""
    head = model.get_output_embeddings()
    plain = isinstance(head, nn.Linear) and head.bias is None and not head.weight.requires_grad
    config = model.config.get_text_config()
    reshaped = any(getattr(config, key, None) not in (None, 1, 1.0) for key in RESHAPED_LOGITS)
    return head.weight if plain and not reshaped else None


def labelled_states(model: Any, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states (or logits, where the head is not plain) at the positions that predict a label.

    Args:
        model: a transformers causal or Whisper-type model (not the PEFT wrapper).
        batch: B sequences of T tokens.

    Returns:
        states (N, d or V), labels (N,), row (N,): the sequence that each position belongs to.
    """
    inputs = inputs_of(model, batch) | {"use_cache": False}
    states = model(**inputs).logits if head_of(model) is None else model.base_model(**inputs).last_hidden_state
    states, labels = states[:, -batch.input_ids.shape[1] :], batch.labels[:, 1:]  # without those of a soft prompt
    row, column = (labels != -100).nonzero(as_tuple=True)
    return states[row, column], labels[row, column], row


def inputs_of(model: Any, batch: Batch) -> dict[str, Tensor]:
    """What a model is given of a batch: its tokens, or soft prompts and embedded tokens where its rows have instances; of
    recordings, what is heard and what the decoder has said so far (whose padding comes last, so nothing looks at it)."""
    if batch.features is not None:
        return {"input_features": batch.features.to(model.dtype), "decoder_input_ids": batch.input_ids}
    if batch.instances is None:
        return {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    return prompted(model, batch.input_ids, batch.attention_mask, batch.instances)


def sequence_weights(row: Tensor, sequences: int) -> Tensor:
    """1 / (sequences · labels of that sequence) for each position (N,): sums up to the mean of per-sequence means."""
    count = torch.bincount(row, minlength=sequences)
    return 1.0 / (sequences * count[row])


def causal_loss(model: Any, batch: Batch) -> Tensor:
    """Mean over sequences of the mean negative log-likelihood of their labelled tokens, nats; a scalar."""
    states, labels, row = labelled_states(model, batch)
    scale = sequence_weights(row, batch.labels.shape[0])
    weight = head_of(model)
    if weight is None:
        return (functional.cross_entropy(states.float(), labels, reduction="none") * scale).sum()
    loss: Tensor = _FrozenHead.apply(states, weight, labels, scale)  # type: ignore[no-untyped-call]
    return loss


def classification_loss(model: Any, batch: Batch) -> Tensor:
    """Mean cross entropy over the examples, nats; a scalar."""
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    return functional.cross_entropy(logits.float(), batch.labels)
