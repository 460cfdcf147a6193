"""Bases from a seed, from a matrix, or from the sketches of a matrix.

Every function returns orthonormal frames: BᵀB = AAᵀ = I. For such frames the plain gradient of the core is already the
best approximation of the full gradient (LoRA-SB, arXiv 2411.19557, theorem 3), so no custom optimiser is needed.
"""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fedsb.basis.frames import Basis
from fedsb.errors import BasisError

OVERSAMPLING = 16  # extra columns of the randomised SVD (Halko et al., arXiv 0909.4061, section 4.2)
ITERATIONS = 4  # its power iterations: W0's spectrum decays slowly


def check_rank(shapes: Mapping[str, tuple[int, int]], rank: int) -> None:
    """Raise BasisError if `rank` exceeds the smallest side of any layer (out, in)."""
    name, smallest = min(((name, min(shape)) for name, shape in shapes.items()), key=lambda item: item[1])
    if rank > smallest:
        raise BasisError(
            f"adapter.rank = {rank} is larger than the smallest side of layer {name}, which is {smallest}; "
            f"lower the rank to {smallest} or leave that layer out of adapter.target_modules"
        )


def seeded(seed: int, *role: str) -> torch.Generator:
    """A CPU generator for one role of one seed; the same on every machine."""
    digest = hashlib.sha256("\0".join([str(seed), *role]).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def random_orthonormal(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """A (rows, columns) fp32 matrix with orthonormal columns, uniformly distributed.

    Drawn and factored in fp64, so that different LAPACKs agree after rounding to fp32 or bf16 in all but the rarest
    case; the fingerprint tells when they do not.
    """
    gaussian = torch.randn(rows, columns, dtype=torch.float64, generator=generator)
    q, r = torch.linalg.qr(gaussian)
    signed: Tensor = q * r.diagonal().sign()
    return signed.to(torch.float32)


def random_basis(shapes: Mapping[str, tuple[int, int]], rank: int, seed: int) -> Basis:
    """Orthonormal frames from a seed: costs no bytes and touches no data. `shapes`: layer name → (out, in)."""
    check_rank(shapes, rank)
    return Basis(
        {name: random_orthonormal(out, rank, seeded(seed, "basis", name, "B")) for name, (out, _) in shapes.items()},
        {
            name: random_orthonormal(in_, rank, seeded(seed, "basis", name, "A")).T.contiguous()
            for name, (_, in_) in shapes.items()
        },
        {name: torch.zeros(rank, rank) for name in shapes},
    )


def heads_basis(shapes: Mapping[str, tuple[int, int]], rank: int, heads: int, seed: int) -> Basis:
    """The frames of `heads` heads of rank r side by side, from a seed: B (out, h·r), A (h·r, in), R0 left out.

    Orthonormal over all heads together where a side of a layer has room for them, so that no two heads move the same
    directions (RAVAN, arXiv 2506.05568: Gram-Schmidt); else each normal with the variance that gives columns a length of about 1.
    """
    check_rank(shapes, rank)

    def frame(size: int, generator: torch.Generator) -> Tensor:
        if heads * rank <= size:
            return random_orthonormal(size, heads * rank, generator)
        gaussian = torch.randn(size, heads * rank, dtype=torch.float64, generator=generator)
        scaled: Tensor = gaussian / size**0.5
        return scaled.to(torch.float32)

    return Basis(
        {name: frame(out, seeded(seed, "basis", name, "B")) for name, (out, _) in shapes.items()},
        {name: frame(in_, seeded(seed, "basis", name, "A")).T.contiguous() for name, (_, in_) in shapes.items()},
        {},
    )


def leading_frames(matrix: Tensor, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Leading singular triplets of a matrix (out, in): B (out, r), S (r,), A (r, in), all fp32.

    Randomised subspace iteration (Halko et al., arXiv 0909.4061, algorithm 4.4) with its own generator, so that no
    global random state is touched; cheaper than a full SVD by about min(out, in) / r.
    """
    matrix = matrix.detach().to(torch.float32)
    width = min(rank + OVERSAMPLING, *matrix.shape)
    probe = torch.randn(matrix.shape[1], width, generator=generator).to(matrix.device)
    left = torch.linalg.qr(matrix @ probe).Q
    for _ in range(ITERATIONS):
        right = torch.linalg.qr(matrix.T @ left).Q
        left = torch.linalg.qr(matrix @ right).Q
    u, s, vh = torch.linalg.svd(left.T @ matrix, full_matrices=False)
    return (left @ u[:, :rank]).contiguous(), s[:rank].contiguous(), vh[:rank].contiguous()


def weights_basis(layers: Mapping[str, nn.Module], rank: int, seed: int) -> Basis:
    """Leading singular vectors of each layer's frozen weight: LoRA-XS's subspace (arXiv 2405.17604), no data needed.

    LoRA-XS folds the singular values into one frame; here both frames stay orthonormal.
    """
    weights: dict[str, Tensor] = {name: layer.weight for name, layer in layers.items()}  # type: ignore[misc]
    check_rank({name: (w.shape[0], w.shape[1]) for name, w in weights.items()}, rank)
    frames = {name: leading_frames(w, rank, seeded(seed, "basis", name)) for name, w in weights.items()}
    return Basis(
        {name: b.cpu() for name, (b, _, _) in frames.items()},
        {name: a.cpu() for name, (_, _, a) in frames.items()},
        {name: torch.zeros(rank, rank) for name in frames},
    )


def frames_from_sketches(y: Tensor, z: Tensor, psi: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Leading singular triplets of G from its one-pass sketches, without G.

    Tropp et al., arXiv 1609.00048, algorithm 4: Q = orth(Y), X = (ΨQ)⁺Z, then the SVD of X.

    Args:
        y: (out, k) = GΩ.
        z: (l, in) = ΨG, with l > k.
        psi: (l, out).
        rank: r, at most k.

    Returns:
        B (out, r), S (r,), A (r, in), fp32.
    """
    q = torch.linalg.qr(y.to(torch.float64)).Q
    x = torch.linalg.lstsq(psi.to(torch.float64) @ q, z.to(torch.float64)).solution
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    return (q @ u[:, :rank]).float().contiguous(), s[:rank].float().contiguous(), vh[:rank].float().contiguous()
