"""A secure sum: what does it add to the bytes and to the processor time of a client? Flower's SecAgg+ beside it.

    python -m benchmarks.secure_sum

50 clients sum vectors of 860,160 numbers (SmolLM2, rank 64) in this process, with nobody lost and a threshold of two thirds.

`extra_bytes`: all bytes of a client in a round of the secure sum, both ways, over those of its update in fp32, less 1. What
both ways of summing send alike, the model to the clients, is not in it.
`client_seconds`: processor seconds of one client for all its stages, encoding included; the median of the clients.
`server_seconds`: the same of the server for the whole round; `server_seconds_lost` with a fifth of the clients lost after they
have shared, which is the costliest time to lose them. The peer has none.
`mean_error`: how far the decoded mean is from the exact one, over what `FixedPoint` promises (at most 1), for the bound 1.

The peer is Flower's SecAgg+ as its legacy workflow runs it: its client mod (`secaggplus_mod`) with the workflow's defaults for
clipping, quantisation and modulus, all clients as neighbours, and the same threshold; messages are made here and handed over
without a network. Its processor time includes that the mod keeps its state in records between stages, as it does; ours keeps
an object. All its clients do the first two stages, `--peer-clients` of them the others. Bytes are those of records (each number
counts 8), both ways. They do not promise the same: Flower expands every mask by NumPy's Mersenne twister from 32 bits of its
key, which is no cryptographic generator; here all of a 256-bit key counts, by AES in counter mode.
"""

import argparse
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import numpy as np
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.client.mod import secaggplus_mod
from flwr.common import Code, FitRes, Status, ndarrays_to_parameters
from flwr.common.secure_aggregation.secaggplus_constants import RECORD_KEY_CONFIGS, Key, Stage
from flwr.compat.common.recorddict_compat import fitres_to_recorddict
from flwr.supercore.task_identity import TaskIdentity

from benchmarks.harness import figure, median, report, say
from fedsb.privacy.fixed_point import FixedPoint, Reals
from fedsb.privacy.member import Member
from fedsb.privacy.roster import Context as SumContext
from fedsb.privacy.roster import two_thirds
from fedsb.privacy.secure_sum import SecureSum
from strategies.records import bytes_of

SMOLLM2_RANK_64 = 210 * 64 * 64  # 30 layers of seven linears
BOUND = 1.0
FLOWERS_DEFAULTS: dict[str, Any] = {  # of SecAggPlusWorkflow
    Key.CLIPPING_RANGE: 8.0,
    Key.TARGET_RANGE: 1 << 22,
    Key.MOD_RANGE: 1 << 32,
    Key.MAX_WEIGHT: 1000.0,
}
T = TypeVar("T")
Costs = dict[str, list[float]]  # stage → processor seconds of each client


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=50, help="clients of the round")
    parser.add_argument("--size", type=int, default=SMOLLM2_RANK_64, help="numbers in an update")
    parser.add_argument("--peer-clients", type=int, default=5, help="clients of Flower's whose later stages are measured")
    options = parser.parse_args(arguments)
    logging.getLogger("flwr").setLevel(logging.ERROR)
    draw = np.random.default_rng(0)
    vectors = [draw.uniform(-BOUND, BOUND, options.size).astype(np.float32) for _ in range(options.clients)]
    ours = OurRound(vectors, lost=0)
    say(f"ours:   {ours.told()}")
    fifth = OurRound(vectors, lost=options.clients // 5)
    say(f"ours, {options.clients // 5} lost: server {fifth.server_seconds:.2f} s")
    peer = FlowersRound(vectors, options.peer_clients)
    say(f"Flower: {peer.told()}")
    report("secure_sum", figures(ours, fifth, peer, 4 * options.size))


def figures(ours: "OurRound", fifth: "OurRound", peer: "FlowersRound", plain: int) -> dict[str, dict[str, Any]]:
    """What was measured, over an update of `plain` bytes."""
    return {
        "extra_bytes": figure(
            ours.bytes / plain - 1,
            "share",
            ours=ours.bytes / plain - 1,
            peer=peer.bytes / plain - 1,
            bytes=[ours.bytes, peer.bytes],
        ),
        "client_seconds": figure(
            ours.client_seconds,
            "s",
            ours=ours.client_seconds,
            peer=peer.client_seconds,
            stages={stage: round(median(spent), 4) for stage, spent in ours.costs.items()},
            peer_stages={stage: round(median(spent), 4) for stage, spent in peer.costs.items()},
        ),
        "server_seconds": figure(ours.server_seconds, "s", ours=ours.server_seconds),
        "server_seconds_lost": figure(fifth.server_seconds, "s", ours=fifth.server_seconds),
        "mean_error": figure(max(ours.error, fifth.error), "share", ours=max(ours.error, fifth.error)),
    }


class Round:
    """What a round of secure summing costs.

    Attributes:
        costs: of the clients, by stage.
        bytes: of one client, both ways.
    """

    def __init__(self) -> None:
        self.costs: Costs = {}
        self.bytes = 0

    @property
    def client_seconds(self) -> float:
        """Of one client, all stages."""
        return sum(median(spent) for spent in self.costs.values())

    def told(self) -> str:
        """For whoever watches."""
        stages = ", ".join(f"{stage} {median(spent):.3f}" for stage, spent in self.costs.items())
        return f"client {self.client_seconds:.3f} s ({stages}), {self.bytes:,} bytes"

    def spend(self, stage: str, work: Callable[[], T]) -> T:
        """Do one client's work of a stage, and count its processor time."""
        started = time.process_time()
        result = work()
        self.costs.setdefault(stage, []).append(time.process_time() - started)
        return result


class OurRound(Round):
    """All clients and the server, through one round; the last `lost` clients send no vector."""

    def __init__(self, vectors: Sequence[Reals], lost: int) -> None:
        super().__init__()
        point = FixedPoint(len(vectors), BOUND)
        context = SumContext("benchmark", 1, vectors[0].size, two_thirds(len(vectors)))
        members = {f"hospital-{number:02d}": Member(f"hospital-{number:02d}", context) for number in range(len(vectors))}
        reals = dict(zip(members, vectors, strict=True))
        self._measured = next(iter(members))
        self._server, self._spent = SecureSum(context), 0.0
        for name, member in members.items():
            self._pass("advertise", name, b"", partial(_advertise, member), self._server.advertise)
        for name, data in self._serve(self._server.roster).items():
            self._pass("share", name, data, members[name].share, self._server.share)
        for name, data in list(self._serve(self._server.shares).items())[: len(vectors) - lost]:
            self._pass("mask", name, data, partial(_mask, members[name], point, reals[name]), self._server.add)
        for name, data in self._serve(self._server.survivors).items():
            self._pass("reveal", name, data, members[name].reveal, self._server.reveal)
        found = point.mean(self._serve(self._server.total), len(vectors) - lost)
        exact = np.mean(vectors[: len(vectors) - lost], axis=0, dtype=np.float64)
        self.error = float(np.abs(found - exact).max()) / point.mean_error
        self.server_seconds = self._spent

    def _pass(
        self, stage: str, name: str, data: bytes, ask: Callable[[bytes], bytes], take: Callable[[str, bytes], None]
    ) -> None:
        """One question to one client, and its answer."""
        answer = self.spend(stage, lambda: ask(data))
        if name == self._measured:
            self.bytes += len(data) + len(answer)
        self._serve(lambda: take(name, answer))

    def _serve(self, work: Callable[[], T]) -> T:
        started = time.process_time()
        result = work()
        self._spent += time.process_time() - started
        return result


def _advertise(member: Member, _: bytes) -> bytes:
    return member.advertise()


def _mask(member: Member, point: FixedPoint, reals: Reals, shares: bytes) -> bytes:
    return member.mask(shares, point.encode(reals))


class FlowersRound(Round):
    """All clients through the first two stages of SecAgg+, the first `measured` of them through the others."""

    def __init__(self, vectors: Sequence[Reals], measured: int) -> None:
        super().__init__()
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 0, 0, 0  # whose messages these are
        self._nodes = {number: Context(1, number, {}, RecordDict(), {}) for number in range(1, len(vectors) + 1)}
        self._vectors = vectors
        nodes, measuring = list(self._nodes), range(1, min(measured, len(vectors)) + 1)
        setup = {Key.SAMPLE_NUMBER: len(nodes), Key.SHARE_NUMBER: len(nodes), Key.THRESHOLD: two_thirds(len(nodes))}
        keys = {node: self._ask(node, Stage.SETUP, setup | FLOWERS_DEFAULTS) for node in nodes}
        roster = {str(node): [said[Key.PUBLIC_KEY_1], said[Key.PUBLIC_KEY_2]] for node, said in keys.items()}
        shared = {node: self._ask(node, Stage.SHARE_KEYS, roster) for node in nodes}
        boxes = {node: dict(zip(s[Key.DESTINATION_LIST], s[Key.CIPHERTEXT_LIST], strict=True)) for node, s in shared.items()}
        for node in measuring:
            others = [other for other in nodes if other != node]
            relayed = {Key.SOURCE_LIST: others, Key.CIPHERTEXT_LIST: [boxes[other][node] for other in others]}
            self._ask(node, Stage.COLLECT_MASKED_VECTORS, relayed)
            self._ask(node, Stage.UNMASK, {Key.ACTIVE_NODE_ID_LIST: nodes, Key.DEAD_NODE_ID_LIST: []})

    def _ask(self, node: int, stage: str, content: Mapping[str, Any]) -> dict[str, Any]:
        """One question to one client; its answer."""
        record = ConfigRecord({Key.STAGE: stage, **content})
        message = Message(RecordDict({RECORD_KEY_CONFIGS: record}), node, "train", group_id="1")
        asked = bytes_of(message)
        reply = self.spend(stage, lambda: secaggplus_mod(message, self._nodes[node], self._train))
        if node == 1:
            self.bytes += asked + bytes_of(reply)
        return dict(reply.content.config_records[RECORD_KEY_CONFIGS])

    def _train(self, message: Message, _: Context) -> Message:
        """The client app that the mod asks for the update."""
        update = ndarrays_to_parameters([self._vectors[message.metadata.dst_node_id - 1]])
        result = FitRes(Status(Code.OK, ""), update, num_examples=1000, metrics={})
        return Message(fitres_to_recorddict(result, keep_input=False), reply_to=message)


if __name__ == "__main__":
    main()
