"""Tensors read from bytes: what safetensors itself reads, whether or not such a file was read before."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from fedsb.errors import StoreError
from fedsb.store import tensors
from fedsb.store.tensors import tensors_of

HERE = Path("some.safetensors")
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.int64])
SHAPES = st.lists(st.integers(0, 3), max_size=3)


@settings(max_examples=200, deadline=None)
@given(named=st.dictionaries(st.text(min_size=1, max_size=5), st.tuples(SHAPES, DTYPES), max_size=5), seed=st.integers(0, 99))
def test_as_safetensors_reads_them(named: dict[str, tuple[list[int], torch.dtype]], seed: int) -> None:
    """Any names, shapes and dtypes: also none, empty ones and scalars. The second file is like the first, with other numbers."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(2):
        state = {
            name: (8 * torch.rand(shape, generator=generator)).to(dtype)
            for name, (shape, dtype) in named.items()
            if name != "__metadata__"
        }
        data = save(state)
        found, wanted = tensors_of(data, HERE), load(data)
        assert list(found) == sorted(wanted)
        for name, tensor in wanted.items():
            assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)


def test_it_is_a_copy() -> None:
    """Changing what was read changes no other reading."""
    data = save({"a": torch.ones(2), "b": torch.zeros(2)})
    tensors_of(data, HERE)["a"].zero_()
    assert tensors_of(data, HERE)["a"].tolist() == [1, 1]


@pytest.mark.parametrize("lost", [1, 4, 8])
def test_a_torn_file_whose_like_was_read_is_refused(lost: int) -> None:
    data = save({"a": torch.ones(4)})
    tensors_of(data, HERE)
    for torn in (data[:-lost], data + bytes(lost), data[:-16]):
        with pytest.raises(StoreError, match="no whole safetensors file"):
            tensors_of(torn, HERE)


def test_a_header_that_says_something_twice_is_read_as_safetensors_reads_it() -> None:
    """Two parsers must not see two files in one."""
    one = '"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'
    for twice in (one + "," + one.replace("[2]", "[1]").replace("8]", "4]"), one.replace('"a"', '"b"') + "," + one):
        head = ("{" + twice + "}").encode()
        head += b" " * (-len(head) % 8)
        data = len(head).to_bytes(8, "little") + head + torch.tensor([1.0, 2.0]).numpy().tobytes()
        try:
            wanted = load(data)
        except Exception:
            with pytest.raises(StoreError):
                tensors_of(data, HERE)
            continue
        found = tensors_of(data, HERE)
        assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_a_large_file_is_not_kept_at_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its header, and as many bytes again, would be."""
    data = save({"a": torch.ones(64)})
    monkeypatch.setattr(tensors, "SMALL", len(data) - 1)
    tensors._layout.cache_clear()
    assert tensors_of(data, HERE)["a"].sum() == 64 and tensors._layout.cache_info().misses == 0
