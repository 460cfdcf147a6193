"""Records survive the way to the trainer and back, bit for bit; anything else is refused in one sentence."""

import struct

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st

from fedsb.errors import ReplyError
from strategies.envelope import from_bytes, to_bytes
from strategies.records import pack_state, unpack_state

NAMES = st.text(min_size=1, max_size=12)
NUMBERS = st.integers(-(2**60), 2**60) | st.floats(allow_nan=False)


@given(
    st.dictionaries(NAMES, NUMBERS, max_size=4),
    st.dictionaries(NAMES, st.text(max_size=30) | st.booleans() | NUMBERS, max_size=4),
    st.lists(st.binary(max_size=40), max_size=4),
)
def test_records_arrive_as_they_were(metrics: dict[str, float], config: dict[str, str], raw: list[bytes]) -> None:
    arrays = {f"layer/{i}": Array("uint8", (len(data),), "own", data) for i, data in enumerate(raw)}
    content = RecordDict({"m": MetricRecord(metrics), "c": ConfigRecord(config), "a": ArrayRecord(arrays)})  # type: ignore[arg-type]
    there = from_bytes(to_bytes(content))
    assert dict(there["m"]) == metrics and dict(there["c"]) == config
    assert {key: type(value) for key, value in there["m"].items()} == {key: type(value) for key, value in metrics.items()}
    assert {key: vars(array) for key, array in there["a"].items()} == {key: vars(array) for key, array in arrays.items()}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_state_arrives_bit_for_bit(dtype: str) -> None:
    vector = torch.tensor([0.0, -0.0, 1e-45, float("nan"), float("-inf"), 1 / 3])
    record = pack_state(vector, dtype)
    arrived = from_bytes(to_bytes(RecordDict({"arrays": record})))["arrays"]
    assert unpack_state(arrived).numpy().tobytes() == unpack_state(record).numpy().tobytes()


def test_a_loss_that_is_no_number_arrives_too() -> None:
    """It is the server's check that refuses it, with the client's name."""
    there = from_bytes(to_bytes(RecordDict({"m": MetricRecord({"loss": float("nan")})})))
    assert np.isnan(there["m"]["loss"])


WHOLE = to_bytes(RecordDict({"a": ArrayRecord({"x": Array(np.ones(3, dtype=np.float32))})}))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0" * 8,
        b"not a message",
        WHOLE[:-1],
        WHOLE[:20],
        struct.pack("<Q", 2**40) + b"{}",
        WHOLE.replace(b"arrays", b"bundle"),
    ],
    ids=["empty", "zeros", "text", "torn", "torn header", "huge header", "unknown kind"],
)
def test_anything_else_is_refused(data: bytes) -> None:
    with pytest.raises(ReplyError, match="bytes that are no message"):
        from_bytes(data)
