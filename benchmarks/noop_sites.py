"""Sites without a process each: threads that do what a SuperNode does, with Flower's own code for its side of the connection.

A site polls, sends heartbeats, fetches the app once and every message in objects, confirms, and pushes its reply. It runs no
ClientApp: it answers at once, with an array as large as the one it got.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httpx
import numpy as np
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import Array, ArrayRecord, Message, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree, iterate_object_tree
from flwr.supercore.inflatable.inflatable_utils import ObjectPullError, ObjectPushError, pull_objects, push_objects
from flwr.supercore.run import RunNotRunningException
from flwr.supernode.fleet_http_connection import http_request_response

from benchmarks.harness import say

POLL_SECONDS = 3.0  # a SuperNode's, which is not configurable
IN_FLIGHT = 24  # messages that this process has in memory at a time


@dataclass
class Site:
    """Context: a no-op site in a thread of its own.

    Attributes:
        address: where its server is.
        authority: the certificate that it knows the server by.
        admit: called with its public key before it joins.
        pause: seconds between two polls that brought nothing.
        polls: seconds that each poll took that brought nothing.
        failed: messages and polls given up since the SuperLink refused a request, as a SuperNode gives them up.
    """

    address: str
    authority: bytes
    admit: Callable[[ec.EllipticCurvePublicKey], None]
    pause: float = POLL_SECONDS
    polls: list[float] = field(default_factory=list)
    failed: int = 0
    _joined: threading.Event = field(default_factory=threading.Event)
    _stop: threading.Event = field(default_factory=threading.Event)
    _room = threading.Semaphore(IN_FLIGHT)  # one for all sites

    def __enter__(self) -> "Site":
        self._key = ec.generate_private_key(ec.SECP384R1())
        self.admit(self._key.public_key())
        self._thread = threading.Thread(target=self._live, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._thread.join()

    def stop(self) -> None:
        """Let it leave as soon as it has answered what it is answering."""
        self._stop.set()

    def wait(self, seconds: float) -> None:
        """Until it has joined. Raises TimeoutError."""
        if not self._joined.wait(seconds):
            raise TimeoutError("a site could not join the SuperLink")

    def _live(self) -> None:
        keys = (self._key, self._key.public_key())
        with http_request_response(self.address, False, self.authority, keys) as connection:
            _, receive, *answering = connection
            known: set[int] = set()
            self._joined.set()
            while not self._stop.is_set():
                started = time.perf_counter()
                try:
                    received = receive()
                    if received is None:
                        self.polls.append(time.perf_counter() - started)
                        self._stop.wait(self.pause)
                        continue
                    with self._room:
                        _answer(*received, known, *answering)
                except (httpx.HTTPError, ObjectPullError, ObjectPushError, RunNotRunningException) as error:
                    self.failed += 1
                    say(f"{type(error).__name__}: {error}")


def _answer(message: Message, tree: Any, known: set[int], send: Any, get_run: Any, get_fab: Any, *objects: Any) -> None:
    """One message: fetched, confirmed, and answered with an array of its size that no other site sends."""
    pull, push, confirm = objects
    metadata = message.metadata
    if metadata.run_id not in known:
        get_fab(get_run(metadata.run_id).fab_hash, metadata.run_id)
        known.add(metadata.run_id)
    fetched = pull_objects([each.object_id for each in iterate_object_tree(tree)], lambda name: pull(metadata.run_id, name))
    confirm(metadata.run_id, metadata.message_id)
    numbers = np.zeros(max(map(len, fetched.values())) // 4, np.float32)
    numbers[:5] = [*((metadata.dst_node_id >> shift) & 0xFFFF for shift in (0, 16, 32, 48)), int(metadata.group_id)]
    reply = Message(RecordDict({"arrays": ArrayRecord({"state": Array(numbers)})}), reply_to=message)
    reply.metadata.__dict__["_message_id"] = reply.object_id
    wanted, session = send(reply, get_object_tree(reply), 0.0)
    nested = get_all_nested_objects(reply)
    push_objects(nested, lambda name, data: push(metadata.run_id, session, name, data), object_ids_to_push=wanted)
