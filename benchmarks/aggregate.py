"""The streaming mean of 10,000 updates: does memory stay constant, and how near is it to the memory's bandwidth?

    python -m benchmarks.aggregate

`memory_growth`: peak memory of a process that averages 10,000 updates over that of one that averages 100; every update is
a fresh vector that is dropped after it was counted. `memory_growth_net` is the same beyond the imports.

`bandwidth_share`: bytes that `Mean.add` moves per second (each number of an update is read, 4 bytes, and its fp64 sum
read and written, 16) over the bandwidth of this machine, the best of four kernels on arrays far larger than the cache, in
the way in which STREAM counts: copy with one thread and with all, triad, and adding in place. `bandwidth_share_read`
counts only what must come from memory if the sum stays in the cache, the 4 bytes a number. Updates come from a pool that is
twice as large as the last-level cache, so that none is in the cache when its turn comes.
"""

import argparse
import itertools
import json
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import psutil
import torch
from torch import Tensor

from benchmarks.harness import Peak, child, figure, in_turns, last_level_cache, median, report, resident, say, seconds
from fedsb.aggregation.mean import Mean

SMOLLM2_RANK_64 = 210 * 64 * 64  # 30 layers of seven linears
FEW = 100  # updates that the memory of many is held against
BYTES_MOVED, BYTES_READ = 20, 4  # a number: fp32 read, fp64 sum read and written; fp32 read alone
WEIGHT = 37.0


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=10_000, help="updates to average")
    parser.add_argument("--size", type=int, default=SMOLLM2_RANK_64, help="numbers in an update")
    parser.add_argument("--pool", type=int, default=0, help="bytes of updates to rotate through; 0: twice the cache")
    parser.add_argument("--stream", type=int, default=0, help="bytes of an array of the bandwidth test; 0: as the pool")
    parser.add_argument("--turns", type=int, default=20, help="turns in which ours and the bandwidth test alternate")
    parser.add_argument("--memory-of", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.memory_of is not None:
        print(json.dumps(memory_of(options.memory_of, options.size)))
        return
    pool = options.pool or min(2 * last_level_cache(), psutil.virtual_memory().available // 8)
    figures = memory(options.updates, options.size)
    figures |= bandwidth(options.updates, options.size, pool, options.stream or pool, options.turns)
    report("aggregate", figures)


def memory(updates: int, size: int) -> dict[str, dict[str, object]]:
    """Peak memory of many updates against few, each in its own process."""
    few, many = (child("benchmarks.aggregate", "--memory-of", str(count), "--size", str(size)) for count in (FEW, updates))
    say(f"peak memory: {few['peak'] / 1e6:.1f} MB for {FEW} updates, {many['peak'] / 1e6:.1f} MB for {updates}")
    net = {name: result["peak"] - result["base"] for name, result in (("few", few), ("many", many))}
    return {
        "memory_growth": figure(many["peak"] / few["peak"], "x", ours=many["peak"], peer=few["peak"], updates=[updates, FEW]),
        "memory_growth_net": figure(net["many"] / max(net["few"], 1), "x", ours=net["many"], peer=net["few"]),
    }


def memory_of(updates: int, size: int) -> dict[str, int]:
    """Average `updates` fresh vectors in this process: its peak, and what it held before."""
    source, base = torch.randn(size), resident()
    with Peak() as peak:
        mean = Mean(size)
        for number in range(updates):
            vector = source.clone()
            vector[0] = number
            mean.add(vector, WEIGHT)
        result = mean.result()
    assert abs(float(result[0]) - (updates - 1) / 2) <= 1e-6 * updates
    return {"peak": peak.bytes, "base": base}


def bandwidth(updates: int, size: int, pool: int, stream: int, turns: int) -> dict[str, dict[str, object]]:
    """Ours and the machine's bandwidth in turns."""
    vectors = [torch.randn(size) for _ in range(max(2, pool // (4 * size)))]
    endless = itertools.cycle(vectors)
    runs = {"ours": lambda: _adding(endless, size, max(1, updates // turns)), **_kernels(stream // 4)}
    rates = {name: median(values) for name, values in in_turns(runs, turns).items()}
    for name, rate in rates.items():
        say(f"{name:12s} {rate / 1e9:7.2f} GB/s")
    machine = max(rate for name, rate in rates.items() if name != "ours")
    read = rates["ours"] * BYTES_READ / BYTES_MOVED
    return {
        "bandwidth_share": figure(
            rates["ours"] / machine,
            "share",
            ours=rates["ours"],
            peer=machine,
            kernels={name: round(rate) for name, rate in rates.items() if name != "ours"},
            pool_bytes=len(vectors) * size * 4,
            seconds_per_update=BYTES_MOVED * size / rates["ours"],
        ),
        "bandwidth_share_read": figure(read / machine, "share", ours=read, peer=machine),
    }


def _adding(vectors: Iterator[Tensor], size: int, updates: int) -> float:
    """Bytes a second of `updates` additions."""
    mean = Mean(size)
    spent = seconds(lambda: [mean.add(next(vectors), WEIGHT) for _ in range(updates)])
    return BYTES_MOVED * size * updates / spent


def _kernels(numbers: int) -> dict[str, Callable[[], float]]:
    """Bandwidth kernels on fp32 arrays: bytes a second, by name."""
    a, b, c = (torch.full((numbers,), float(value)) for value in (1, 2, 3))
    one, two = a.numpy(), b.numpy()
    size = 4 * numbers
    return {
        "copy": lambda: 2 * size / seconds(lambda: np.copyto(two, one)),  # one thread, past the cache
        "copy, torch": lambda: 2 * size / seconds(lambda: b.copy_(a)),
        "triad": lambda: 3 * size / seconds(lambda: torch.add(a, b, alpha=3.0, out=c)),
        "add in place": lambda: 3 * size / seconds(lambda: c.add_(a)),
    }


if __name__ == "__main__":
    main()
