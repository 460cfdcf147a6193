"""For `benchmarks/privacy_audit.py`: small runs of private training with and without one record, and bugs planted in it."""

import contextlib
import hashlib
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import torch
from numpy.typing import NDArray
from peft import get_peft_model
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

from fedsb.adapters.state import parameters_of
from fedsb.adapters.tuner import LoraSbConfig
from fedsb.data.batches import Batch, Encoded, Kind
from fedsb.privacy.mechanism import Mechanism
from fedsb.privacy.noise import KeyStream
from fedsb.training import private
from fedsb.training.loop import Plan
from fedsb.training.loss import labelled_states

Floats = NDArray[np.float64]
EMPTY = Encoded([5], [])  # a record without a label: its gradient is zero
VOCABULARY = 64
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}


def released(
    model: Any,
    parameters: Mapping[str, nn.Parameter],
    rows: Sequence[Encoded],
    kind: Kind,
    steps: int,
    mechanism: Mechanism,
    stream: KeyStream,
) -> Tensor:
    """What the auditor sees of `train_private`: the noisy gradient of every step (steps, size), float64.

    The learning rate is 0, so the model stays as it is and can be used again.
    """
    seen: list[Tensor] = []

    def look(*_: Any) -> None:
        seen.append(torch.cat([p.grad.flatten() for p in parameters.values() if p.grad is not None]).double())

    plan = Plan(0, steps, steps, max(1, len(rows)), 256, 0.0, 0.0, 0, False)
    handle = register_optimizer_step_pre_hook(look)
    try:
        private.train_private(model, parameters, rows, plan, mechanism, stream, kind=kind, pad_id=0)
    finally:
        handle.remove()
    return torch.stack(seen)


def key(seed: int, role: str) -> bytes:
    """Of a stream, so that an audit can be repeated; private training itself takes its keys from the operating system."""
    return hashlib.sha256(f"{seed} {role}".encode()).digest()


@dataclass(frozen=True, eq=False)
class World:
    """A model, a crowd of records that are always there, and a canary that is there or not.

    Attributes:
        counts: whether the auditor sees gradients as they are, divided by q·n; otherwise the division is undone, so that
            he does not see from the size of the noise how many records there are.
        draws: how often the auditor repeats what he does to know the outcomes, each with a key of its own, for a model that draws
            numbers in training.
    """

    model: Any
    kind: Kind
    crowd: Sequence[Encoded]
    canary: Encoded
    clip: float
    counts: bool = False
    draws: int = 1

    def step(self, present: bool, noise: float, stream: KeyStream) -> Tensor:
        """The noisy gradient (size,), or sum of gradients, of one step in which everybody takes part."""
        rows = [*self.crowd, self.canary] if present else self.crowd
        mechanism = Mechanism(noise, 1.0, self.clip)
        transformer, parameters = self.model.get_base_model(), parameters_of(self.model)
        seen = released(transformer, parameters, rows, self.kind, 1, mechanism, stream)[0]
        return seen if self.counts else seen * len(rows)


class Outcomes:
    """The distributions of a world's outcome without and with the canary: normal, with a centre and one spread for all numbers.

    They are found by running the code, as it is, with noise that is 0 everywhere, and 1 everywhere.
    """

    LEAST = 1e-3  # of the spread that there should be, for code that adds no noise

    def __init__(self, world: World, noise: float) -> None:
        self.world, self.noise = world, noise
        least = self.LEAST * noise * world.clip / (len(world.crowd) if world.counts else 1)
        self.centres: list[Tensor] = []
        self.spreads: list[float] = []
        for present in (False, True):
            silent, loud = (self._mean(present, value) for value in (0.0, 1.0))
            self.centres.append(silent)
            self.spreads.append(max(float((loud - silent).mean()), least))

    def _mean(self, present: bool, value: float) -> Tensor:
        """The mean outcome if every number of the noise is `value`."""
        keys = (key(0, f"draw {draw}") for draw in range(self.world.draws))
        return torch.stack([self.world.step(present, self.noise, Constant(k, value)) for k in keys]).mean(0)

    def distance(self) -> float:
        """How far the canary moves the centre, over the clip norm: at most 1 if it is clipped (where `counts` is off)."""
        return float((self.centres[1] - self.centres[0]).norm()) / self.world.clip

    def score(self, present: bool, stream: KeyStream) -> float:
        """The log likelihood ratio of presence, in nats, after one run."""
        seen = self.world.step(present, self.noise, stream)
        out, in_ = (
            float((seen - centre).square().sum()) / (2 * spread**2) + len(seen) * math.log(spread)
            for centre, spread in zip(self.centres, self.spreads, strict=True)
        )
        return out - in_


class Constant(KeyStream):
    """Noise that is the same number everywhere."""

    def __init__(self, key: bytes, value: float) -> None:
        super().__init__(key)
        self.value = value

    def normal(self, count: int) -> Floats:
        """(count,) times the value."""
        return np.full(count, self.value)


def llama_worlds() -> list[World]:
    """A long record among short ones that are alike, and one with a large gradient among records that have none."""
    model = _adapted(LlamaForCausalLM(LlamaConfig(**SIZES, intermediate_size=48, num_key_value_heads=2)))
    short, long = Encoded([7, 9], [30]), Encoded([7, 9], [41] * 100)
    return [World(model, "causal", [short] * 16, long, 4.0), World(model, "causal", [EMPTY] * 16, short, 0.2)]


def dropout_world() -> World:
    """BERT with the dropout that its authors used; the canary is the shortest record, so the others' places depend on it."""
    model = _adapted(BertForSequenceClassification(BertConfig(**SIZES, intermediate_size=48)), task_type="SEQ_CLS")
    draw = np.random.default_rng(0)
    crowd = [Encoded(draw.integers(3, VOCABULARY, 6).tolist(), [], place % 2) for place in range(32)]
    return World(model, "classification", crowd, Encoded([5], [], 1), 0.1, draws=16)


def flattened_world() -> World:
    """OPT, whose MLP is given the tokens of all records as one row each."""
    config = OPTConfig(**SIZES, ffn_dim=48, word_embed_proj_dim=32, dropout=0.0)
    model = _adapted(OPTForCausalLM(config), target_modules=["fc1", "fc2"])
    return World(model, "causal", [EMPTY] * 8, Encoded([7, 9], list(range(10, 50))), 1e-3)


def size_world() -> World:
    """Does the noise tell how many records there are, where q·n changes with n?"""
    return World(llama_worlds()[0].model, "causal", [EMPTY] * 8, Encoded([7, 9], [30]), 0.2, counts=True)


DOUBTS: dict[str, Callable[[], World]] = {"dropout": dropout_world, "flattened": flattened_world, "size": size_world}


def _adapted(model: Any, **settings: Any) -> Any:
    """With random weights, the same at every call, and cores of rank 16."""
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=draw))
    model.requires_grad_(False)
    with warnings.catch_warnings():  # PEFT 0.21 asks transformers 5.23 in a way that is deprecated
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        return get_peft_model(model, LoraSbConfig(r=16, **settings)).eval()


def _no_noise(vector: Tensor, std: float, stream: KeyStream) -> Tensor:
    return vector.float()


def _mean_over_tokens(model: Any, batch: Batch) -> Tensor:
    """The mean over all tokens of the batch, as transformers' own loss is: a long record makes the others' gradients small."""
    states, labels, _ = labelled_states(model, batch)
    logits = states @ model.get_output_embeddings().weight.T
    return functional.cross_entropy(logits, labels, reduction="sum") / max(1, len(labels))


def _add_unclipped(
    sums: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter], clip_norm: float, records: int, head_clip_norm: float
) -> None:
    ADD_CLIPPED(sums, parameters, 1e30, records)


def _clip_mean(
    parameters: Mapping[str, nn.Parameter], sums: Mapping[str, Tensor], mechanism: Mechanism, stream: KeyStream, expected: float
) -> None:
    norm = math.sqrt(sum(float(s.square().sum()) for s in sums.values())) / expected
    factor = min(1.0, mechanism.clip_norm / norm) if norm else 1.0
    PUT_GRADIENT(parameters, {name: s * factor for name, s in sums.items()}, mechanism, stream, expected)


ADD_CLIPPED, PUT_GRADIENT = private.add_clipped, private.put_gradient
BUGS: dict[str, dict[str, Callable[..., Any]]] = {  # what takes the place of what in fedsb/training/private.py
    "no_noise": {"add_noise": _no_noise},
    "batch_mean_loss": {"loss_function": lambda kind: _mean_over_tokens},
    "clip_after_mean": {"add_clipped": _add_unclipped, "put_gradient": _clip_mean},
}


@contextlib.contextmanager
def planted(bug: str) -> Iterator[None]:
    """While open, private training has one of `BUGS`."""
    with contextlib.ExitStack() as stack:
        for name, changed in BUGS[bug].items():
            stack.enter_context(mock.patch.object(private, name, changed))
        yield
