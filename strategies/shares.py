"""What of the server's state goes to each client, and what can come back from it."""

from collections.abc import Iterable
from typing import Literal

import torch
from flwr.app import ArrayRecord, Message
from torch import Tensor

from fedsb.adapters.attach import initial_state
from fedsb.adapters.methods import METHODS
from fedsb.adapters.share import Share, heads_of, kept_names, share_of
from fedsb.adapters.state import HEAD, Layout
from fedsb.aggregation.checks import Reach, check_vector
from fedsb.config import RunConfig
from fedsb.errors import ConfigError, ReplyError
from fedsb.training.loop import Plan, largest_update, personal_plan, round_plan
from strategies.records import ARRAYS, pack_state, unpack_state


def check_ranks(config: RunConfig, known: Iterable[str]) -> None:
    """Raise ConfigError if `adapter.ranks` names somebody who is not among the `known` clients."""
    unknown = sorted(config.adapter.ranks.keys() - set(known))
    if unknown:
        raise ConfigError(
            f"adapter.ranks names {unknown[0]}, which is no client of this federation; mend the name, or admit that site first"
        )


class Shares:
    """The part of a strategy that knows every client's share.

    Args:
        config: the run.
        layout: names and shapes of the state that the server keeps.
    """

    sent: Tensor  # the state of the last question (size of `returns`,)
    reach: Reach
    dtype: Literal["fp32", "bf16"]
    personal: bool = False  # whether whole personal adapters come back
    turn: int | None = None  # the head that alone comes back; None: all
    _outgoing: tuple[ArrayRecord, int, ArrayRecord] | None = (
        None  # of heads in turn: the state, the round, and what goes out of it
    )

    def __init__(self, config: RunConfig, layout: Layout) -> None:
        self.config, self.layout = config, layout
        self.returns = layout  # of all that comes back; in personalisation that may be more than went out

    def share(self, client: str) -> Share:
        """Which numbers of the server's state travel to and from a client."""
        return share_of(self.layout, self.config.adapter.method, self.config.rank_of(client), kept=True)

    def sent_to(self, client: str, arrays: ArrayRecord, server_round: int) -> ArrayRecord:
        """A client's share of the server's state, with which `server_round` begins; the same record if that is all of it."""
        share, method = self.share(client), self.config.adapter.method
        if METHODS[method].in_turn:  # the same for everybody, so one record for all
            if self._outgoing is None or self._outgoing[0] is not arrays or self._outgoing[1] != server_round:
                share = heads_of(self.layout, method, 0, self.config.turn(server_round))
                part = share.take(unpack_state(arrays))
                self._outgoing = arrays, server_round, pack_state(part, self.config.federation.wire_dtype)
            return self._outgoing[2]
        if share.index is None:
            return arrays
        return pack_state(share.take(unpack_state(arrays)), self.config.federation.wire_dtype)

    def returned(self, client: str) -> Share:
        """What comes back from a client."""
        if self.turn is not None:
            return heads_of(self.layout, self.config.adapter.method, self.turn, self.turn)
        return share_of(self.returns, self.config.adapter.method, self.config.rank_of(client), kept=True, up=not self.personal)

    def expect(self, arrays: ArrayRecord, plan: Plan, dtype: Literal["fp32", "bf16"], turn: int | None = None) -> None:
        """Remember which states can come back from this one, and in which dtype, for `accepted` and `usable`."""
        self.turn, self.personal = turn, False
        core, head = largest_update(plan)
        method, limit = METHODS[self.config.adapter.method], self.config.federation.max_update_norm
        self.sent, self.returns = unpack_state(arrays), self.layout
        sent = self.layout.unflatten(self.sent)
        largest = {name: torch.full_like(t, head) if name.startswith(HEAD) else method.reach(core, t) for name, t in sent.items()}
        largest |= {name: torch.zeros_like(t) for name, t in sent.items() if name.rpartition(".")[2] in method.down}
        self.reach = Reach.of(
            self.sent,
            self.layout.flatten(largest),
            plan.count,
            bf16=dtype == "bf16",
            norm=None if limit == "auto" else limit,
        )
        self.dtype = dtype

    def expect_personal(self, arrays: ArrayRecord, trained: Layout) -> None:
        """The same of personalisation, from which all that a client trains (`trained`) comes back.

        What it kept to itself may have moved in every round since the start; `federation.max_update_norm` is not about that.
        """
        plan = personal_plan(self.config)
        self.expect(arrays, plan, "fp32")
        self.personal = True
        kept = kept_names(trained, METHODS[self.config.adapter.method])
        if not kept:
            return
        plans = [plan, *(round_plan(self.config, n + 1) for n in range(self.config.federation.rounds))]
        all_along = [sum(far) for far in zip(*map(largest_update, plans), strict=True)]
        largest = {
            name: torch.full(shape, (all_along if name in kept else largest_update(plan))[name.startswith(HEAD)])
            for name, shape in trained.shapes
        }
        start = initial_state(trained, self.config.seed) | self.layout.unflatten(self.sent)
        self.sent, self.returns = trained.flatten(start), trained
        self.reach = Reach.of(self.sent, trained.flatten(largest), sum(p.count for p in plans), bf16=False, norm=None)

    def usable(self, client: str, reply: Message) -> tuple[Tensor, float]:
        """The flat state of a reply, with what is not in the client's share as it was, and the norm of its difference from the
        one sent.

        Raises ReplyError if there is none, or one that must not be counted.
        """
        try:
            record = reply.content[ARRAYS]
        except KeyError:
            raise ReplyError("sent no arrays") from None
        vector = unpack_state(record, self.dtype)
        returned = self.returned(client)
        check_vector(vector, returned.layout.size)
        whole = returned.put(vector, self.sent)
        return whole, self.reach.check(whole)
