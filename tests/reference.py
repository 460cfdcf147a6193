"""The naive versions: one example, one client, one layer at a time, in fp64 where it matters. Fast paths are tested
against these, so nothing here may be clever."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedsb.basis.frames import Basis
from fedsb.data.batches import Encoded


def adapted_linear(w: Tensor, b: Tensor, r: Tensor, a: Tensor, x: Tensor) -> Tensor:
    """y = W0·x + B·R·A·x in fp64, the change formed as a matrix: w (out, in), x (…, in) → (…, out)."""
    change = b.double() @ r.double() @ a.double()
    return x.double() @ (w.double() + change).T


def bone_update(weight: Tensor, bone: Tensor, form: str) -> Tensor:
    """The change W_ab·bone + bone of every r x r block of a weight (out, in), block after block, fp64."""
    weight, bone, r = weight.double(), bone.double(), bone.shape[-1]
    update = torch.zeros_like(weight)
    for a in range(weight.shape[0] // r):
        for b in range(weight.shape[1] // r):
            rows, columns, own = slice(a * r, (a + 1) * r), slice(b * r, (b + 1) * r), bone[a if form == "column" else b]
            update[rows, columns] = weight[rows, columns] @ own + own
    return update


def with_updates(model: nn.Module, basis: Basis, state: Mapping[str, Tensor]) -> None:
    """Add B·R·A to the weights of a plain model, in place, layer by layer."""
    for name in basis.B:
        change = basis.B[name].double() @ state[f"{name}.core"].double() @ basis.A[name].double()
        weight: Tensor = model.get_submodule(name).weight  # type: ignore[assignment]
        weight.data = (weight.data.double() + change).to(weight.dtype)


def mean_update(basis: Basis, states: Sequence[Mapping[str, Tensor]], weights: Sequence[float]) -> dict[str, Tensor]:
    """Layer → Σ w_i·B·R_i·A / Σ w_i, every client's update formed whole, fp64."""
    mean = {}
    for name, b in basis.B.items():
        total = torch.zeros(b.shape[0], basis.A[name].shape[1], dtype=torch.float64)
        for state, weight in zip(states, weights, strict=True):
            total += weight * (b.double() @ state[f"{name}.core"].double() @ basis.A[name].double())
        mean[name] = total / sum(weights)
    return mean


def relative_distance(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """‖one - other‖_F / ‖one‖_F over all layers."""
    difference = sum(float((one[name] - other[name]).square().sum()) for name in one)
    return float((difference / sum(float(m.square().sum()) for m in one.values())) ** 0.5)


def sequence_loss(model: Any, row: Encoded) -> Tensor:
    """Mean negative log-likelihood of one sequence's completion, from the model's own logits, without padding."""
    ids = [*row.prompt, *row.completion]
    logits = model(input_ids=torch.tensor([ids])).logits[0]
    losses = []
    for place in range(len(row.prompt), len(ids)):
        losses.append(-functional.log_softmax(logits[place - 1].float(), dim=-1)[ids[place]])
    return torch.stack(losses).mean()


def batch_loss(model: Any, rows: Sequence[Encoded]) -> Tensor:
    """Mean over sequences of their own mean losses."""
    return torch.stack([sequence_loss(model, row) for row in rows]).mean()


def train(
    model: Any,
    parameters: Mapping[str, nn.Parameter],
    steps: Sequence[tuple[Sequence[Encoded], float]],
) -> None:
    """AdamW written out, each step on the whole of its rows, without padding; steps: (rows, learning rate)."""
    mean = {name: torch.zeros_like(p) for name, p in parameters.items()}
    square = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for t, (rows, rate) in enumerate(steps, start=1):
        found = gradients(batch_loss(model, rows), parameters)
        with torch.no_grad():
            for name, parameter in parameters.items():
                mean[name] = 0.9 * mean[name] + 0.1 * found[name]
                square[name] = 0.999 * square[name] + 0.001 * found[name] ** 2
                step = (mean[name] / (1 - 0.9**t)) / ((square[name] / (1 - 0.999**t)).sqrt() + 1e-8)
                parameter -= rate * step


def gradients(loss: Tensor, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Name → gradient, nothing accumulated anywhere."""
    return dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))


def summed_gradient(layers: Mapping[str, nn.Module], batches: Iterable[Any], loss: Callable[[Any], Tensor]) -> dict[str, Tensor]:
    """Layer → the sum over batches of its weight's whole gradient (out, in), fp64."""
    weights: dict[str, nn.Parameter] = {name: layer.weight for name, layer in layers.items()}  # type: ignore[misc]
    total = {name: torch.zeros(weight.shape, dtype=torch.float64) for name, weight in weights.items()}
    for weight in weights.values():
        weight.requires_grad_(True)
    for batch in batches:
        for name, gradient in gradients(loss(batch), weights).items():
            total[name] += gradient.double()
    for weight in weights.values():
        weight.requires_grad_(False)
    return total


def truncated(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Leading singular triplets from the exact SVD, fp64: (out, r), (r,), (r, in)."""
    u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    return u[:, :rank], s[:rank], vh[:rank]


def farthest_angle(one: Tensor, other: Tensor) -> float:
    """Sine of the largest principal angle between the column spaces of two orthonormal (n, r)."""
    one, other = one.double(), other.double()
    return float(torch.linalg.matrix_norm(other - one @ (one.T @ other), 2))


@torch.no_grad()
def exact_matches(model: Any, rows: Sequence[Encoded], tokenizer: Any, max_new_tokens: int) -> list[bool]:
    """Example by example, greedy decoding by transformers, token for token against completion and end of sequence."""
    found = []
    for row in rows:
        prompt = torch.tensor([row.prompt])
        out = model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        found.append(out[0, len(row.prompt) :].tolist() == row.completion)
    return found
