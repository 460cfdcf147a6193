"""Is a batch in which every row has an adapter of its own faster with FLoRA or with LoRA?

    python -m benchmarks.flora_cost

The paper (arXiv 2312.05677, section 3.3) counts, for b·l tokens through a layer of width d at rank r,

    LoRA by two batched products     2·c1·(d·b·l·r) + c2·(b·l·d²)
    FLoRA by one product             c2·(r·b·l·d²)

with c1 and c2 the seconds of a multiplication in a batched and in a plain product, so that FLoRA is the faster one iff
2·c1/(d·c2) + 1/r ≥ 1. Here c1 and c2 are measured, and so are both layers, in turns: LoRA as the paper's appendix B.1 has it
(adapters of the rows gathered, two torch.bmm), FLoRA as `fedsb.adapters.flora.batched` of the form "ones". Both gather from
a table of adapters for each call. The rule leaves out what is multiplied entry by entry.
"""

import argparse
import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.harness import figure, in_turns, median, report, say, seconds
from fedsb.adapters.flora import batched

ADAPTERS = 64


def main(arguments: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", default="256,576,1024,2048")
    parser.add_argument("--ranks", default="1,2,4,8")
    parser.add_argument("--rows", type=int, default=16, help="of a batch, each with an adapter of its own")
    parser.add_argument("--tokens", default="1,32", help="of a row: 1 is decoding")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--turns", type=int, default=15)
    options = parser.parse_args(arguments)
    widths, ranks = (tuple(map(int, text.split(","))) for text in (options.widths, options.ranks))
    dtype = torch.bfloat16 if options.dtype == "bf16" else torch.float32
    figures = {}
    for tokens in map(int, options.tokens.split(",")):
        say(f"\n{options.rows} rows of {tokens} tokens: seconds of FLoRA / of LoRA (as the rule has it)")
        say("rank " + "".join(f"{f'width {width}':>18}" for width in widths))
        for rank in ranks:
            cells = []
            for width in widths:
                measured, ruled, found = ratios(options.rows, tokens, width, rank, dtype, options.turns)
                cells.append(f"{measured:8.2f} ({ruled:7.2f})")
                figures[f"tokens_{tokens}_rank_{rank}_width_{width}"] = figure(
                    measured, "ratio", ours=found["flora"], peer=found["lora"], rule=ruled
                )
            say(f"{rank:4} " + "".join(f"{cell:>18}" for cell in cells))
    report("flora_cost", figures)


@torch.inference_mode()
def ratios(
    rows: int, tokens: int, width: int, rank: int, dtype: torch.dtype, turns: int
) -> tuple[float, float, dict[str, float]]:
    """Seconds of FLoRA by those of LoRA, as measured and by the rule with the c1 and c2 of this cell; the seconds, by name."""
    draw = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw).to(dtype)

    x, weight = drawn(rows, tokens, width), drawn(width, width)
    index = torch.randint(ADAPTERS, (rows,), generator=draw)
    a, b = drawn(ADAPTERS, rank, width), drawn(ADAPTERS, rank, width)
    down, up = drawn(ADAPTERS, width, rank), drawn(ADAPTERS, rank, width)
    gathered, narrow = down[index], drawn(rows, tokens, rank)
    up_gathered = up[index]
    calls: dict[str, Callable[[], Tensor]] = {
        "flora": lambda: batched(x, functools.partial(functional.linear, weight=weight), a[index], b[index]),
        "lora": lambda: functional.linear(x, weight) + torch.bmm(torch.bmm(x, down[index]), up[index]),
        "bmm": lambda: torch.bmm(x, gathered),
        "bmm_up": lambda: torch.bmm(narrow, up_gathered),
        "plain": lambda: functional.linear(x, weight),
    }
    times = in_turns({name: functools.partial(seconds, call) for name, call in calls.items()}, turns)
    found = {name: median(values) for name, values in times.items()}
    products = found["bmm"] + found["bmm_up"]  # 2·c1·(d·b·l·r)
    return found["flora"] / found["lora"], rank * found["plain"] / (products + found["plain"]), found


if __name__ == "__main__":
    main()
