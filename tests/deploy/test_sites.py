"""Who may take part, and mistakes about it: nothing is sent to the server and nothing is written down."""

import json
import socket
import tempfile
from pathlib import Path

import pytest

from fedsb.deploy import certs, sites
from fedsb.deploy.home import Home
from fedsb.errors import DeployError, KeyFileError
from tests.cli.front_door import call


class Server:
    """Stands for Flower's commands: what was asked of it."""

    asked: list[tuple[str, str]]
    there: set[str]

    def __init__(self, home: Home) -> None:
        pass

    def admit(self, key: Path, name: str) -> str:
        self.asked.append(("admit", name))
        number = str(100 + len(self.asked))
        self.there.add(number)
        return number

    def expel(self, number: str) -> None:
        self.asked.append(("expel", number))
        self.there.discard(number)

    def nodes(self) -> dict[str, dict[str, str]]:
        return {number: {"status": "online"} for number in self.there}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    Server.asked, Server.there = [], set()
    monkeypatch.setattr(sites, "Flower", Server)
    (tmp_path / "home").mkdir()
    place = Home(tmp_path / "home")
    place.write_connection("localhost:1")
    return place


def key(folder: Path, name: str) -> Path:
    certs.make_node_key(folder / "keys" / name, name)
    return folder / "keys" / f"{name}.pub"


def test_a_site_is_admitted_once_and_revoked(home: Home, tmp_path: Path) -> None:
    alpha = key(tmp_path, "alpha")
    first = sites.admit(home, alpha, "alpha")
    assert sites.admit(home, alpha, "alpha") == first and home.admitted() == {"alpha": first}
    assert Server.asked == [("admit", "alpha")]
    sites.revoke(home, "alpha")
    assert home.admitted() == {} and Server.asked[1:] == [("expel", first.node)]


def test_a_server_that_has_lost_its_database_admits_anew_and_forgets(home: Home, tmp_path: Path) -> None:
    alpha = key(tmp_path, "alpha")
    first = sites.admit(home, alpha, "alpha")
    Server.there.clear()
    second = sites.admit(home, alpha, "alpha")
    assert second.node != first.node and home.admitted() == {"alpha": second}
    Server.there.clear()
    sites.revoke(home, "alpha")
    assert home.admitted() == {} and ("expel", second.node) not in Server.asked


def test_a_name_in_use_and_a_key_in_use(home: Home, tmp_path: Path) -> None:
    alpha, beta = key(tmp_path, "alpha"), key(tmp_path, "beta")
    sites.admit(home, alpha, "alpha")
    before = home.admitted()
    with pytest.raises(DeployError, match="alpha is a site already, with another key; choose another name"):
        sites.admit(home, beta, "alpha")
    with pytest.raises(DeployError, match=r"alpha.pub: is the key of alpha already; one site, one key"):
        sites.admit(home, alpha, "beta")
    with pytest.raises(DeployError, match="gamma is no site of this federation; they are alpha"):
        sites.revoke(home, "gamma")
    assert home.admitted() == before and len(Server.asked) == 1


def test_a_file_that_is_no_public_key(home: Home, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    key(tmp_path, "alpha")
    (tmp_path / "beta.pub").write_text("ssh-rsa nonsense")
    with pytest.raises(KeyFileError, match=r"beta.pub: is no site's public key .* ask the site for its key.pub"):
        sites.admit(home, tmp_path / "beta.pub", "beta")
    secret = tmp_path / "keys" / "alpha"
    assert call("site", "admit", str(secret), "--home", str(home.folder)) == 2
    assert "a site sends NAME.pub, and keeps its key" in capsys.readouterr().err
    assert home.admitted() == {} and Server.asked == []


def test_a_port_in_use(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert call("up", "--port", str(port), "--home", str(tmp_path / "home")) == 2
    assert f"--port {port} is in use; choose another" in capsys.readouterr().err
    assert not (tmp_path / "home").exists()


def test_an_expired_certificate_starts_nothing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with tempfile.TemporaryDirectory(prefix="fedsb-") as short:  # pytest's own folders may be too long for a Unix socket
        home = Path(short) / "home"
        with monkeypatch.context() as patched:
            patched.setattr(certs, "SERVER_DAYS", -1)
            patched.setattr(certs, "EARLY", certs.EARLY * 3)
            certs.make_authority(home / "tls")
        assert call("up", "--home", str(home)) == 2
        assert "`fedsb certs --renew` makes a new one" in capsys.readouterr().err
        assert not (home / "supervisord.conf").exists()
        assert call("certs", "--renew", "--home", str(home)) == 0
        certs.check_valid(Home(home).tls.server)
    assert "(396 days)" in capsys.readouterr().out


def test_a_folder_of_elsewhere_and_one_of_up_are_not_mixed(
    home: Home, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("up", "--home", str(home.folder)) == 2
    assert "whose processes are started elsewhere" in capsys.readouterr().err
    other = tmp_path / "other"
    other.mkdir()
    (other / "topology.json").write_text(json.dumps({"port": 1, "sites": [{"name": "a", "index": 0, "port": 2}]}))
    assert call("init", "--superlink", "nowhere", "--home", str(other)) == 2
    assert "--superlink nowhere: is no address; write host:port" in capsys.readouterr().err
    assert call("init", "--superlink", "x:1", "--home", str(other)) == 2
    assert "is a federation of `fedsb up`" in capsys.readouterr().err and [path.name for path in other.iterdir()] == [
        "topology.json"
    ]
