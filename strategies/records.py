"""What travels: the only file that knows the keys of records. Server and clients meet here.

A state travels as one flat array, since Flower handles each array as an object of its own; its layout is proved by a
fingerprint. bf16 goes over the wire as bf16, which Flower's `Array` does not know, so it gets a code of its own.
"""

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from torch import Tensor

from fedsb.basis.frames import Basis, Fold
from fedsb.errors import ReplyError
from fedsb.report.units import one_line

PREPARE, TRAIN, PERSONALISE, EVALUATE = "query.prepare", "train", "train.personalise", "evaluate"
SKETCH = "query.sketch"
ARRAYS, CONFIG, METRICS, IDENTITY, BASIS = "arrays", "config", "metrics", "identity", "basis"
FOLDS = "folds"  # beside a question: what was folded into the weights since the client was last asked
EXAMPLES, LOSS, SECONDS, EXACT_MATCH, WER = "num-examples", "loss", "seconds", "exact-match", "wer"
STATE = "state"
VARIATES = "variates"  # SCAFFOLD's c on the way down, and what a client's own changes by on the way up
SHARED = ("fedsb", "flwr")
KEPT = "kept"  # metric of a client whose policy keeps its personal adapter at home
WHICH = ("base", "global", "personal")  # whose scores there are; a score's metrics are `global-loss`, `global-exact-match`
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ALLOWANCE = 1 << 16  # bytes of a reply beside its state: identity, metrics, keys, encodings
LARGEST_METRIC = 1e9  # no loss, time or share of an honest client comes near it
RAISED = re.compile(r"<class 'fedsb\.errors\.\w+'>:<'(.*)'>", re.DOTALL)  # how Flower reports an error of ours
RAW_BF16 = "fedsb.bf16"  # little-endian bytes of a contiguous bf16 tensor


def to_array(tensor: Tensor, dtype: str) -> Array:
    """A tensor → an Array; fp32 in Flower's own encoding, so that Flower's strategies can read it."""
    if dtype == "fp32":
        return Array(np.ascontiguousarray(tensor.detach().to("cpu", torch.float32).numpy()))
    raw = tensor.detach().to("cpu", torch.bfloat16).contiguous().view(torch.uint8).numpy().tobytes()
    return Array("bfloat16", tuple(tensor.shape), RAW_BF16, raw)


def from_array(array: Array) -> Tensor:
    """An Array → a tensor in the dtype that travelled. Raises ReplyError if it is neither fp32 nor bf16, or torn."""
    try:
        if array.stype == RAW_BF16:
            return torch.frombuffer(bytearray(array.data), dtype=torch.bfloat16).view(array.shape)
        numbers = array.numpy()
    except Exception as error:  # whatever NumPy makes of bytes that somebody else wrote
        raise ReplyError(f"sent an array that cannot be decoded ({error})") from None
    if not isinstance(numbers, np.ndarray) or numbers.dtype != np.float32:
        sent = getattr(numbers, "dtype", type(numbers).__name__)
        raise ReplyError(f"sent an array of {sent} where float32 or bfloat16 was expected")
    return torch.from_numpy(numbers)


def pack_state(vector: Tensor, dtype: str) -> ArrayRecord:
    """A flat state (size,) → its record."""
    return ArrayRecord({STATE: to_array(vector, dtype)})


def unpack_state(record: object, dtype: str = "") -> Tensor:
    """A record → the flat state (size,), fp32. Raises ReplyError if there is none, or if it travelled in another `dtype`."""
    if not isinstance(record, ArrayRecord):
        raise ReplyError(f"sent a {type(record).__name__} where arrays were expected")
    if list(record.keys()) != [STATE]:
        raise ReplyError(f"sent the arrays {sorted(record)[:3]} where ['{STATE}'] was expected")
    vector = from_array(record[STATE])
    if dtype and vector.dtype != DTYPES[dtype]:
        raise ReplyError(f"sent an array of {str(vector.dtype)[6:]} where {str(DTYPES[dtype])[6:]} was asked")
    return vector.to(torch.float32)


def pack_basis(basis: Basis) -> ArrayRecord:
    """B, A and the folds of a basis: what a client receives that cannot rebuild it. Empty if there is nothing."""
    sides = (("B", basis.B), ("A", basis.A))
    names = {torch.bfloat16: "bf16", torch.float32: "fp32"}
    frames = {f"{side}:{name}": to_array(t, names[t.dtype]) for side, part in sides for name, t in part.items()}
    return ArrayRecord({**frames, **pack_folds(basis.folds)})


def unpack_basis(record: ArrayRecord) -> Basis:
    """The inverse of `pack_basis`; without R0, since the server sends the core at the start with the first round."""
    sides: dict[str, dict[str, Tensor]] = {"B": {}, "A": {}}
    for side, _, name, array in ((*key.partition(":"), array) for key, array in record.items()):
        if side in sides:
            sides[side][name] = from_array(array)
    return functools.reduce(Basis.fold, unpack_folds(record), Basis(sides["B"], sides["A"], {}))


def pack_folds(folds: Sequence[Fold]) -> ArrayRecord:
    """Folds, oldest first, as they travel."""
    pairs = [(number, name, pair) for number, fold in enumerate(folds) for name, pair in fold.items()]
    return ArrayRecord(
        {f"{side}{n}:{name}": to_array(t, "fp32") for n, name, pair in pairs for side, t in zip("UV", pair, strict=True)}
    )


def unpack_folds(record: ArrayRecord) -> list[Fold]:
    """The inverse; what else the record holds is passed over."""
    found: dict[int, dict[str, dict[str, Tensor]]] = {}
    for side, _, name, array in ((*key.partition(":"), array) for key, array in record.items()):
        if side[1:].isdecimal():
            found.setdefault(int(side[1:]), {}).setdefault(name, {})[side[0]] = from_array(array)
    return [{name: (pair["U"], pair["V"]) for name, pair in found[number].items()} for number in sorted(found)]


@functools.cache
def shared_versions() -> str:
    """The packages that server and sites must have in the same version, to the second number: `fedsb 0.1, flwr 1.41`."""
    return ", ".join(f"{name} {'.'.join(version(name).split('.')[:2])}" for name in SHARED)


@dataclass(frozen=True)
class Order:
    """What the server asks of a client, beside arrays.

    Attributes:
        run: the whole configuration as JSON; the same text gives the same session at a client.
        round: the server's round; 0 before the first.
        basis: fingerprint of the basis that states in this message belong to.
        which: for `evaluate`: some of `WHICH`, with commas.
        versions: of the server's packages (`shared_versions`).
        before: fingerprint of the basis that the `folds` in this message make `basis`, if there are any.
        members: how many clients are asked to take part in the secure sum that this belongs to; 0: there is none.
        variate: the client's own control variate that training begins with (SCAFFOLD); "": it is zero.
    """

    run: str
    round: int
    basis: str
    which: str = ""
    versions: str = field(default_factory=shared_versions)
    members: int = 0
    before: str = ""
    variate: str = ""

    def record(self) -> ConfigRecord:
        """As it travels."""
        told: dict[str, str | int] = {
            "run": self.run,
            "round": self.round,
            "basis": self.basis,
            "which": self.which,
            "versions": self.versions,
            "members": self.members,
        }
        more = {name: text for name, text in (("before", self.before), ("variate", self.variate)) if text}
        return ConfigRecord({**told, **more})

    @classmethod
    def of(cls, content: RecordDict) -> "Order":
        """Read the order of a message's content. Raises ReplyError if it has none."""
        try:
            config = content[CONFIG]
            run, basis, which, versions = (str(config[key]) for key in ("run", "basis", "which", "versions"))
            number, members = int(config["round"]), int(config["members"])  # type: ignore[arg-type]
            before, variate = (str(config.get(key, "")) for key in ("before", "variate"))
            return cls(run, number, basis, which, versions, members, before, variate)
        except (KeyError, TypeError, ValueError) as error:
            raise ReplyError(
                f"the question lacks {str(error).strip(chr(39))}; use the same version of fedsb everywhere"
            ) from None


def check_versions(asked: str) -> None:
    """Raise ReplyError if the server's versions (`Order.versions`) are others than those here."""
    if asked != shared_versions():
        raise ReplyError(
            f"runs {shared_versions()} where the server runs {one_line(asked, 60)}; install the server's version at the site"
        )


@dataclass(frozen=True)
class Identity:
    """Who answers, and what the answer belongs to."""

    client: str
    round: int
    basis: str
    layout: str
    task: str = ""
    model: str = ""

    def record(self) -> ConfigRecord:
        """As it travels."""
        return ConfigRecord(
            {
                "client": self.client,
                "round": self.round,
                "basis": self.basis,
                "layout": self.layout,
                "task": self.task,
                "model": self.model,
            }
        )

    @classmethod
    def of(cls, message: Message) -> "Identity":
        """Read the identity of a reply. Raises ReplyError if it has none."""
        try:
            config = message.content[IDENTITY]
            return cls(
                str(config["client"]),
                int(config["round"]),  # type: ignore[arg-type]
                str(config["basis"]),
                str(config["layout"]),
                one_line(str(config["task"])),
                str(config.get("model", "")),
            )
        except (KeyError, TypeError, ValueError):
            raise ReplyError("sent a reply that does not say what it answers") from None


def order_message(node: int, kind: str, order: Order, arrays: ArrayRecord | None = None) -> Message:
    """A message from the server to one node."""
    content = RecordDict({CONFIG: order.record()})
    if arrays is not None:
        content[BASIS if kind == PREPARE else ARRAYS] = arrays
    return Message(content, node, kind, group_id=str(order.round))


def reply_content(
    identity: Identity,
    metrics: Mapping[str, int | float] | None = None,
    state: ArrayRecord | None = None,
) -> RecordDict:
    """What a client replies."""
    content = RecordDict({IDENTITY: identity.record()})
    if metrics is not None:
        content[METRICS] = MetricRecord(dict(metrics))
    if state is not None:
        content[ARRAYS] = state
    return content


def metric(message: Message, key: str) -> float:
    """One number of a reply. Raises ReplyError if it is missing or no number from 0 to `LARGEST_METRIC`."""
    try:
        value = message.content[METRICS][key]
    except KeyError:
        raise ReplyError(f"left out the metric {key}") from None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= LARGEST_METRIC:
        raise ReplyError(f"sent {value!r} as metric {key}")
    return value


def reason_of(error: Error) -> str:
    """Why a client failed: of an error of ours its sentence, of any other what Flower says."""
    raised = RAISED.fullmatch(error.reason or "")
    return raised[1] if raised else str(error.reason)


def bytes_of(message: Message) -> int:
    """Bytes of a message's records: array data, keys, and values (each number counts 8)."""
    if not message.has_content():
        return 0
    return sum(len(key) + _size(value) for record in message.content.values() for key, value in record.items())


def size_of(message: Message) -> int:
    """`bytes_of` and all else that a sender chooses: names of records, and what each array says of itself."""
    if not message.has_content():
        return 0
    arrays = [a for record in message.content.values() if isinstance(record, ArrayRecord) for a in record.values()]
    labels = sum(len(array.dtype) + len(array.stype) + 8 * len(array.shape) for array in arrays)
    return bytes_of(message) + sum(map(len, message.content)) + labels


def largest_reply(size: int, dtype: str) -> int:
    """Most bytes (`size_of`) of a reply with a state of `size` numbers; 0 numbers: a reply without one."""
    return size * DTYPES[dtype].itemsize + ALLOWANCE


def _size(value: object) -> int:
    if isinstance(value, Array):
        return len(value.data)
    if isinstance(value, list):
        return sum(map(_size, value))
    return len(value.encode()) if isinstance(value, str) else len(value) if isinstance(value, bytes) else 8
