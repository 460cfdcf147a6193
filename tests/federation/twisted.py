"""A federation in this process in which what a client replies goes through other hands first."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Error, Message, RecordDict

from clients import session
from fedsb.config import RunConfig
from fedsb.store.files import read_events
from server.local_grid import LocalGrid
from strategies.records import TRAIN
from tests.federation.tiny import federate, local_grid

Twist = Callable[[str, int, Message], Iterable[Message]]


class Twisted(LocalGrid):
    """A LocalGrid whose replies go through `twist(kind, client's number, reply)`; it keeps who was asked what."""

    twist: Twist
    asked: list[tuple[str, int]]

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        outgoing = list(messages)
        self.asked += [(message.metadata.message_type, message.metadata.dst_node_id - 2) for message in outgoing]
        return super().push_messages(outgoing)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterator[Message]:
        for reply in super().pull_messages(message_ids):
            yield from self.twist(reply.metadata.message_type, reply.metadata.src_node_id - 2, reply)


def twisted(config: RunConfig, out: Path, twist: Twist) -> Twisted:
    """The grid of a run, twisted."""
    grid = local_grid(config, out)
    grid.__class__ = Twisted
    grid.twist, grid.asked = twist, []  # type: ignore[attr-defined]
    return grid  # type: ignore[return-value]


def failure(reply: Message, reason: str = "gone") -> Message:
    """An error in place of a reply."""
    question = Message(RecordDict(), reply.metadata.src_node_id, reply.metadata.message_type)
    question.metadata.__dict__["_message_id"] = reply.metadata.reply_to_message_id
    return Message(Error(2, reason), reply_to=question)


class Killed(BaseException):
    """Stands for kill -9."""


def killed(run: RunConfig, folder: Path, rounds: int, replies: int = 1) -> None:
    """A run that is killed after so many finished rounds and so many replies more."""

    def die(kind: str, client: int, reply: Message) -> list[Message]:
        told = [event["event"] for event in read_events(folder / "events.jsonl")]
        if kind == TRAIN and told.count("round") == rounds and told[::-1].index("round") > replies:
            raise Killed
        return [reply]

    session.open_session.cache_clear()
    with pytest.raises(Killed):
        federate(run, folder, grid=twisted(run, folder, die))


def killed_and_resumed(run: RunConfig, folder: Path, rounds: int, replies: int = 1) -> dict[str, Any]:
    """The same, resumed by another process, so to speak; returns summary.json."""
    killed(run, folder, rounds, replies)
    session.open_session.cache_clear()
    return federate(run, folder, resume=True)
