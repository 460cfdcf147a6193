"""Bytes on the wire: the proxy counts exactly what passes, and a run's own count is what Flower and the sockets saw."""

import socket
import threading
from pathlib import Path

import pytest

from benchmarks import wire_bytes
from tests.benchmarks.samples import check, last_line
from tests.federation.tiny import config_of, save_model, save_task, table


def test_the_proxy_passes_everything_on_and_counts_it() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            connection, _ = server.accept()
            with connection:
                received = b"".join(iter(lambda: connection.recv(1 << 16), b""))
                connection.sendall(received[:1000])

        thread = threading.Thread(target=answer)
        thread.start()
        with wire_bytes.CountingProxy(server.getsockname()[1]) as proxy:
            with socket.create_connection(("127.0.0.1", proxy.port), timeout=10) as client:
                client.sendall(bytes(range(250)) * 1200)
                client.shutdown(socket.SHUT_WR)
                answered = b"".join(iter(lambda: client.recv(1 << 16), b""))
            assert answered == bytes(range(250)) * 4
            assert proxy.bytes() == {"up": 300_000, "down": 1000}
        thread.join(timeout=10)


def test_the_proxy_hangs_up_where_nobody_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with (
        wire_bytes.CountingProxy(port) as proxy,
        socket.create_connection(("127.0.0.1", proxy.port), timeout=10) as client,
    ):
        assert client.recv(1) == b""


@pytest.mark.apart
@pytest.mark.timeout(600)
def test_a_run_counts_what_flower_and_the_sockets_count(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    content = table(
        save_model(tmp_path / "model", width=512),
        save_task(tmp_path / "words"),
        adapter={"rank": 256},
        federation={"clients": 2, "min_clients": 2, "rounds": 1},
        train={"steps": 1},
        personal={"steps": 1},
    )
    (tmp_path / "tiny.toml").write_text(config_of(content).to_toml())
    config = wire_bytes.RunConfig.load(tmp_path / "tiny.toml")
    found = wire_bytes.figures(config, tmp_path_factory.mktemp("f"), idle_seconds=0.1)
    wire_bytes.report("wire_bytes", found)
    result = last_line(capsys)
    keys = {"relative_error", "relative_error_up", "relative_error_down"}
    check(result, "wire_bytes", keys | {key.replace("error", "error_tls") for key in keys} | {"idle"})
    assert all(0 < found[key]["value"] < 0.03 for key in keys)
    assert all(found[key]["ours"] > 4 * found["relative_error"]["trainable"] for key in keys)
    for way in ("_up", "_down"):  # sockets carry all that Flower counts, and more
        assert found[f"relative_error_tls{way}"]["peer"] > found[f"relative_error{way}"]["peer"]
