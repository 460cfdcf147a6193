"""The mean under client-level differential privacy: clipped updates, noise on their sum, a divisor that is fixed beforehand.

    R ← R + (Σ_i clip(R_i - R, C) + N(0, σ²C² I)) / (q · N)

McMahan, Ramage, Talwar, Zhang, "Learning differentially private recurrent language models", arXiv 1710.06963, algorithm 1,
with a fixed denominator (their f̃_f).
"""

import torch
from torch import Tensor

from fedsb.privacy.clipping import clip
from fedsb.privacy.mechanism import Mechanism
from fedsb.privacy.noise import KeyStream, add_noise


class PrivateMean:
    """One round's private mean, over clients' states as they come; memory does not grow with their number.

    Guarantees:
        - one client moves the sum by at most `mechanism.clip_norm`, whatever it sends.
        - the divisor is the planned number of clients `expected`, not how many answered, which would be private.
        - `result` draws noise anew at each call, and each call is a release: call it once.

    | case | result |
    |---|---|
    | nobody answered | the sent state plus noise |
    | an update of norm zero | adds zero |
    | a state with NaN or infinity | adds zero (the caller has refused it before) |
    | a state of another size | ValueError |

    Args:
        sent: the state (size,) that the clients began with.
        mechanism: of the run.
        expected: clients that take part in a round on average.
        stream: where the noise comes from.
    """

    def __init__(self, sent: Tensor, mechanism: Mechanism, expected: float, stream: KeyStream) -> None:
        self.sent, self.mechanism, self.expected, self.stream = sent.to(torch.float32), mechanism, expected, stream
        self.count = 0
        self._sum = torch.zeros(len(sent), dtype=torch.float64)

    def add(self, vector: Tensor) -> None:
        """Count one client's state (size,)."""
        if vector.shape != self.sent.shape:
            raise ValueError(f"a vector of {len(self.sent)} numbers was expected, not {tuple(vector.shape)}")
        self._sum += clip(vector - self.sent, self.mechanism.clip_norm).vector
        self.count += 1

    def result(self) -> Tensor:
        """The new state (size,), fp32."""
        std = self.mechanism.noise_multiplier * self.mechanism.clip_norm
        return self.sent + add_noise(self._sum, std, self.stream) / self.expected
