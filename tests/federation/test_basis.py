"""How clients come by the basis: rebuilt and proved, or sent; who is sent what, and what it costs."""

from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord, Message

from clients import session
from fedsb.basis.frames import Basis
from fedsb.basis.spectral import random_basis
from fedsb.config import RunConfig
from fedsb.errors import BasisError, FederationError
from server.local_grid import LocalGrid
from strategies.records import ARRAYS, BASIS, PREPARE, bytes_of, pack_basis, unpack_basis
from tests.federation.tiny import assert_same_result, config_of, events, federate, local_grid, table


class Spy(LocalGrid):
    """Writes down what is sent."""

    sent: list[Message]

    def push_messages(self, messages: Any) -> list[str]:
        pushed = list(messages)
        self.sent.extend(pushed)
        return super().push_messages(pushed)

    def basis_arrays(self) -> dict[int, int]:
        """Client's number → bytes of the messages in which it was sent a basis."""
        found: dict[int, int] = {}
        for message in self.sent:
            if BASIS in message.content:
                client = message.metadata.dst_node_id - 2
                found[client] = found.get(client, 0) + bytes_of(message)
        return found


def spy(config: RunConfig, folder: Path) -> Spy:
    session.open_session.cache_clear()
    grid = local_grid(config, folder)
    grid.__class__ = Spy
    grid.sent = []  # type: ignore[attr-defined]
    return grid  # type: ignore[return-value]


def _public(words: str) -> dict[str, Any]:
    return {"source": "public", "public": {"name": "open", "source": words}, "examples": 4}


@pytest.mark.parametrize("source", ["random", "weights"])
def test_a_basis_that_clients_can_rebuild_is_not_sent(llama: str, words: str, out: Path, source: str) -> None:
    config = config_of(table(llama, words, basis={"source": source}))
    grid = spy(config, out)
    summary = federate(config, out, grid=grid)
    assert grid.basis_arrays() == {} and summary["bytes"]["basis"] == 0
    assert len(events(out, "prepared")) == 3
    (told,) = events(out, "basis")
    assert told["sent"] is False and told["fingerprint"] == summary["basis"]["fingerprint"]


def test_a_public_basis_is_sent_to_each_client_once(llama: str, words: str, out: Path) -> None:
    config = config_of(table(llama, words, basis=_public(words)))
    grid = spy(config, out)
    summary = federate(config, out, grid=grid)
    assert grid.basis_arrays().keys() == {0, 1, 2}
    assert sum(1 for message in grid.sent if BASIS in message.content) == 3
    assert summary["bytes"]["basis"] == sum(grid.basis_arrays().values()) > 3 * summary["basis"]["bytes"]
    down = sum(bytes_of(message) for message in grid.sent if BASIS not in message.content)
    assert summary["bytes"]["down"] == down


def test_a_client_that_rebuilds_another_basis_is_sent_the_right_one(
    llama: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its linear algebra rounds differently, say. The result is that of clients who rebuilt it right."""
    config = config_of(table(llama, words))
    expected = federate(config, tmp_path / "right", grid=spy(config, tmp_path / "right"))
    right = session.build_basis

    def rounds_differently(*args: Any) -> Basis:
        basis = right(*args)
        layer = next(iter(basis.B))
        nudged = basis.B[layer].clone()
        nudged[0, 0] += nudged[0, 0].abs() * 0.01 + 1e-3
        return Basis(basis.B | {layer: nudged}, basis.A, basis.R0)

    monkeypatch.setattr(session, "build_basis", rounds_differently)
    grid = spy(config, tmp_path / "wrong")
    summary = federate(config, tmp_path / "wrong", grid=grid)
    sent = grid.basis_arrays()
    assert sent and summary["bytes"]["basis"] == sum(sent.values())
    assert summary["clients"] == 3 and not events(tmp_path / "wrong", "refused")
    assert summary["evaluation"] == expected["evaluation"]
    assert_same_result(tmp_path / "right", tmp_path / "wrong")


def test_a_client_that_will_not_take_the_basis_is_left_out(llama: str, words: str, out: Path) -> None:
    config = config_of(table(llama, words, federation={"rounds": 1}))
    session.open_session.cache_clear()

    class Stubborn(LocalGrid):
        def pull_messages(self, message_ids: Any) -> Any:
            for reply in super().pull_messages(message_ids):
                if reply.metadata.src_node_id == 3 and reply.metadata.message_type == PREPARE:
                    reply.content["identity"]["basis"] = "00" * 32
                yield reply

    grid = local_grid(config, out)
    grid.__class__ = Stubborn
    summary = federate(config, out, grid=grid)
    assert [(e["client"], e["round"]) for e in events(out, "refused")] == [("client-1", 0)]
    assert "another basis" in events(out, "refused")[0]["reason"]
    assert summary["clients"] == 2 and summary["bytes"]["basis"] > summary["basis"]["bytes"]


def test_with_too_few_clients_on_the_basis_no_round_begins(llama: str, words: str, out: Path) -> None:
    config = config_of(table(llama, words, federation={"min_clients": 3}))

    class Deaf(LocalGrid):
        def pull_messages(self, message_ids: Any) -> Any:
            for reply in super().pull_messages(message_ids):
                reply.content["identity"]["basis"] = "00" * 32
                yield reply

    grid = local_grid(config, out)
    grid.__class__ = Deaf
    with pytest.raises(FederationError, match="0 clients hold the basis"):
        federate(config, out, grid=grid)
    assert not events(out, "reply")


def test_a_resumed_run_takes_its_basis_from_disk(llama: str, words: str, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(table(llama, words, basis=_public(words)))
    first = federate(config, out)
    monkeypatch.setattr("server.federation.build_basis", lambda *_: pytest.fail("built again"))
    grid = spy(config, out)
    again = federate(config, out, resume=True, grid=grid)
    assert grid.basis_arrays() == {}, "clients have it on their disks"
    assert again["basis"] == first["basis"] and again["bytes"] == first["bytes"]


def test_a_torn_basis_is_named(llama: str, words: str, out: Path) -> None:
    config = config_of(table(llama, words))
    federate(config, out)
    (file,) = (out / "basis").iterdir()
    file.write_bytes(file.read_bytes()[:-1] + b"\xff")
    with pytest.raises(BasisError, match="delete it and rebuild"):
        federate(config, out, resume=True)
    file.unlink()
    federate(config, out, resume=True)


def test_a_client_that_was_never_prepared_says_so(llama: str, words: str, tmp_path: Path) -> None:
    config = config_of(table(llama, words))
    session.open_session.cache_clear()
    site = session.Site("client-0", 0, tmp_path)
    with pytest.raises(BasisError, match="client-0 was never given basis abababababab; the server must prepare it first"):
        session.open_session(config.to_json()).require(site, "ab" * 32)


def test_a_client_finds_its_basis_again_in_a_new_process(llama: str, words: str, tmp_path: Path) -> None:
    config = config_of(table(llama, words))
    site, run = session.Site("client-0", 0, tmp_path), config.to_json()
    session.open_session.cache_clear()
    fingerprint = session.open_session(run).prepare(site, "?")
    session.open_session.cache_clear()
    session.open_session(run).require(site, fingerprint)
    assert session.open_session(run).basis == fingerprint


def test_a_basis_that_many_clients_share_is_written_once(
    llama: str, words: str, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[Path] = []
    original = session.save_basis
    monkeypatch.setattr(session, "save_basis", lambda folder, basis: saved.append(original(folder, basis)))
    config = config_of(table(llama, words, basis=_public(words)))
    federate(config, out, grid=spy(config, out))
    assert len(saved) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_basis_travels_bit_for_bit(dtype: torch.dtype) -> None:
    basis = random_basis({"a": (6, 5), "b": (7, 8)}, 3, seed=0).to(dtype)
    record = pack_basis(basis)
    arrived = unpack_basis(record)
    assert arrived.fingerprint == basis.fingerprint
    assert not arrived.R0
    assert isinstance(record, ArrayRecord) and ARRAYS not in record
