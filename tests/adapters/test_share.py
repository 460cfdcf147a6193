"""Shares: which numbers of a state travel, as leading blocks of its tensors."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedsb.abilities import RANKED
from fedsb.adapters.methods import METHODS
from fedsb.adapters.share import heads_of, share_of
from fedsb.adapters.state import Layout
from fedsb.errors import AdapterError

CORES = Layout((("a.core", (5, 5)), ("b.core", (5, 5)), ("head.classifier.weight", (3, 4))))
TURNS = Layout((("a.heads", (4, 3, 3)), ("b.heads", (4, 3, 3)), ("head.classifier.weight", (3, 4))))
FACTORS = Layout((("a.A", (5, 7)), ("a.B", (6, 5)), ("head.classifier.bias", (3,))))


def test_a_client_of_full_rank_has_all_of_it() -> None:
    share = share_of(CORES, "nested-sb", 5)
    vector = torch.randn(CORES.size)
    assert share.index is None and share.layout.fingerprint == CORES.fingerprint
    assert share.take(vector) is vector and share.put(vector, torch.zeros(CORES.size)) is vector


@given(rank=st.integers(1, 5))
def test_it_is_the_leading_blocks_and_the_head(rank: int) -> None:
    share, vector = share_of(CORES, "nested-sb", rank), torch.randn(CORES.size)
    state, mine = CORES.unflatten(vector), share.layout.unflatten(share.take(vector))
    assert share.layout.size == 2 * rank**2 + 12
    for name in ("a.core", "b.core"):
        assert torch.equal(mine[name], state[name][:rank, :rank])
    assert torch.equal(mine["head.classifier.weight"], state["head.classifier.weight"])


@given(rank=st.integers(1, 5))
def test_what_is_put_back_is_where_it_was(rank: int) -> None:
    share, vector, other = share_of(CORES, "nested-sb", rank), torch.randn(CORES.size), torch.randn(CORES.size)
    both = CORES.unflatten(share.put(share.take(vector), other))
    for name in ("a.core", "b.core"):
        expected = CORES.unflatten(other)[name].clone()
        expected[:rank, :rank] = CORES.unflatten(vector)[name][:rank, :rank]
        assert torch.equal(both[name], expected)
    assert torch.equal(share.put(share.take(vector), vector), vector)


def test_what_a_client_keeps_is_left_out_unless_it_publishes() -> None:
    travels, published = (share_of(FACTORS, "fedsa-lora", 5, kept=kept) for kept in (False, True))
    assert [name for name, _ in travels.layout.shapes] == ["a.A"]
    assert published.index is None
    assert share_of(travels.layout, "fedsa-lora", 5).index is None, "what the server keeps is all that travels"


@pytest.mark.parametrize("method", sorted({name for name, method in METHODS.items() if method.nested} | set(RANKED)))
def test_ranks_are_cut_where_a_method_has_them(method: str) -> None:
    says = METHODS[method]
    for part, letters in says.parts.items():
        shape = tuple({"r": 5, "in": 7, "out": 6}[letter] for letter in letters)
        assert says.cut(part, shape, 2) == tuple({"r": 2, "in": 7, "out": 6}[letter] for letter in letters)
        assert says.fits(part, says.cut(part, shape, 2), 2)
    assert says.cut("weight", (3, 4), 2) == (3, 4)


def test_a_share_of_another_size_is_refused() -> None:
    share = share_of(CORES, "nested-sb", 2)
    for size in (share.layout.size - 1, CORES.size):
        with pytest.raises(AdapterError, match=rf"a state of 20 numbers was expected and \({size},\) came"):
            share.put(torch.zeros(size), torch.zeros(CORES.size))


@given(first=st.integers(0, 3), more=st.integers(0, 3))
def test_heads_in_turn_are_those_alone_and_what_is_in_none(first: int, more: int) -> None:
    last = min(first + more, 3)
    share, vector, other = heads_of(TURNS, "refreshed-sb", first, last), torch.randn(TURNS.size), torch.randn(TURNS.size)
    state, mine = TURNS.unflatten(vector), share.layout.unflatten(share.take(vector))
    both, kept = TURNS.unflatten(share.put(share.take(vector), other)), TURNS.unflatten(other)
    for name in ("a.heads", "b.heads"):
        assert torch.equal(mine[name], state[name][first : last + 1])
        expected = kept[name].clone()
        expected[first : last + 1] = state[name][first : last + 1]
        assert torch.equal(both[name], expected)
    assert torch.equal(both["head.classifier.weight"], state["head.classifier.weight"])
    assert (share.index is None) == (first == 0 and last == 3)
