"""What travels: round trips, refusals, and bytes counted."""

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st

from fedsb.errors import ReplyError
from server.local_grid import LocalGrid
from strategies.records import (
    METRICS,
    RAW_BF16,
    Identity,
    Order,
    bytes_of,
    check_versions,
    from_array,
    metric,
    order_message,
    pack_state,
    reason_of,
    reply_content,
    shared_versions,
    to_array,
    unpack_state,
)
from tests.federation.echo import app

GRID = LocalGrid(app, [{}])  # Flower makes messages only where somebody has said who sends them
SPECIAL = [0.0, -0.0, 1e-45, -1e-40, 3.4028235e38, float("inf"), float("-inf"), float("nan"), 1 / 3]


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def test_another_version_is_told_where_it_can_be_mended() -> None:
    check_versions(Order("{}", 0, "b").versions)
    with pytest.raises(ReplyError, match="runs fedsb 0.1, flwr 1.4.* where the server runs fedsb 7.3, .*; install the"):
        check_versions("fedsb 7.3, flwr 1.41")


def test_an_error_of_ours_is_its_sentence_and_any_other_keeps_its_kind() -> None:
    """As flwr.supernode.runtime.run_clientapp words them."""
    for error in (ReplyError("a 'b'\nc"), KeyError("x"), ReplyError("")):
        said = f"{type(error)!s}:<'{error}'>"
        assert reason_of(Error(2, said)) == (str(error) if isinstance(error, ReplyError) else said)
    assert reason_of(Error(8, "ClientApp stopped responding")) == "ClientApp stopped responding"


@given(st.lists(st.floats(width=32), min_size=1, max_size=20))
def test_fp32_arrives_bit_for_bit(numbers: list[float]) -> None:
    vector = torch.tensor(numbers + SPECIAL, dtype=torch.float32)
    assert _same_bits(unpack_state(pack_state(vector, "fp32")), vector)


@given(st.lists(st.floats(width=32), min_size=1, max_size=20))
def test_bf16_arrives_bit_for_bit_in_two_bytes(numbers: list[float]) -> None:
    vector = torch.tensor(numbers + SPECIAL, dtype=torch.float32).to(torch.bfloat16)
    array = to_array(vector, "bf16")
    assert (array.dtype, array.stype, array.shape) == ("bfloat16", RAW_BF16, tuple(vector.shape))
    assert len(array.data) == 2 * len(vector)
    assert _same_bits(from_array(array), vector)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_shapes_and_strides_survive(dtype: str) -> None:
    matrix = torch.arange(12.0).view(3, 4).T
    assert torch.equal(from_array(to_array(matrix, dtype)).float(), matrix)


def test_what_arrives_may_be_changed_without_changing_what_was_sent() -> None:
    vector = torch.zeros(3)
    for dtype in ("fp32", "bf16"):
        record = pack_state(vector, dtype)
        unpack_state(record).add_(1)
        from_array(record["state"]).add_(1)
        assert not unpack_state(record).any()


def test_fp32_is_in_flowers_own_encoding() -> None:
    np.testing.assert_array_equal(to_array(torch.tensor([1.0, 2.0]), "fp32").numpy(), np.array([1, 2], dtype=np.float32))


@pytest.mark.parametrize("dtype", [np.float64, np.float16, np.int32, np.uint8, np.complex64, np.bool_])
def test_a_foreign_dtype_is_refused(dtype: type) -> None:
    with pytest.raises(ReplyError, match=f"an array of {np.dtype(dtype)} where float32 or bfloat16"):
        from_array(Array(np.zeros(3, dtype=dtype)))


def test_bytes_are_counted_by_hand() -> None:
    state = pack_state(torch.zeros(5), "bf16")
    order = Order("{}", 3, "ab" * 32, "global")
    message = order_message(2, "evaluate", order, state)
    told = len("run") + len("{}") + len("round") + 8 + len("basis") + 64 + len("which") + len("global")
    told += len("versions") + len(shared_versions()) + len("members") + 8
    assert bytes_of(message) == told + len("state") + 10
    content = reply_content(Identity("ä", 3, "b", "l", "t"), {"loss": 1.5, "num-examples": 2})
    reply = Message(content, reply_to=message)
    named = len("client") + 2 + len("round") + 8 + len("basis") + 1 + len("layout") + 1 + len("task") + 1 + len("model")
    assert bytes_of(reply) == named + len("loss") + 8 + len("num-examples") + 8
    listed = Message(RecordDict({"x": ConfigRecord({"a": [1, 2, 3], "b": ["xy", "z"], "c": b"12345"})}), 2, "train")
    assert bytes_of(listed) == 1 + 24 + 1 + 3 + 1 + 5


def test_orders_and_identities_arrive() -> None:
    order, identity = Order("{}", 3, "b", "personal"), Identity("client-1", 3, "b", "l", "words")
    message = order_message(2, "train", order)
    assert Order.of(message.content) == order and message.metadata.group_id == "3"
    assert Identity.of(Message(reply_content(identity), reply_to=message)) == identity


@pytest.mark.parametrize("value", [float("nan"), float("inf"), [1.0, 2.0], "3", None, True])
def test_a_metric_is_one_finite_number(value: object) -> None:
    message = Message(RecordDict(), 2, "train")
    if value is not None:
        message.content[METRICS] = ConfigRecord({"loss": value})  # type: ignore[dict-item]
    with pytest.raises(ReplyError, match="loss"):
        metric(message, "loss")
    message.content[METRICS] = MetricRecord({"loss": 2})
    assert metric(message, "loss") == 2


def test_arrays_of_another_record_are_refused() -> None:
    with pytest.raises(ReplyError, match="sent a ConfigRecord where arrays were expected"):
        unpack_state(ConfigRecord())
    with pytest.raises(ReplyError, match=r"\['other'\]"):
        unpack_state(ArrayRecord({"other": to_array(torch.zeros(1), "fp32")}))
