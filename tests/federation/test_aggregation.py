"""What the strategy makes of replies, against dense means formed one client at a time."""

import pytest
import torch
from flwr.app import Array, ArrayRecord

from strategies.records import EXAMPLES, RAW_BF16, unpack_state
from tests.federation.bench import BASIS, LAYOUT, Desk, vectors
from tests.reference import mean_update, relative_distance


@pytest.mark.parametrize("weighting", ["examples", "uniform"])
def test_the_aggregate_is_the_naive_mean_of_the_dense_updates(weighting: str) -> None:
    desk, sizes, sent = Desk(5, weighting=weighting), [1, 7, 300, 12345, 50], vectors(5)
    replies = [desk.reply(q, v, {EXAMPLES: n}) for q, v, n in zip(desk.questions(), sent, sizes, strict=True)]
    arrays, metrics = desk.aggregate(replies)
    assert arrays is not None and metrics is not None
    state = LAYOUT.unflatten(unpack_state(arrays))
    weights = [float(n) for n in sizes] if weighting == "examples" else [1.0] * 5
    naive = mean_update(BASIS, [LAYOUT.unflatten(vector) for vector in sent], weights)
    ours = {name: b.double() @ state[f"{name}.core"].double() @ BASIS.A[name].double() for name, b in BASIS.B.items()}
    assert relative_distance(naive, ours) < 1e-7
    heads = torch.stack([v.double()[-3:] * w for v, w in zip(sent, weights, strict=True)]).sum(0) / sum(weights)
    torch.testing.assert_close(state["head.classifier.bias"].double(), heads, rtol=1e-7, atol=0)
    assert metrics["clients"] == 5 and metrics["loss"] == pytest.approx(1.5)
    error = metrics["aggregation-error"]
    assert isinstance(error, float) and error == pytest.approx(relative_distance(naive, ours), rel=1.0, abs=1e-9)


def test_the_aggregate_does_not_depend_on_the_order_of_arrival() -> None:
    desk, sent = Desk(4), vectors(4)
    replies = [desk.reply(q, v, {EXAMPLES: n}) for q, v, n in zip(desk.questions(), sent, (3, 5, 8, 13), strict=True)]
    there, _ = desk.aggregate(replies)
    back, _ = desk.aggregate(reversed(replies))
    assert there is not None and back is not None
    assert torch.equal(unpack_state(there), unpack_state(back))


def test_a_round_starts_from_nothing() -> None:
    """A list of old updates that is never cleared would average them in."""
    desk, (old, new) = Desk(1), vectors(2)
    for number, vector in ((1, old), (2, new)):
        arrays, metrics = desk.aggregate([desk.reply(q, vector) for q in desk.questions(number)], number)
    assert arrays is not None and metrics is not None
    assert torch.equal(unpack_state(arrays), new)
    assert metrics["aggregation-error"] < 1e-7  # type: ignore[operator]


def test_bf16_replies_are_averaged_in_full_precision() -> None:
    desk, sent = Desk(3, wire_dtype="bf16"), vectors(3)
    replies = []
    for question, vector in zip(desk.questions(), sent, strict=True):
        raw = vector.to(torch.bfloat16).view(torch.uint8).numpy().tobytes()
        array = Array("bfloat16", (LAYOUT.size,), RAW_BF16, raw)
        replies.append(desk.reply(question, ArrayRecord({"state": array})))
    arrays, _ = desk.aggregate(replies)
    assert arrays is not None
    mean = torch.stack([vector.to(torch.bfloat16).double() for vector in sent]).mean(0)
    assert torch.equal(unpack_state(arrays).bfloat16(), mean.float().bfloat16())  # rounded once, on its way out
