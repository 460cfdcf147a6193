import copy

import pytest
import torch

from fedsb.basis.frames import Basis, fingerprint_of
from fedsb.basis.spectral import random_basis
from fedsb.errors import BasisError
from tests.basis.samples import SHAPES


def _of(change: str) -> str:
    basis = random_basis(SHAPES, 3, 0)
    b, a = copy.deepcopy(basis.B), copy.deepcopy(basis.A)
    if change == "name":
        b["wides"], a["wides"] = b.pop("wide"), a.pop("wide")
    elif change == "shape":
        b["wide"] = b["wide"].reshape(8, 6)
    elif change == "dtype":  # the same bytes
        b["wide"] = b["wide"].view(torch.int32)
    elif change == "byte of B":
        b["tall"].view(torch.int32)[1, 1] ^= 1
    elif change == "byte of A":
        a["tall"].view(torch.int32)[2, 5] ^= 1
    elif change == "sign of zero":
        a["tall"][0, 0] = -0.0
    elif change == "zero":
        a["tall"][0, 0] = 0.0
    elif change == "sides":
        b["square"], a["square"] = a["square"], b["square"]
    elif change == "layers":
        b["tall"], b["wide"] = b["wide"], b["tall"]
    elif change == "fewer":
        del b["wide"], a["wide"]
    elif change == "bf16":
        return basis.to(torch.bfloat16).fingerprint
    elif change == "order":
        b = dict(reversed(b.items()))
    return fingerprint_of(b, a)


def test_a_fingerprint_changes_with_anything_that_counts() -> None:
    changes = [
        "",
        "name",
        "shape",
        "dtype",
        "byte of B",
        "byte of A",
        "sign of zero",
        "zero",
        "sides",
        "layers",
        "fewer",
        "bf16",
    ]
    assert len({_of(change) for change in changes}) == len(changes)


def test_a_fingerprint_does_not_change_with_the_order_or_the_memory_layout() -> None:
    basis = random_basis(SHAPES, 3, 0)
    assert _of("order") == basis.fingerprint == _of("")
    strided = {name: t.T.contiguous().T for name, t in basis.B.items()}
    assert not strided["wide"].is_contiguous()
    assert fingerprint_of(strided, basis.A) == basis.fingerprint


def test_r0_is_not_part_of_the_fingerprint() -> None:
    basis = random_basis(SHAPES, 3, 0)
    other = Basis(basis.B, basis.A, {name: r0 + 1 for name, r0 in basis.R0.items()})
    assert other.fingerprint == basis.fingerprint


def test_a_fingerprint_is_the_sha256_that_the_docstring_says() -> None:
    import hashlib

    b, a = torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0, 4.0, 5.0]]).bfloat16()
    text = b"l:B:(2, 1):torch.float32;" + b.numpy().tobytes()
    text += b"l:A:(1, 3):torch.bfloat16;" + a.view(torch.int16).numpy().tobytes()
    assert fingerprint_of({"l": b}, {"l": a}) == hashlib.sha256(text).hexdigest()


@pytest.mark.parametrize("rank", [1, 2, 16])
def test_every_rank_has_a_fingerprint(rank: int) -> None:
    assert len(random_basis(SHAPES, rank, 0).fingerprint) == 64


def test_size_and_rank_of_a_basis() -> None:
    basis = random_basis(SHAPES, 3, 0)
    numbers = 3 * sum(out + width for out, width in SHAPES.values())
    assert (basis.rank, basis.nbytes) == (3, 4 * numbers)
    halved = basis.to(torch.bfloat16)
    assert halved.nbytes == 2 * numbers
    assert {t.dtype for t in (*halved.B.values(), *halved.A.values())} == {torch.bfloat16}
    assert {t.dtype for t in halved.R0.values()} == {torch.float32}


def test_a_basis_may_have_a_alone_or_nothing() -> None:
    whole = random_basis(SHAPES, 3, 0)
    half, none = Basis({}, whole.A, {}), Basis({}, {}, {})
    assert (half.rank, none.rank, none.nbytes) == (3, None, 0)
    assert len({whole.fingerprint, half.fingerprint, none.fingerprint}) == 3


def test_parts_that_do_not_fit_together_are_refused() -> None:
    basis = random_basis(SHAPES, 3, 0)
    with pytest.raises(BasisError, match="for the same layers, or has no B and R0 at all"):
        Basis({}, basis.A, basis.R0)
    with pytest.raises(BasisError, match="for the same layers"):
        Basis(basis.B, {name: a for name, a in basis.A.items() if name != "tall"}, basis.R0)
    for part, name in (("B", "wide"), ("A", "tall"), ("R0", "square")):
        parts = {"B": dict(basis.B), "A": dict(basis.A), "R0": dict(basis.R0)}
        parts[part][name] = torch.zeros(4, 4)
        with pytest.raises(BasisError, match=f"layer {name}: .* do not fit together; rebuild"):
            Basis(**parts)
