"""The whole of a secure sum, and its server; refusals of a client are in test_member.py."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fedsb.errors import SecureSumError
from fedsb.privacy import masks
from fedsb.privacy.fixed_point import FixedPoint
from fedsb.privacy.masks import add_mask
from fedsb.privacy.roster import two_thirds
from fedsb.privacy.secure_sum import SecureSum
from fedsb.privacy.shares import combine
from tests.privacy.sums import SIZE, Federation, context_of, names_of, words

STAGES = ("advertise", "share", "mask", "reveal")
EVERY_STAGE = {0: "advertise", 7: "share", 8: "share", 20: "mask", 31: "mask", 49: "mask", 2: "reveal", 40: "reveal"}


@st.composite
def rounds(draw: st.DrawFn) -> tuple[int, int, dict[int, str]]:
    """Clients, threshold, and who is lost at which stage, such that enough are left."""
    count = draw(st.integers(2, 12))
    threshold = draw(st.integers(count // 2 + 1, count))
    lost = draw(st.lists(st.integers(0, count - 1), max_size=count - threshold, unique=True))
    return count, threshold, {client: draw(st.sampled_from(STAGES)) for client in lost}


@settings(deadline=None, max_examples=30, database=None)
@given(rounds(), st.integers(0, 2**32))
@example((50, 26, EVERY_STAGE), 0)
@example((2, 2, {}), 0)
def test_the_secure_sum_is_the_plain_sum_of_those_who_stayed(clients: tuple[int, int, dict[int, str]], seed: int) -> None:
    count, threshold, lost = clients
    federation = Federation(words(count, seed=seed), threshold, lost)
    assert federation.reveal().tolist() == federation.plain().tolist()
    kept = [name for client, name in enumerate(names_of(count)) if lost.get(client, "reveal") == "reveal"]
    assert federation.server.names == kept


def test_the_mean_of_reals_is_within_its_bound() -> None:
    reals = np.random.default_rng(1).uniform(-0.25, 0.25, (6, 400)).astype(np.float32)
    point = FixedPoint(6, 0.25)
    federation = Federation([point.encode(vector) for vector in reals], 4, {1: "mask", 2: "reveal"})
    found = point.mean(federation.reveal(), 5)
    exact = np.delete(reals, 1, axis=0).astype(np.float64).mean(0)
    assert 0 < np.abs(found - exact).max() <= point.mean_error


@pytest.mark.parametrize("stage", STAGES)
def test_below_the_threshold_the_round_is_refused(stage: str) -> None:
    federation = Federation(words(5), 3, {0: stage, 1: stage, 2: stage})
    with pytest.raises(SecureSumError, match=r"2 clients .* in the secure sum of round 3 where its threshold is 3; wait"):
        federation.reveal()


def test_a_stage_that_ended_too_early_goes_on() -> None:
    federation = Federation(words(3), 3, {2: "reveal"})
    with pytest.raises(SecureSumError, match="2 clients revealed shares"):
        federation.reveal()
    late = federation.members["site-02"].reveal(federation.server.survivors()["site-02"])
    federation.server.reveal("site-02", late)
    assert federation.server.total().tolist() == federation.plain().tolist()
    assert federation.server.total().tolist() == federation.plain().tolist()


def test_masked_vectors_look_uniform() -> None:
    """Of three clients that send zeros: bytes are spread evenly (chi-square of 256 cells), and nothing is left as it was."""
    size = 1 << 16
    federation = Federation([np.zeros(size, np.uint32)] * 3, 2)
    masked = [
        np.frombuffer(federation.members[name].mask(shares, federation.vectors[name]), "<u4")
        for name, shares in federation.share().items()
    ]
    sums = [masked[0] + masked[1], masked[0] - masked[1], masked[0] + masked[1] + masked[2]]  # own masks stay
    for vector in masked + sums:
        counts = np.bincount(vector.view(np.uint8), minlength=256)
        expected = 4 * size / 256
        assert ((counts - expected) ** 2 / expected).sum() < 255 + 8 * (2 * 255) ** 0.5
        assert np.count_nonzero(vector == 0) < 5


def test_a_vector_is_not_changed_when_it_is_masked() -> None:
    vectors = words(2)
    federation = Federation([vector.copy() for vector in vectors], 2)
    federation.reveal()
    assert np.array_equal(list(federation.vectors.values()), vectors)


def test_fewer_than_the_threshold_learn_no_secret() -> None:
    """Two clients of five and the server, with threshold three: neither the seed nor the key of another client fits."""
    federation = Federation(words(5), 3)
    for name, shares in federation.share().items():
        federation.members[name].mask(shares, federation.vectors[name])
    held = {number: federation.members[names_of(5)[number - 1]]._held[5] for number in (1, 2)}
    for part in (slice(0, 32), slice(32, 64)):
        shares = {number: pair[part] for number, pair in held.items()}
        victim = federation.members["site-04"]
        secret = victim._seed if part.start == 0 else victim._mask_key.private_bytes_raw()
        with pytest.raises(SecureSumError, match="2 shares of a secret came where 3"):
            combine(shares, 3, secret.__eq__)
        with pytest.raises(SecureSumError, match="one of them is wrong"):
            combine(shares, 2, secret.__eq__)
        third = federation.members["site-02"]._held[5][part]
        assert combine({**shares, 3: third}, 3, secret.__eq__) == secret


def test_the_bytes_of_a_round() -> None:
    """As the table in secure_sum.py says; names have 7 bytes."""
    count, size = 5, 100
    federation = Federation(words(count, size), 3, {4: "mask"})
    roster = federation.advertise()["site-00"]
    assert len(roster) == 2 + count * (65 + 7)
    said = {name: member.share(roster) for name, member in federation.members.items()}
    assert {len(shares) for shares in said.values()} == {32 + 80 * (count - 1)}
    for name, shares in said.items():
        federation.server.share(name, shares)
    received = federation.server.shares()
    assert {len(shares) for shares in received.values()} == {1 + 80 * (count - 1)}
    for name in names_of(4):
        masked = federation.members[name].mask(received[name], federation.vectors[name])
        assert len(masked) == 4 * size
        federation.server.add(name, masked)
    survivors = federation.server.survivors()["site-00"]
    assert len(survivors) == 1
    assert len(federation.members["site-00"].reveal(survivors)) == 32 * count


def test_masks_are_made_in_stretches_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = np.zeros(23, np.uint32)
    add_mask(whole, bytes(32), 1)
    monkeypatch.setattr(masks, "STRETCH", 8)
    parts = np.zeros(23, np.uint32)
    add_mask(parts, bytes(32), 1)
    assert parts.tolist() == whole.tolist()
    add_mask(parts, bytes(32), -1)
    assert not parts.any()


def test_memory_is_one_vector() -> None:
    federation = Federation(words(6, 1000), 4)
    federation.mask()
    large = [value for value in vars(federation.server).values() if isinstance(value, np.ndarray)]
    assert [vector.size for vector in large] == [1000]
    assert all(len(data) < 1000 for data in federation.server._shared.values())


def _refused(federation: Federation, method: str, name: str, data: bytes, complaint: str) -> None:
    with pytest.raises(SecureSumError, match=complaint):
        getattr(federation.server, method)(name, data)


def test_advertised_keys_that_are_refused() -> None:
    federation = Federation(words(3), 2)
    keys = federation.members["site-00"].advertise()
    federation.server.advertise("site-00", keys)
    _refused(federation, "advertise", "site-00", federation.members["site-01"].advertise(), "twice; the first ones count")
    _refused(federation, "advertise", "site-02", keys, "another client's")
    _refused(federation, "advertise", "site-02", bytes(63), "63 bytes came where 64")
    _refused(federation, "advertise", "site-02", bytes(64), "is no X25519 public key; leave its client out")
    _refused(federation, "advertise", "site-02", 2 * (b"\x09" + bytes(31)), "one key twice")
    assert federation.server.names == ["site-00"]


def test_a_second_answer_or_a_late_one_is_refused() -> None:
    federation = Federation(words(3), 2)
    federation.share()
    _refused(federation, "share", "site-00", b"", "site-00 answered to share where the secure sum of round 3 is at mask")
    _refused(federation, "advertise", "late", bytes(64), "is at mask; leave it out")
    federation.server.add("site-00", bytes(4 * SIZE))
    _refused(federation, "add", "site-00", bytes(4 * SIZE), "site-00 has sent a vector for the secure sum already")
    _refused(federation, "reveal", "site-00", b"", "is at mask")


def test_who_has_not_answered_the_stage_before_is_refused() -> None:
    federation = Federation(words(4), 3, {1: "share"})
    federation.share()
    _refused(federation, "add", "site-01", bytes(4 * SIZE), "site-01 goes on with the secure sum, but has not shared; leave it")
    _refused(federation, "add", "stranger", bytes(4 * SIZE), "stranger is not on the roster")
    assert federation.server.names == ["site-00", "site-02", "site-03"]


@pytest.mark.parametrize("extra", [-1, 1])
def test_answers_of_another_size_are_refused(extra: int) -> None:
    federation = Federation(words(2), 2)
    federation.advertise()
    _refused(federation, "share", "site-00", bytes(112 + extra), f"shares of {112 + extra} bytes where 112 were expected")
    federation = Federation(words(2), 2)
    federation.share()
    _refused(federation, "add", "site-00", bytes(4 * SIZE + extra), f"a vector of {20 + extra} bytes came where 20")
    federation = Federation(words(2), 2)
    federation.mask()
    _refused(federation, "reveal", "site-00", bytes(64 + extra), f"revealed {64 + extra} bytes where 64 were expected")


def test_stages_cannot_be_ended_before_they_began() -> None:
    server = SecureSum(context_of(2))
    for end in (server.shares, server.survivors, server.total):
        with pytest.raises(SecureSumError, match="0 clients"):
            end()


@pytest.mark.parametrize(("lost", "victim"), [({}, "site-00"), ({0: "mask"}, "site-00")], ids=["seed", "key"])
def test_a_wrong_share_is_detected(lost: dict[int, str], victim: str) -> None:
    """One that stands for the seed of a client who stayed, or for the key of one who did not."""
    federation = Federation(words(4), 3, lost)
    for name, survivors in federation.mask().items():
        said = bytearray(federation.members[name].reveal(survivors))
        said[0] ^= name == "site-02"
        federation.server.reveal(name, bytes(said))
    with pytest.raises(
        SecureSumError, match=f"{victim} cannot be unmasked in the secure sum: the shares .* one of them is wrong"
    ):
        federation.server.total()
    with pytest.raises(SecureSumError, match="cannot be unmasked"):  # and what is half done is never given
        federation.server.total()


def test_a_context_that_is_refused() -> None:
    for wrong in ({"threshold": 1}, {"threshold": 2, "size": 0}, {"threshold": 2, "number": -1}, {"threshold": 70_000}):
        with pytest.raises(SecureSumError, match="a threshold of 2 or more"):
            context_of(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(("members", "threshold"), [(2, 2), (3, 3), (4, 3), (50, 34)])
def test_the_usual_threshold(members: int, threshold: int) -> None:
    assert two_thirds(members) == threshold
