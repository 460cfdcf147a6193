"""Key files: made, taken back and listed by `fedsb key`, and followed by a server that runs."""

import logging
import tomllib
from pathlib import Path

import pytest

from fedsb.errors import ConfigError
from fedsb.serving.http.keys import Key, Keys, add_key, entries_of, revoke_key
from tests.cli.front_door import complaint, printed

Capture = pytest.CaptureFixture[str]
BY_HAND = (
    "# of the whole clinic\n\n[[key]] # the first\nname = 'by hand'\nsha256 = '" + "a" * 64 + "'\ntenants = ['x']\n\n# and then\n"
)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "keys.toml"


def found(keys: Keys, token: str) -> Key:
    key = keys.find(token)
    assert key is not None
    return key


def test_a_key_opens_what_it_was_made_for_and_is_nowhere_written(file: Path, capsys: Capture) -> None:
    told = printed(capsys, "key", "add", "clinic", "--file", str(file), "--tenant", "clinic", "--tenant", "lab-*", "--no-base")
    token = told.strip()
    assert len(token) > 40 and token not in file.read_text()
    key = found(Keys(file), token)
    assert key.may_ask("clinic") and key.may_ask("lab-7") and not key.may_ask("other") and not key.may_ask_base
    other = printed(capsys, "key", "add", "boss", "--file", str(file), "--admin").strip()
    keys = Keys(file)
    assert other != token and keys.is_admin(found(keys, other)) and not keys.is_admin(found(keys, token))
    assert keys.find("fedsb-" + "x" * 43) is None and keys.find(None) is None
    listed = printed(capsys, "key", "list", "--file", str(file)).splitlines()
    assert [line.split()[0] for line in listed[1:]] == ["clinic", "boss"] and "clinic lab-*" in listed[1]


def test_what_is_taken_back_goes_and_all_else_stays_as_it_is_written(file: Path) -> None:
    file.write_text(BY_HAND)
    one, two = (add_key(file, {"name": name, "tenants": ["*"]}) for name in ("one", "two"))
    before = file.read_text()
    assert before.startswith(BY_HAND.rstrip())
    revoke_key(file, "one")
    assert tomllib.loads(file.read_text())["key"] == [key for key in tomllib.loads(before)["key"] if key["name"] != "one"]
    assert file.read_text().startswith(BY_HAND.rstrip())
    keys = Keys(file)
    assert keys.find(one) is None and found(keys, two)
    revoke_key(file, "by hand")
    assert [entry.name for entry in entries_of(file)] == ["two"] and file.read_text().startswith("# of the whole clinic")


def test_a_server_follows_its_file(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = add_key(file, {"name": "first", "tenants": ["*"], "requests_per_minute": 1})
    keys = Keys(file)
    assert found(keys, first).wait() == 0
    second = add_key(file, {"name": "second", "tenants": ["*"]})
    assert found(keys, second)
    assert found(keys, first).wait() > 0  # it goes on counting
    good = file.read_text()
    with caplog.at_level(logging.ERROR):
        file.write_text("[[key")
        assert found(keys, first) and found(keys, second)
        file.unlink()
        assert found(keys, first)
    assert [record.getMessage().split(":")[0] for record in caplog.records] == ["the keys stay as they were"] * 2
    file.write_text(good)
    revoke_key(file, "first")
    assert keys.find(first) is None and found(keys, second)
    revoke_key(file, "second")
    assert keys.find(second) is None and keys.find(None) is None and keys.needed  # and not open to all
    with pytest.raises(ConfigError, match="has no keys; make one with `fedsb key add NAME"):
        Keys(file)


def test_wrong_input_leaves_the_file_as_it_was(file: Path, capsys: Capture) -> None:
    assert "cannot be read" in complaint(capsys, "key", "list", "--file", str(file))
    add_key(file, {"name": "one", "tenants": ["*"]})
    before = file.read_bytes()
    assert "has a key one already; revoke it first" in complaint(capsys, "key", "add", "one", "--file", str(file))
    assert "name = '' will not do" in complaint(capsys, "key", "add", "", "--file", str(file))
    assert "has no key two, but one; choose one" in complaint(capsys, "key", "revoke", "two", "--file", str(file))
    assert file.read_bytes() == before
    inline = "key = [{name = 'x', sha256 = '" + "a" * 64 + "'}]\n"
    file.write_text(inline)
    assert "take x out by hand" in complaint(capsys, "key", "revoke", "x", "--file", str(file))
    assert file.read_text() == inline
