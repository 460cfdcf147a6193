"""A message's records as one safetensors file and back: how a ClientApp hands them to the site's trainer. Needs no torch.

Arrays keep the bytes in which they travelled; everything else is JSON in the file's header. No pickle.
"""

import json
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from safetensors import SafetensorError
from safetensors.numpy import load, save

from fedsb.errors import ReplyError

HEADER = "records"
KINDS: dict[str, type[ConfigRecord] | type[MetricRecord]] = {"config": ConfigRecord, "metrics": MetricRecord}


def to_bytes(content: RecordDict) -> bytes:
    """Records → one safetensors file."""
    tensors: dict[str, np.ndarray[Any, Any]] = {}
    header: dict[str, Any] = {}
    for name, record in content.items():
        if isinstance(record, ArrayRecord):
            header[name] = {"arrays": {key: [array.dtype, list(array.shape), array.stype] for key, array in record.items()}}
            tensors |= {f"{name}/{key}": np.frombuffer(array.data, dtype=np.uint8) for key, array in record.items()}
        else:
            kind = "config" if isinstance(record, ConfigRecord) else "metrics"
            header[name] = {kind: dict(record.items())}
    return save(tensors, {HEADER: json.dumps(header)})


def from_bytes(data: bytes) -> RecordDict:
    """The inverse. Raises ReplyError for bytes that are no such file."""
    try:
        length = int.from_bytes(data[:8], "little")
        header = json.loads(json.loads(data[8 : 8 + length])["__metadata__"][HEADER])
        tensors = load(data)
        content = RecordDict()
        for name, entry in header.items():
            ((kind, record),) = entry.items()
            if kind == "arrays":
                content[name] = ArrayRecord(
                    {
                        key: Array(dtype, tuple(shape), stype, tensors[f"{name}/{key}"].tobytes())
                        for key, (dtype, shape, stype) in record.items()
                    }
                )
            else:
                content[name] = KINDS[kind](record)
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ReplyError(f"sent bytes that are no message ({type(error).__name__}: {error})") from None
    return content
