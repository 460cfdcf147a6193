"""Local training under record-level differential privacy: DP-SGD, with AdamW in the place of SGD.

    every record takes part in a step with probability q, by itself                Poisson sampling
    g_i = ∇ loss of record i alone;  ḡ_i = g_i · min(1, C / ‖g_i‖)                clipping
    g = (Σ ḡ_i + N(0, σ²C² I)) / (q n)                                            noise once a step

A trained head and the rest are clipped apart, the head to C_h/√2, with noise of σ·C_h, and the rest to C/√2, with σ·C: in units
of C_h and C a record adds a vector of length 1 at the most, and the noise on each number is σ.

Abadi et al., "Deep learning with differential privacy", arXiv 1607.00133, algorithm 1. What AdamW makes of g is
post-processing and costs nothing. A record is one sequence. Gradients of single records come from Opacus' hooks on the cores
and a trained head; clipping and noise are fp32 and float64 whatever the model computes in.
"""

import contextlib
import dataclasses
import math
import warnings
import weakref
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from opacus.grad_sample import GradSampleHooks, register_grad_sampler
from torch import Tensor, nn

from fedsb.adapters.lopa import Shared, made_up_instances
from fedsb.adapters.method import Around, wholly
from fedsb.adapters.state import HEAD
from fedsb.data.batches import Encoded, Kind, collate
from fedsb.data.speech import heard
from fedsb.errors import PrivacyError
from fedsb.privacy.mechanism import Mechanism
from fedsb.privacy.noise import KeyStream, add_noise
from fedsb.training.drift import Proximal
from fedsb.training.loop import Plan, loss_function, optimiser_of

SLACK = 1 - 2.0**-20  # what rounding in fp32 may add to a norm
TOLERANCE = 5e-3  # of a gradient's norm, between a batch and each record alone; rounding in fp32 takes 4e-4 of it on SmolLM2
_checked: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def train_private(
    model: Any,
    parameters: Mapping[str, nn.Parameter],
    rows: Sequence[Encoded],
    plan: Plan,
    mechanism: Mechanism,
    stream: KeyStream,
    *,
    kind: Kind,
    pad_id: int,
    around: Around = wholly,
    kept: Collection[str] = (),
) -> None:
    """Take the plan's steps on `parameters` in place. Returns nothing: a training loss would be about private records.

    Guarantees:
        - what `parameters` hold afterwards is (ε, δ)-private with regard to adding or removing one of `rows`, for every ε, δ
          of `accounting.epsilon([Release(noise_multiplier, sample_rate, plan.count)], δ)`, given what they held before.
        - which records take part and the noise come from `stream` alone, and not from the run's seed, which others know. There
          is no dropout: masks are drawn for a batch, so that one record would shift everybody else's.
        - the number of `rows` is public: rate, noise and divisor follow from it; so is what a step trains (`around`).
        - the divisor is the expected number of records q·n and not the drawn one, which would be private.

    | case | result |
    |---|---|
    | nobody is drawn | the step is noise alone |
    | a record whose gradient is zero | it adds zero |
    | a record whose gradient has NaN or infinity | it adds zero, which is a function of that record alone |
    | clip_norm 0, infinite or NaN | PrivacyError (`Mechanism`) |
    | a model with batch normalisation | PrivacyError: it mixes the records of a batch |
    | a trained module without gradients of single records | PrivacyError, naming it |
    | a model whose gradients of records are wrong in a batch | PrivacyError, naming the layer (`check_gradients`) |
    | rows fewer than plan.batch_size | the caller's rate is 1: everybody takes part in every step |
    """
    forbid_mixing(model)
    mechanism = with_head_clip(mechanism, parameters)
    check_gradients(model, parameters, kind, pad_id)
    loss_of, device = loss_function(kind), next(iter(parameters.values())).device
    optimiser, proximal = optimiser_of(parameters, plan), Proximal(parameters, plan.mu, kept)
    expected = mechanism.sample_rate * len(rows)
    _train_without_dropout(model)
    with gradients_of_records(model, parameters):
        for step in range(plan.first, plan.first + plan.count):
            drawn = [rows[i] for i in stream.poisson_sample(len(rows), mechanism.sample_rate)]
            drawn.sort(key=len)
            sums = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in parameters.items()}
            for group in optimiser.param_groups:
                group["lr"] = group["base"] * plan.factor(step)
            with around(step) as masks:
                for start in range(0, len(drawn), plan.microbatch):
                    part = drawn[start : start + plan.microbatch]
                    loss = loss_of(model, collate(part, pad_id, kind).to(device)) * len(part)  # the sum over its records
                    loss.backward()  # type: ignore[no-untyped-call]
                    for parameter, mask in masks:
                        parameter.grad_sample *= mask  # type: ignore[attr-defined]  # what does not learn is not clipped along
                    add_clipped(sums, parameters, mechanism.clip_norm, len(part), mechanism.clip(head=True))
                put_gradient(parameters, sums, mechanism, stream, expected)
                proximal.add(parameters)  # knows of no record but by what was released
                optimiser.step()
    model.eval()


def with_head_clip(mechanism: Mechanism, parameters: Mapping[str, nn.Parameter]) -> Mechanism:
    """A head's clip, where none is set: 2·√d for d features.

    Standardised features are about √d long, and so at the start is a record's gradient in the head. Clipped to much less, it
    learns the larger class and nothing else (docs/log.md). Of the 2, √2 is for the groups of `add_clipped`.
    """
    widths = [p.shape[1] for name, p in parameters.items() if name.startswith(HEAD) and p.ndim == 2]
    if mechanism.head_clip_norm is not None or not widths:
        return mechanism
    return dataclasses.replace(mechanism, head_clip_norm=2 * math.sqrt(max(widths)))


def add_clipped(
    sums: Mapping[str, Tensor],
    parameters: Mapping[str, nn.Parameter],
    clip_norm: float,
    records: int,
    head_clip_norm: float | None = None,
) -> None:
    """Add each of `records` records' clipped gradients to `sums`, and forget the gradients.

    A head's gradient is many times longer than all others together (7 times on MiniLM), and clipped with them would leave little
    of them. So head and rest are clipped apart (McMahan et al., arXiv 1710.06963: per-layer clipping, with two groups).

    Guarantees: of what one record adds, the parts of the head in units of `head_clip_norm` (None: `clip_norm`) and the rest in
    units of `clip_norm` have together an L2 norm of at most 1, rounding included.

    | case | result |
    |---|---|
    | a record whose gradient has NaN or infinity | it adds zero |
    | a gradient below the clip norm | it is added as it is |
    | a parameter without gradients of single records, or with one for each token | PrivacyError, naming it |
    """
    found = {name: _of_records(name, p, records) for name, p in parameters.items()}  # (b, *shape)
    heads = [name for name in found if name.startswith(HEAD)]
    groups = [group for group in (heads, [name for name in found if name not in heads]) if group]
    finite = torch.stack([g.flatten(1).isfinite().all(1) for g in found.values()]).all(0)  # (b,)
    for group in groups:
        own = clip_norm if head_clip_norm is None or group is not heads else head_clip_norm
        bound = own / math.sqrt(len(groups))
        norms = torch.stack([found[name].flatten(1).double().square().sum(1) for name in group]).sum(0).sqrt()
        factors = (SLACK * bound / norms.clamp_min(bound)).to(torch.float32)
        factors = torch.where(finite & norms.isfinite(), factors, 0.0)
        for name in group:
            rows = found[name] if bool(factors.all()) else torch.nan_to_num(found[name], 0.0, 0.0, 0.0)
            sums[name].add_(torch.tensordot(factors.to(rows.dtype), rows, 1))
            parameters[name].grad = parameters[name].grad_sample = None  # type: ignore[attr-defined]


def put_gradient(
    parameters: Mapping[str, nn.Parameter], sums: Mapping[str, Tensor], mechanism: Mechanism, stream: KeyStream, expected: float
) -> None:
    """Noise on the sums, once, and the mean over the expected number of records as every parameter's gradient.

    Guarantees: every number of the sums gets noise of its own, of `noise_multiplier` times the clip of its group (head or rest),
    drawn from `stream`; the divisor says nothing about who was drawn.
    """
    clips = [mechanism.clip(head=name.startswith(HEAD)) for name in sums]
    flat = torch.cat([s.flatten() / clip for s, clip in zip(sums.values(), clips, strict=True)])
    noisy = add_noise(flat, mechanism.noise_multiplier, stream) / expected
    parts = noisy.split([s.numel() for s in sums.values()])
    for part, clip, parameter in zip(parts, clips, parameters.values(), strict=True):
        parameter.grad = (part * clip).view_as(parameter).to(parameter.dtype)


def forbid_mixing(model: nn.Module) -> None:
    """Raise PrivacyError if a layer mixes the records of a batch, so that no record has a gradient of its own.

    Guarantees: no batch normalisation gets past, of any kind. What else mixes records, `check_gradients` sees.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise PrivacyError(
                f"layer {name} is a {type(module).__name__}, which mixes the records of a batch; "
                'choose a model without it, or privacy.unit = "client" or "none"'
            )


def check_gradients(model: nn.Module, parameters: Mapping[str, nn.Parameter], kind: Kind, pad_id: int) -> None:
    """Raise PrivacyError unless made-up records have the gradients in one batch that each has alone; once a model and process.

    A layer that runs on something else besides the records of a batch gives its gradient to one of them, and no shape tells.
    Such a coupling can be as small as 0.02 of a gradient, and rounding in bf16 as large as 0.08: so this is computed in fp32, for
    which the frozen weights are held in fp32 too for as long as it takes.

    Guarantees: of three made-up records of unlike length no trained parameter has a gradient that is further from its own than
    0.5 % of that. It is a test on three records and not a proof for all.

    | case | result |
    |---|---|
    | a layer that also runs on something else, or mixes records | PrivacyError, naming its parameter |
    """
    if model in _checked:
        return
    rows = [Encoded(list(range(3, 3 + n)), [] if kind == "classification" else [3, 4], 0) for n in (2, 5, 9)]
    if kind == "causal":
        made = zip(rows, made_up_instances(model, len(rows)), strict=True)
        rows = [Encoded(row.prompt, row.completion, instance=instance) for row, instance in made]
    elif kind == "speech":
        made_up = torch.randn(len(rows), *heard(model), generator=torch.Generator().manual_seed(0))
        rows = [Encoded(row.prompt, row.completion, recording=f.clone) for row, f in zip(rows, made_up, strict=True)]
    _train_without_dropout(model)
    with _in_fp32(model):
        together, alone = (_made_up(model, parameters, kind, pad_id, batches) for batches in ([rows], [[row] for row in rows]))
    model.eval()
    for name in parameters:
        if (together[name] - alone[name]).norm() > TOLERANCE * alone[name].norm() + 1e-12:
            raise PrivacyError(
                f"{name}: in a batch its gradients of single records are not those of each alone, so no clipping bounds them; "
                "choose another model, or leave that layer out of adapter.target_modules"
            )
    _checked.add(model)


@contextlib.contextmanager
def _in_fp32(model: nn.Module) -> Iterator[None]:
    """While open, all weights and buffers of a shorter floating dtype are in fp32; afterwards they are what they were."""
    short = {t: t.data for t in (*model.parameters(), *model.buffers()) if t.is_floating_point() and t.dtype != torch.float32}
    try:
        for tensor in short:
            tensor.data = tensor.data.float()
        yield
    finally:
        for tensor, data in short.items():
            tensor.data = data


def _train_without_dropout(model: nn.Module) -> None:
    """Training mode where there are trained parameters, since Opacus looks at such modules; everything else as in evaluation."""
    for module in model.modules():
        module.training = any(p.requires_grad for p in module.parameters(recurse=False))


def _made_up(
    model: nn.Module, parameters: Mapping[str, nn.Parameter], kind: Kind, pad_id: int, batches: Sequence[Sequence[Encoded]]
) -> dict[str, Tensor]:
    """Parameter → gradients of all records (records, *shape)."""
    loss_of, device = loss_function(kind), next(iter(parameters.values())).device
    found: dict[str, list[Tensor]] = {name: [] for name in parameters}
    with gradients_of_records(model, parameters):
        for batch in batches:
            (loss_of(model, collate(batch, pad_id, kind).to(device)) * len(batch)).backward()  # type: ignore[no-untyped-call]
            for name, parameter in parameters.items():
                found[name].append(_of_records(name, parameter, len(batch)).float().clone())
                parameter.grad = parameter.grad_sample = None  # type: ignore[attr-defined]
    return {name: torch.cat(parts) for name, parts in found.items()}


@contextlib.contextmanager
def gradients_of_records(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """While open, every backward pass leaves gradients of single records in `grad_sample` (b, *shape) of the parameters."""
    hooks = GradSampleHooks(model, loss_reduction="sum", strict=False)
    try:
        with warnings.catch_warnings():  # of the first layer, whose input comes from frozen embeddings
            warnings.filterwarnings("ignore", "Full backward hook is firing", UserWarning)
            yield
    finally:
        hooks.remove_hooks()
        for parameter in parameters.values():
            parameter.grad = parameter.grad_sample = None  # type: ignore[attr-defined]


@register_grad_sampler(Shared)  # type: ignore[untyped-decorator]
def _of_a_shared_prompt(layer: Shared, activations: Sequence[Tensor], backprops: Tensor) -> dict[nn.Parameter, Tensor]:
    """∂/∂Z_S of Z_S∘gate: (b, m, d) from the gate and the gradient of the prompt, both of that shape."""
    return {layer.weight: backprops * activations[0]}


def _of_records(name: str, parameter: nn.Parameter, records: int) -> Tensor:
    """(records, *shape). A layer that sees the tokens of a batch as one list has a gradient a token, and not a record."""
    found = getattr(parameter, "grad_sample", None)
    if not isinstance(found, Tensor) or len(found) != records:
        raise PrivacyError(
            f"{name} has no gradients of single records (its layer ran not at all, twice, on a list of tokens, or is of a kind "
            "that Opacus does not know); choose another adapter.method or model"
        )
    return found
