"""A Flower Grid inside this process: clients are function calls, made one at a time when their reply is pulled.

The same apps run here, on Flower's Ray runtime and on real sites. Without processes and serialisation a simulated client
costs microseconds, and since replies are handed on one by one, memory does not grow with their number.
"""

import contextlib
import ctypes
import gc
import itertools
from collections.abc import Iterable, Iterator, Sequence

from flwr.app import Context, Error, Message, RecordDict, UserConfig
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from fedsb.errors import BudgetError, FedsbError, LedgerError, PolicyError, SecureSumError

SERVER_NODE = 1
FIRST_NODE = 2
M_TRIM_THRESHOLD, KEPT_BYTES = -1, 1 << 30  # mallopt(3)


class LocalGrid(Grid):
    """Runs a ClientApp for every message. Exceptions of the app are raised, since here its user is the one who can mend them;
    except what a site may decide against, which is an error reply as in Flower, and the run goes on without it.

    Args:
        client_app: the app of every client.
        node_configs: one a client, as a SuperNode's --node-config.
        run_config: as Flower's run config.
    """

    refusals: tuple[type[FedsbError], ...] = (PolicyError, BudgetError, LedgerError, SecureSumError)

    def __init__(self, client_app: ClientApp, node_configs: Sequence[UserConfig], run_config: UserConfig | None = None) -> None:
        self._app = client_app
        self._contexts = {
            node: Context(run_id=0, node_id=node, node_config=dict(config), state=RecordDict(), run_config=dict(run_config or {}))
            for node, config in enumerate(node_configs, FIRST_NODE)
        }
        self._ids = map(str, itertools.count())
        self._pending: dict[str, Message] = {}
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 0, 0, SERVER_NODE

    def set_run(self, run: Run) -> None:
        """There is only one run in a process."""

    @property
    def run(self) -> Run:
        """The run, without id."""
        return Run.create_empty(0)

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """Flower's older way of making a message."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> list[int]:
        """All clients; they are always there."""
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Keep messages until their replies are pulled."""
        ids = []
        for message in messages:
            message_id = next(self._ids)
            message.metadata.__dict__["_message_id"] = message_id
            self._pending[message_id] = message
            ids.append(message_id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterator[Message]:
        """Call the clients one after another, in order of pushing, each when the next reply is asked for."""
        for message_id in message_ids:
            message = self._pending.pop(message_id, None)
            if message is not None:
                yield self._answer(message)

    def _answer(self, message: Message) -> Message:
        """A client's reply. What a site may decide against, and a run goes on without, is an error as Flower would send it;
        any other error of ours is a mistake in the run, and ends it."""
        try:
            return self._app(message, self._contexts[message.metadata.dst_node_id])
        except self.refusals as error:
            reason = f"{type(error)}:<'{error}'>"
            return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason), reply_to=message)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Push, then pull all."""
        return list(self.pull_messages(self.push_messages(messages)))


def node_configs(names: Sequence[str], folder: str) -> list[UserConfig]:
    """Node configurations of simulated clients: a name, a place in the partition, and a folder for what they keep."""
    return [
        {"name": name, "partition-id": index, "num-partitions": len(names), "folder": folder} for index, name in enumerate(names)
    ]


def settle() -> None:
    """Make this process ready for many thousand small messages; called once, when everything is imported.

    What is loaded by now is left out of garbage collection, and up to 1 GiB of freed memory stays with the process
    (glibc), since giving it back and taking it again costs more than a message.
    """
    gc.collect()
    gc.freeze()
    with contextlib.suppress(AttributeError, OSError):  # another C library
        ctypes.CDLL(None).mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)
