"""Attention of sequences that lie one after another in one row, each to its own keys and values alone.

transformers' continuous batching gives SDPA all queries of a step and all keys of all requests, with a mask that leaves of each
product what belongs to one request: r requests take r² of the work of one. On a CPU this does only the r.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

BY_SEQUENCE = "fedsb_by_sequence"  # as transformers' attn_implementation


@dataclass(frozen=True)
class Prefill:
    """A sequence with several new tokens. mask: (queries, keys), causal; None: the tokens are all there are."""

    queries: slice
    keys: slice
    mask: Tensor | None


@dataclass(frozen=True)
class Singles:
    """Sequences with one new token each that go through together, so of keys of about the same number.

    Attributes:
        queries: (d,) their tokens.
        theirs: (d, longest) their keys; beyond a sequence's own any.
        own: (d, 1, 1, longest) which of those are its own.
    """

    queries: Tensor
    theirs: Tensor
    own: Tensor

    @classmethod
    def of(cls, queries: Sequence[int], first_keys: Sequence[int], keys: Sequence[int]) -> "Singles":
        """From each sequence's token, its first key, and how many it has."""
        lengths = torch.tensor(keys, dtype=torch.int64)
        steps = torch.arange(max(keys))
        inside = steps < lengths[:, None]
        theirs = torch.tensor(first_keys, dtype=torch.int64)[:, None] + steps.where(inside, 0)
        return cls(torch.tensor(queries, dtype=torch.int64), theirs, inside[:, None, None])


@dataclass(frozen=True)
class Plan:
    """Which queries of a step look at which keys: those of sequences with one new token, and the other sequences."""

    singles: tuple[Singles, ...]
    prefills: tuple[Prefill, ...]
    _read: list[tuple[Tensor, Tensor]] = field(default_factory=list, repr=False)

    def read(self, index: Tensor) -> Tensor:
        """Where the keys of all `singles` lie in a cache, one after another; index: where all keys of the step do. Made once a
        step."""
        if not self._read or self._read[0][0] is not index:
            theirs = [each.theirs.flatten() for each in self.singles]
            self._read[:] = [(index, index[theirs[0] if len(theirs) == 1 else torch.cat(theirs)])]
        return self._read[0][1]

    @classmethod
    def of(cls, queries: Sequence[int], keys: Sequence[int]) -> "Plan":
        """From the lengths of the sequences: new tokens, and those with all before them."""
        first_query, first_key = ([0, *accumulate(lengths)] for lengths in (queries, keys))
        one = [i for i, length in enumerate(queries) if length == 1]
        singles = [
            Singles.of([first_query[i] for i in some], [first_key[i] for i in some], [keys[i] for i in some])
            for some in _alike(one, keys)
        ]
        prefills = []
        for i, length in enumerate(queries):
            if length > 1:
                mask = None if length == keys[i] else torch.ones(length, keys[i], dtype=torch.bool).tril(keys[i] - length)
                prefills.append(Prefill(slice(first_query[i], first_query[i + 1]), slice(first_key[i], first_key[i + 1]), mask))
        return cls(tuple(singles), tuple(prefills))


def _alike(sequences: Sequence[int], keys: Sequence[int]) -> list[list[int]]:
    """Sequences as they go through together. Each is padded to the longest beside it: all of them, if that at most doubles the
    keys, else those that have at least half as many as the longest, and so on, so that one long context slows nobody else."""
    if len(sequences) * max((keys[i] for i in sequences), default=0) <= 2 * sum(keys[i] for i in sequences):
        return [list(sequences)] if sequences else []
    found: list[list[int]] = []
    for i in sorted(sequences, key=lambda i: -keys[i]):
        if found and 2 * keys[i] >= keys[found[-1][0]]:
            found[-1].append(i)
        else:
            found.append([i])
    return found


def attend(query: Tensor, key: Tensor, value: Tensor, plan: Plan, scale: float | None) -> Tensor:
    """query (1, h, T, d), key and value (1, g, S, d) of the sequences one after another, h a multiple of g → (1, T, h, d)."""
    _, h, t, d = query.shape
    repeats = h // key.shape[1]
    rows, ks, vs = (side[0].transpose(0, 1) for side in (query, key, value))  # (T or S, heads, d)
    found = query.new_empty(t, h, d)
    for some in plan.singles:
        found[some.queries] = _single(rows[some.queries], ks[some.theirs], vs[some.theirs], some.own, scale)
    for each in plan.prefills:
        q = query[:, :, each.queries]
        k, v = (side[:, :, each.keys].repeat_interleave(repeats, 1) for side in (key, value))
        seen = scaled_dot_product_attention(q, k, v, each.mask, is_causal=each.mask is None, scale=scale)
        found[each.queries] = seen[0].transpose(0, 1)
    return found[None]


def _single(q: Tensor, k: Tensor, v: Tensor, own: Tensor, scale: float | None) -> Tensor:
    """One query for each sequence: q (n, h, d), k and v (n, longest, g, d), own (n, 1, 1, longest) → (n, h, d)."""
    n, _, g, d = k.shape
    k, v = k.transpose(1, 2), v.transpose(1, 2)
    return scaled_dot_product_attention(q.reshape(n, g, -1, d), k, v, own, scale=scale).reshape(n, -1, d)


def by_sequence(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *, cache: Any, **told: Any
) -> tuple[Tensor, None]:
    """As transformers' `sdpa_attention_forward`, of a cache whose attribute `plan` is that of the step."""
    plan: Plan = cache.plan
    index, scale = told["read_index"][0], told.get("scaling")
    together = not plan.prefills and len(index) > 0  # then the cache can be read as `_single` takes it
    if together:
        told["read_index"] = [plan.read(index)]
    key, value = cache.update(key_states=key, value_states=value, layer_idx=module.layer_idx, kwargs=told)
    if not together:
        return attend(query, key, value, plan, scale), None
    rows = query[0].transpose(0, 1)
    sizes = [some.theirs.numel() for some in plan.singles]
    found = torch.empty_like(rows)
    for some, k, v in zip(plan.singles, *(side[0].transpose(0, 1).split(sizes) for side in (key, value)), strict=True):
        k, v = (side.unflatten(0, some.theirs.shape) for side in (k, v))
        if len(sizes) == 1:  # all of them, in order
            return _single(rows, k, v, some.own, scale)[None], None
        found[some.queries] = _single(rows[some.queries], k, v, some.own, scale)
    return found[None], None


AttentionInterface.register(BY_SEQUENCE, by_sequence)
