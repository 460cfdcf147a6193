"""Step 1 where the basis comes from the clients' data: ask each for the sketch of its first gradient, add them up, and take the
subspaces of the sum (`fedsb/basis/sketch.py`). No client sends a gradient; with privacy each sketch is a release, paid for; with
a secure sum the server sees what all of them add up to, and no single one.
"""

from collections.abc import Callable, Iterable, Iterator

import torch
from flwr.app import ArrayRecord, Message
from flwr.serverapp import Grid
from torch import Tensor

from fedsb.aggregation.checks import check_equal, check_size, check_vector
from fedsb.aggregation.mean import Mean
from fedsb.aggregation.private import PrivateMean
from fedsb.basis.frames import Basis
from fedsb.basis.sketch import SketchPlan, sketched_basis
from fedsb.config import RunConfig
from fedsb.errors import FederationError, ReplyError
from fedsb.privacy.clipping import clip
from fedsb.privacy.mechanism import sketch_mechanism
from fedsb.privacy.noise import KeyStream
from fedsb.training.start import basis_of_gradients
from strategies.records import (
    ARRAYS,
    SKETCH,
    Identity,
    Order,
    largest_reply,
    order_message,
    reason_of,
    size_of,
    unpack_state,
)
from strategies.rounds import Exchange, Traffic, wait_for_nodes
from strategies.secure import Summing
from strategies.sums import LEAST, SECRETS, context_of, fixed_point_of

Check = Callable[[int, Identity], None]


class Sketching:
    """Asks all clients that are there for their sketches, and makes the basis of what they answer.

    Args:
        config: the run.
        grid: where the clients are.
        plan: what a sketch consists of.
        check: (node, identity of its reply) → raises ReplyError if it is not who it may be.
        tell: the journal.
    """

    def __init__(self, config: RunConfig, grid: Grid, plan: SketchPlan, check: Check, tell: Callable[..., None]) -> None:
        self.config, self.grid, self.plan, self.check, self.tell = config, grid, plan, check, tell
        self.exchanges: list[Exchange] = []
        self.counted: set[str] = set()

    def basis(self) -> tuple[Basis, Traffic]:
        """The basis in the dtype in which it is kept, and the bytes that this took, as those of the basis.

        Raises FederationError if fewer than `federation.min_clients` sketches can be used, or too few for a secure sum.
        """
        federation = self.config.federation
        least = max(federation.min_clients, LEAST if self.config.privacy.secure_sum else 1)
        nodes = wait_for_nodes(self.grid, least, federation.wait_seconds)
        self.tell("stage", title="sketching", clients=len(nodes))
        summed = self._secure(nodes) if self.config.privacy.secure_sum else self._plain(nodes)
        traffic = Traffic()
        for exchange in self.exchanges:
            traffic.basis += exchange.traffic.up + exchange.traffic.down
        return basis_of_gradients(self.config, sketched_basis(self.plan, summed)), traffic

    def _plain(self, nodes: list[int]) -> Tensor:
        """Each sketch is clipped once more, so that no client counts for more than it may."""
        order, bound, total = Order(self.config.to_json(), 0, ""), self.config.privacy.clip_norm, self._sum()
        exchange = self._exchange()
        for client, reply in self._accepted(exchange([order_message(node, SKETCH, order) for node in nodes]), self.plan.size):
            try:
                vector = unpack_state(reply.content.get(ARRAYS), "fp32")
                check_vector(vector, self.plan.size)
            except ReplyError as error:
                self._refuse(client, error)
                continue
            total.add(clip(vector, bound).vector)
            self._count(client)
        self._silent(exchange.silent)
        if self.config.privacy.unit != "client":
            self._enough(1)
        return total.result()

    def _secure(self, nodes: list[int]) -> Tensor:
        summing, shared = self._begin(nodes)
        order, context = summing.order, summing.context
        messages = []
        for node, shares in shared.items():
            message = order_message(node, SKETCH, order)
            message.content[SECRETS] = shares
            messages.append(message)
        exchange = self._exchange()
        for client, reply in self._accepted(exchange(messages), self.plan.size):
            try:
                summing.add(client, reply)
            except ReplyError as error:
                self._refuse(client, error)
                continue
            self._count(client)
        self._silent(exchange.silent)
        self._enough(context.threshold)
        fixed = fixed_point_of(self.config, 0, order.members)
        total = summing.total(fixed, len(self.counted))
        self.tell("secure-sum", round=0, asked=order.members, summed=len(self.counted), error=fixed.mean_error)
        return total.float()

    def _begin(self, nodes: list[int]) -> tuple[Summing, dict[int, ArrayRecord]]:
        """Keys and shares. Once more with those who answered, if too many of the nodes may or will not take part: nothing has
        been paid for yet."""
        order = Order(self.config.to_json(), 0, "", members=len(nodes))
        context = context_of(self.config, "", 0, self.plan.size, len(nodes))
        summing = Summing(self._exchange, order, context, self._accepted, self._refuse, self._silent)
        try:
            return summing, summing.begin(nodes)
        except FederationError:
            there = sorted(summing.nodes.values())
            if not LEAST <= len(there) < len(nodes):
                raise
            return self._begin(there)

    def _sum(self) -> Mean | PrivateMean:
        if self.config.privacy.unit != "client":
            return Mean(self.plan.size)
        clients = self.config.federation.clients
        return PrivateMean(torch.zeros(self.plan.size), sketch_mechanism(self.config, clients), clients, KeyStream())

    def _accepted(self, replies: Iterable[Message], numbers: int) -> Iterator[tuple[str, Message]]:
        """The replies of clients that may take part, each once; the others are refused and named."""
        answered: set[str] = set()
        for reply in replies:
            node = reply.metadata.src_node_id
            try:
                if reply.has_error():
                    raise ReplyError(f"failed: {reason_of(reply.error)}")
                check_size(size_of(reply), largest_reply(numbers, "fp32"))
                identity = Identity.of(reply)
                check_equal("round", identity.round, 0)
                self.check(node, identity)
                if identity.client in answered:
                    raise ReplyError(f"bears the name {identity.client}, which another client has")
            except ReplyError as error:
                self._refuse(f"node {node}", error)
                continue
            answered.add(identity.client)
            yield identity.client, reply

    def _exchange(self) -> Exchange:
        self.exchanges.append(Exchange(self.grid, self.config.federation.round_seconds))
        return self.exchanges[-1]

    def _count(self, client: str) -> None:
        self.counted.add(client)
        self.tell("sketched", client=client)

    def _refuse(self, client: str, error: ReplyError) -> None:
        self.tell("refused", round=0, client=client, reason=str(error))

    def _silent(self, nodes: list[int]) -> None:
        for node in nodes:
            self.tell("silent", round=0, client=f"node {node}")

    def _enough(self, least: int) -> None:
        wanted = max(least, self.config.federation.min_clients)
        if len(self.counted) < wanted:
            raise FederationError(
                f"{len(self.counted)} clients sent a sketch where {wanted} are needed (federation.min_clients, or two thirds of "
                "those asked for a secure sum); events.jsonl names what was refused"
            )
