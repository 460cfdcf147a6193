import itertools
import secrets

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsb.errors import SecureSumError
from fedsb.privacy.shares import combine, commitment, opens, split

SECRET = bytes(range(32))


def _anything(_: bytes) -> bool:
    return True


def _shares(threshold: int, count: int, secret: bytes = SECRET) -> dict[int, bytes]:
    return dict(enumerate(split(secret, threshold, count), start=1))


@settings(deadline=None, max_examples=30, database=None)
@given(st.binary(min_size=32, max_size=32), st.integers(2, 9), st.integers(0, 4), st.randoms(use_true_random=False))
def test_any_threshold_of_shares_gives_the_secret(secret: bytes, threshold: int, more: int, random) -> None:  # type: ignore[no-untyped-def]
    shares = _shares(threshold, threshold + more, secret)
    some = random.sample(sorted(shares), threshold)
    assert combine({member: shares[member] for member in some}, threshold, secret.__eq__) == secret


def test_more_shares_than_the_threshold_give_it_too() -> None:
    assert combine(_shares(3, 7), 3, SECRET.__eq__) == SECRET
    assert combine(_shares(7, 7), 7, SECRET.__eq__) == SECRET


def test_fewer_shares_than_the_threshold_are_refused() -> None:
    shares = _shares(3, 4)
    for some in itertools.combinations(shares, 2):
        with pytest.raises(SecureSumError, match="2 shares of a secret came where 3 are needed"):
            combine({member: shares[member] for member in some}, 3, _anything)


def test_fewer_shares_than_the_threshold_give_something_else() -> None:
    """Whoever takes them for enough: what comes out is no secret that fits."""
    shares = _shares(3, 4)
    del shares[4], shares[1]
    assert combine(shares, 2, _anything) != SECRET
    with pytest.raises(SecureSumError, match="one of them is wrong"):
        combine(shares, 2, SECRET.__eq__)


def test_fewer_shares_fit_every_secret() -> None:
    """With two of three shares and any secret there is a polynomial: here the third share for another secret."""
    shares = _shares(3, 3)
    for third in (bytes(32), b"\xff" * 32, secrets.token_bytes(32)):
        assert len(combine({**shares, 3: third}, 3, _anything)) == 32
    assert len({combine({**shares, 3: secrets.token_bytes(32)}, 3, _anything) for _ in range(20)}) == 20


@pytest.mark.parametrize("change", ["bit", "other secret", "swapped members"])
def test_a_wrong_share_is_noticed(change: str) -> None:
    shares, other = _shares(3, 4), _shares(3, 4, bytes(32))
    del shares[1]  # since 1 + 2 + 3 = 0 in the field, the weights of these three are the same, and swapping them does nothing
    wrong = {
        "bit": {2: bytes([shares[2][0] ^ 1]) + shares[2][1:]},
        "other secret": {2: other[2]},
        "swapped members": {2: shares[3], 3: shares[2]},
    }
    with pytest.raises(SecureSumError, match="do not give it, one of them is wrong; start the round anew"):
        combine(shares | wrong[change], 3, lambda secret: opens(secret, commitment(SECRET)))


@pytest.mark.parametrize("size", [0, 16, 31, 33])
def test_a_share_of_another_size_is_refused(size: int) -> None:
    with pytest.raises(SecureSumError, match="a share is not of 32 bytes"):
        combine(_shares(2, 2) | {2: bytes(size)}, 2, _anything)


def test_members_are_numbered_from_one() -> None:
    with pytest.raises(ValueError, match="numbered from 1"):
        combine({0: bytes(32), 1: bytes(32)}, 2, _anything)


@pytest.mark.parametrize(
    ("secret", "threshold", "count"), [(bytes(16), 2, 3), (bytes(33), 2, 3), (SECRET, 1, 3), (SECRET, 0, 3), (SECRET, 4, 3)]
)
def test_what_cannot_be_split(secret: bytes, threshold: int, count: int) -> None:
    with pytest.raises(ValueError, match="a secret of 32 bytes and 2 <= threshold <= count"):
        split(secret, threshold, count)


def test_shares_are_drawn_anew_each_time() -> None:
    assert not set(split(SECRET, 2, 5)) & set(split(SECRET, 2, 5))


def test_a_commitment_fits_one_secret() -> None:
    assert len(commitment(SECRET)) == 32
    assert opens(SECRET, commitment(SECRET))
    assert not opens(bytes(32), commitment(SECRET))
    assert not opens(SECRET, commitment(SECRET)[:16])
