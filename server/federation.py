"""The steps of a federation at the server up to its last round, each called by `server/app.py`, in the order of this file."""

import math
import time
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord
from flwr.serverapp import Grid

from fedsb.adapters.attach import attach, layout_of, model_section, scale_of, shapes_of, start_state
from fedsb.adapters.instances import encoder_of, identity_of
from fedsb.adapters.methods import METHODS
from fedsb.adapters.share import share_of, trained_size
from fedsb.aggregation.checks import Strikes, check_equal, check_size
from fedsb.aggregation.error import AggregationError
from fedsb.basis.frames import Basis
from fedsb.basis.spectral import seeded
from fedsb.config import RunConfig
from fedsb.data.tasks import labels_of
from fedsb.deploy.home import Home
from fedsb.errors import BasisError, FederationError, ReplyError
from fedsb.models import device_of, load_model, load_tokenizer, locate, outline_model
from fedsb.report.journal import Journal
from fedsb.report.provenance import peak_memory
from fedsb.sections import SITE_NAME
from fedsb.store import checkpoint
from fedsb.store.basis_files import basis_file, first_basis, load_basis, save_basis
from fedsb.training.start import basis_source, build_basis, can_rebuild, needs_weights, sketch_plan
from server.sketching import Sketching
from strategies.fedsb import FedSB
from strategies.records import (
    LOSS,
    PREPARE,
    Identity,
    Order,
    largest_reply,
    order_message,
    pack_basis,
    pack_state,
    reason_of,
    size_of,
    unpack_state,
)
from strategies.rounds import Exchange, RoundResult, Traffic, wait_for_nodes
from strategies.shared import Shared
from strategies.shares import Shares, check_ranks
from strategies.table import strategy_of


class Federation:
    """What the server knows in the course of a run."""

    def __init__(self, config: RunConfig, grid: Grid, folder: Path, journal: Journal, home: Path | None = None) -> None:
        self.config, self.grid, self.folder, self.journal, self.home = config, grid, folder, journal, home
        self.source, self.encoder = locate(config.model.source), encoder_of(config)
        self.identity = identity_of(self.source, self.encoder)
        self.labels = len(labels_of(config)) or None
        outline = self._model(with_weights=False)
        self.trained = layout_of(outline)
        self.layout = share_of(self.trained, config.adapter.method, config.adapter.rank).layout
        self.shapes = shapes_of(outline)
        check_ranks(config, self._admitted().values() if home else config.client_names)
        self.roster: dict[int, str] = {}
        self.names: dict[int, str] = {}  # of every node that was ever in the roster
        self.pauses: dict[int, tuple[int, int]] = {}  # node → rounds until it is asked again, of so many in this pause
        self.shared: Shared | None = None
        self.traffic = Traffic()
        self.history: list[dict[str, Any]] = []
        self.peak_memory = 0  # of the processes that worked on this run before
        self.last = checkpoint.latest(folder, config.digest())
        self.strikes = Strikes(config.federation.strikes, self.last.progress["strikes"] if self.last else {})
        journal.tell(
            "start",
            run=config.name,
            clients=None if home and config.data.partition == "own" else config.federation.clients,
            model=config.model.source,
            method=config.adapter.method,
            rank=config.adapter.rank,
            trainable=trained_size(self.trained, config.adapter.method),
        )

    def choose_basis(self) -> Basis:
        """Step 1: build the basis, or take the one that this run has already."""
        started = time.monotonic()
        last = self.last.basis_fingerprint if self.last else ""
        stored = load_basis(self.folder, last) if last and basis_file(self.folder, last).exists() else first_basis(self.folder)
        if stored is not None:
            basis = stored
        elif self.config.basis.source == "sketch":
            plan = sketch_plan(self.config, self._model(with_weights=False))
            basis, moved = Sketching(self.config, self.grid, plan, self._check_who, self.journal.tell).basis()
            self.traffic.add(moved)
            save_basis(self.folder, basis)
        else:
            weights = needs_weights(self.config)
            tokenizer = load_tokenizer(self.source)
            basis = build_basis(self.config, self._model(with_weights=weights), tokenizer, device_of(self.config.runtime.device))
            save_basis(self.folder, basis)
        self.journal.tell(
            "basis",
            source=basis_source(self.config),
            fingerprint=basis.fingerprint,
            bytes=basis.nbytes,
            sent=not can_rebuild(self.config),
            seconds=round(time.monotonic() - started, 3),
        )
        return basis

    def prepare_clients(self, basis: Basis) -> None:
        """Get every client's name, and see to it that it has the basis: rebuilt and proved, or sent."""
        federation = self.config.federation
        nodes = wait_for_nodes(self.grid, federation.min_clients, federation.wait_seconds)
        self.journal.tell("stage", title="preparing clients", clients=len(nodes))
        self.admit(basis, nodes)
        if len(self.roster) < federation.min_clients:
            raise FederationError(
                f"{len(self.roster)} clients hold the basis where federation.min_clients = {federation.min_clients} are "
                "needed; events.jsonl names what was refused"
            )

    def admit(self, basis: Basis, nodes: list[int] | None = None) -> None:
        """Take in nodes that are there and not in the roster: all who come late take part from the next round on.

        Each is first asked what it has, or can rebuild; B and A go only to those that have another basis or none. A node
        that was refused or did not answer is asked again after 2, then 4, 8, … rounds, so that it cannot hold up every round,
        and at once when it has been away. Who is left out is not asked.
        """
        online = set(self.grid.get_node_ids()) if nodes is None else set(nodes)
        out = {node for node, name in (self._admitted() | self.names).items() if self.strikes.out(name)}
        self.pauses = {node: (left - 1, length) for node, (left, length) in self.pauses.items() if node in online}
        new = sorted(node for node in online - self.roster.keys() - out if self.pauses.get(node, (0, 1))[0] <= 0)
        for node in new:
            length = 2 * self.pauses.get(node, (0, 1))[1]
            self.pauses[node] = length, length
        if not new:
            return
        behind = self._prepare(basis, new, None, online)
        if behind:  # without it, or with linear algebra that rounds differently
            behind = self._prepare(basis, list(behind), pack_basis(basis), online)
        for client in behind.values():
            self.journal.tell("refused", round=0, client=client, reason="holds another basis, although it was sent this one")

    def _check_who(self, node: int, identity: Identity) -> None:
        """Raise ReplyError unless a reply is of a client that may take part, with this run's model."""
        share = Shares(self.config, self.layout).share(identity.client)
        check_equal("layout", identity.layout, share.layout.fingerprint)
        check_equal("base model", identity.model, self.identity)
        if not SITE_NAME.fullmatch(identity.client):
            raise ReplyError(f"bears the name {identity.client[:63]!r}, which is none (a-z, 0-9, dot, dash, underscore)")
        if self.home:
            check_equal("site", identity.client, self._admitted().get(node, "none that was admitted"))

    def strategy(self, basis: Basis) -> FedSB:
        """Step 2's strategy."""
        method, probes = METHODS[self.config.adapter.method], seeded(self.config.seed, "probe")
        of = {"rank": self.config.adapter.rank, "seed": self.config.seed}
        error = None if method.kept else AggregationError(method, basis, self.shapes, scale_of(self.config), probes, **of)
        kind, shared = strategy_of(self.config), self._shared(basis)
        strategy = kind(self.config, self.layout, shared, self.roster, self.strikes, error, self.journal.tell)
        if self.last:
            strategy.memory, strategy.notes = dict(self.last.memory), dict(self.last.progress["strategy"])
        return strategy

    def restore_or_start(self, basis: Basis) -> tuple[int, ArrayRecord]:
        """The last finished round and its state; before the first round, the core at the start."""
        last = self.last
        if last is None:
            state = start_state(self.layout, basis, self.config)
            return 0, pack_state(self.layout.flatten(state), self.config.federation.wire_dtype)
        if last.basis_fingerprint != basis.fingerprint:
            raise BasisError(f"{self.folder}: the checkpoint is of another basis than basis/; choose another --out")
        checkpoint.check_model(last, self.identity, self.config.model.source)
        self.traffic = Traffic(**last.progress["bytes"])
        self.history = last.progress["history"]
        self.peak_memory = last.progress["peak_memory"]
        self.journal.tell("resumed", round=last.round)
        return last.round, pack_state(self.layout.flatten(last.state), self.config.federation.wire_dtype)

    def announce(self, server_round: int, clients: int) -> None:
        """Step 2a: say that a round begins."""
        self.journal.tell("stage", title=f"round {server_round}/{self.config.federation.rounds}", clients=clients)

    def checkpoint(self, result: RoundResult) -> None:
        """Step 2d: a round is over when its checkpoint is on disk."""
        assert result.metrics is not None
        self.traffic.add(result.traffic)
        entry = {
            "round": result.round,
            "loss": _known(result.metrics[LOSS]),
            "aggregation_error": _known(result.metrics["aggregation-error"]),
            "clients": result.metrics["clients"],
            "up": result.traffic.up,
            "down": result.traffic.down,
            "seconds": round(result.seconds, 3),
        }
        self.history.append(entry)
        state = self.layout.unflatten(unpack_state(result.arrays))
        assert self.shared is not None
        if self.shared.before is not None:
            save_basis(self.folder, self.shared.basis, self.shared.before)
        basis = self.shared.basis.fingerprint
        peak = max(self.peak_memory, peak_memory())
        counts = {"strikes": self.strikes.counts, "peak_memory": peak, "strategy": result.notes}
        progress = {"bytes": vars(self.traffic), "history": self.history, **counts}
        digest, model, memory = self.config.digest(), self.identity, dict(result.memory)
        checkpoint.save(self.folder, checkpoint.Checkpoint(result.round, state, digest, basis, model, progress, memory))
        self.name_nodes("silent", result.round, result.silent)
        self.name_nodes("late", result.round, result.late)
        self.journal.tell("round", rounds=self.config.federation.rounds, **entry)

    def _model(self, *, with_weights: bool) -> Any:
        section, device = self.config.model, device_of(self.config.runtime.device)
        if with_weights:
            model = load_model(self.source, model_section(self.config), self.labels, device)
            return attach(model, self.config, load_tokenizer(self.source))
        return attach(outline_model(self.source, section, self.labels), self.config)

    def _prepare(self, basis: Basis, nodes: list[int], arrays: ArrayRecord | None, online: set[int]) -> dict[int, str]:
        """Ask nodes to get hold of the basis; returns those that ended up with another one or none, and their names.

        A name belongs to the first node of those `online` that bears it.
        """
        exchange = Exchange(self.grid, self.config.federation.round_seconds)
        order = Order(self.config.to_json(), 0, basis.fingerprint)
        admitted, behind = self._admitted(), {}
        for reply in exchange([order_message(node, PREPARE, order, arrays) for node in nodes]):
            node = reply.metadata.src_node_id
            try:
                if reply.has_error():
                    raise ReplyError(f"failed: {reason_of(reply.error)}")
                check_size(size_of(reply), largest_reply(0, "fp32"))
                identity = Identity.of(reply)
                check_equal("round", identity.round, 0)
                self._check_who(node, identity)
                planned, unit = self.config.federation.clients, self.config.privacy.unit
                if unit == "client" and len(set(self.roster.values()) | {identity.client}) > planned:
                    raise ReplyError(f"comes beyond the federation.clients = {planned} that privacy by client is planned for")
                if self.strikes.out(identity.client):
                    raise ReplyError(f"is {identity.client}, which was left out of this run")
                if any(name == identity.client for other, name in self.roster.items() if other in online):
                    raise ReplyError(f"bears the name {identity.client}, which another client has")
            except ReplyError as error:
                self.journal.tell("refused", round=0, client=admitted.get(node, f"node {node}"), reason=str(error))
                continue
            if identity.basis != basis.fingerprint:
                behind[node] = identity.client
            else:
                for gone in [other for other, name in self.roster.items() if name == identity.client]:
                    del self.roster[gone]  # the same client under a new node id
                self.roster[node] = self.names[node] = identity.client
                self._shared(basis).has_all(identity.client)
                self.journal.tell("prepared", client=identity.client)
        self.traffic.basis += exchange.traffic.down if arrays is not None else 0
        self.traffic.down += exchange.traffic.down if arrays is None else 0
        self.traffic.up += exchange.traffic.up
        self.name_nodes("silent", 0, exchange.silent)
        return behind

    def _admitted(self) -> dict[int, str]:
        """Node id → the name that it was admitted under; empty in a simulation."""
        return {int(site.node): name for name, site in Home(self.home).admitted().items()} if self.home else {}

    def name_nodes(self, event: str, server_round: int, nodes: list[int]) -> None:
        """Tell the journal of nodes, by the names of their clients."""
        names = self._admitted() | self.names if nodes else {}
        for node in nodes:
            self.journal.tell(event, round=server_round, client=names.get(node, f"node {node}"))

    def _shared(self, basis: Basis) -> Shared:
        if self.shared is None:
            self.shared = Shared(basis)
        return self.shared


def _known(value: Any) -> float | None:
    """A figure that was measured, else None, as JSON has it."""
    return None if math.isnan(value) else float(value)
