"""Noise from the key stream: its distribution, its grid, and what it refuses."""

import math

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from scipy import stats

from fedsb.privacy.noise import CHUNK, GRID_BITS, KeyStream, add_noise

KEY = bytes(range(32))


def test_two_streams_differ_and_one_key_gives_one_stream() -> None:
    assert not np.array_equal(KeyStream().normal(8), KeyStream().normal(8))
    assert np.array_equal(KeyStream(KEY).normal(8), KeyStream(KEY).normal(8))


def test_the_stream_is_aes_in_counter_mode() -> None:
    raw = Cipher(algorithms.AES256(KEY), modes.CTR(bytes(16))).encryptor().update(bytes(80))
    expected = [((int.from_bytes(raw[i : i + 8], "little") >> 12) + 0.5) / 2**52 for i in range(0, 80, 8)]
    assert KeyStream(KEY).uniform(10).tolist() == expected


def test_uniform_numbers_are_uniform_and_never_0_or_1() -> None:
    drawn = KeyStream(KEY).uniform(200_000)
    assert drawn.min() > 0 and drawn.max() < 1
    assert stats.kstest(drawn, "uniform").pvalue > 1e-3


@pytest.mark.parametrize("count", [0, 1, 7, CHUNK + 1, 3 * CHUNK])
def test_normal_numbers_are_as_many_as_asked(count: int) -> None:
    drawn = KeyStream(KEY).normal(count)
    assert drawn.shape == (count,) and np.isfinite(drawn).all()


def test_normal_numbers_are_standard_normal_and_independent() -> None:
    drawn = KeyStream(KEY).normal(400_000)
    assert stats.kstest(drawn, "norm").pvalue > 1e-3
    for lag in (1, CHUNK // 2, CHUNK):  # partners in Box-Muller, and chunks
        assert abs(np.corrcoef(drawn[:-lag], drawn[lag:])[0, 1]) < 5 / math.sqrt(len(drawn))
        assert abs(np.corrcoef(drawn[:-lag] ** 2, drawn[lag:] ** 2)[0, 1]) < 5 / math.sqrt(len(drawn))


def test_a_poisson_sample_takes_each_by_itself() -> None:
    stream, counts = KeyStream(KEY), np.zeros(50)
    sizes = []
    for _ in range(4000):
        drawn = stream.poisson_sample(50, 0.1)
        assert drawn == sorted(set(drawn))
        counts[drawn] += 1
        sizes.append(len(drawn))
    assert abs(counts / 4000 - 0.1).max() < 5 * math.sqrt(0.09 / 4000)
    assert abs(np.mean(sizes) - 5) < 5 * math.sqrt(4.5 / 4000) and abs(np.var(sizes) - 4.5) < 0.6
    assert min(sizes) == 0  # as it must be now and then
    assert stream.poisson_sample(9, 1.0) == list(range(9)) and stream.poisson_sample(0, 0.5) == []


def test_noise_has_the_standard_deviation_asked() -> None:
    vector = torch.linspace(-3, 3, 100_000)
    noise = (add_noise(vector, 0.25, KeyStream(KEY)) - vector).numpy()
    assert stats.kstest(noise / 0.25, "norm").pvalue > 1e-3


@pytest.mark.parametrize("std", [1e-6, 0.25, 3.0, 1e5])
def test_what_is_noisy_lies_on_a_grid_far_finer_than_the_noise(std: float) -> None:
    noisy = add_noise(std * torch.rand(1000), std, KeyStream(KEY)).double()
    grid = 2.0 ** (math.floor(math.log2(std)) - GRID_BITS)
    assert std / 2**17 < grid <= std / 2**16
    small = noisy[noisy.abs() < grid * 2**23]  # what fp32 holds exactly
    assert len(small) > 0 and torch.equal(small / grid, (small / grid).round())


def test_std_0_adds_nothing() -> None:
    vector = torch.rand(5)
    assert torch.equal(add_noise(vector, 0.0, KeyStream(KEY)), vector)


@pytest.mark.parametrize("std", [-1.0, math.nan, math.inf])
def test_what_is_no_standard_deviation_is_refused(std: float) -> None:
    with pytest.raises(ValueError, match="no standard deviation"):
        add_noise(torch.zeros(1), std, KeyStream(KEY))


def test_an_empty_vector_stays_empty() -> None:
    assert add_noise(torch.zeros(0), 1.0, KeyStream(KEY)).shape == (0,)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_vector_that_is_not_finite_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match="no bounded sensitivity"):
        add_noise(torch.tensor([0.0, value]), 1.0, KeyStream(KEY))
