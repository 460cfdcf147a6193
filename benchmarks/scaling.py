"""What a run costs with models and federations that do not fit here, by formula: the tables of docs/scaling.md.

    python -m benchmarks.scaling

Every formula is held against a measurement by tests/benchmarks/test_scaling.py. Words: L layers, d hidden size, f intermediate
size, q and k numbers of a token's queries and of its keys, V vocabulary, r rank, w bytes of a weight (2 or 4).
"""

from collections.abc import Sequence
from dataclasses import dataclass

CHUNK = 1 << 23  # numbers of `fedsb.training.loss.CHUNK_NUMBERS`


@dataclass(frozen=True)
class Decoder:
    """A model of Llama's kind, all seven linears of a layer adapted.

    Attributes:
        queries, keys: numbers of one token's queries, and of its keys (as many as its values).
        tied: whether the output head is the embedding.
    """

    name: str
    layers: int
    hidden: int
    intermediate: int
    queries: int
    keys: int
    heads: int
    vocabulary: int
    tied: bool

    @property
    def linears(self) -> Sequence[tuple[int, int]]:
        """(out, in) of the linears of one layer: q, k, v, o, gate, up, down."""
        d, f, q, k = self.hidden, self.intermediate, self.queries, self.keys
        return (q, d), (k, d), (k, d), (d, q), (f, d), (f, d), (d, f)

    @property
    def adapted(self) -> int:
        """Weights of all adapted linears."""
        return self.layers * sum(out * into for out, into in self.linears)

    @property
    def parameters(self) -> int:
        """All weights: the linears, two norms a layer and one more, embedding, head."""
        embedding = self.vocabulary * self.hidden
        return self.adapted + (2 * self.layers + 1) * self.hidden + embedding * (1 if self.tied else 2)


MODELS = (
    Decoder("SmolLM2-135M", 30, 576, 1536, 576, 192, 9, 49_152, True),
    Decoder("Llama-3.2-1B", 16, 2048, 8192, 2048, 512, 32, 128_256, True),
    Decoder("Llama-3.1-8B", 32, 4096, 14_336, 4096, 1024, 32, 128_256, False),
    Decoder("Llama-3.1-70B", 80, 8192, 28_672, 8192, 1024, 64, 128_256, False),
)


def core_numbers(model: Decoder, rank: int) -> int:
    """Numbers that a client trains and sends: L · 7 · r²."""
    return model.layers * len(model.linears) * rank**2


def lora_numbers(model: Decoder, rank: int) -> int:
    """The same of LoRA, and of a basis (B, A): L · Σ r · (in + out)."""
    return model.layers * sum(rank * (out + into) for out, into in model.linears)


def fedex_numbers(model: Decoder, rank: int, clients: int) -> int:
    """Numbers of the residual that FedEx-LoRA sends each client after a round, besides the mean of A and B: factors of rank
    (clients - 1) · r."""
    return (clients - 1) * lora_numbers(model, rank)


def step_flops(model: Decoder, rank: int) -> int:
    """Floating point operations of a training step for each token, but for attention's own products.

    Forward 2 a weight, backward 2 more for the gradient towards the input, none for that of frozen weights; not towards the
    input of the first layer's q, k and v, before which nothing is trained. The head's two products are both in the forward pass.
    """
    d, q, k = model.hidden, model.queries, model.keys
    first = 2 * d * (q + 2 * k) + 6 * rank * d
    adapters = sum(2 * (2 * rank * (out + into + rank)) + 2 * rank**2 for out, into in model.linears)
    return 4 * model.adapted + 4 * model.vocabulary * d + model.layers * adapters - first - 6 * rank**2


def attention_flops(model: Decoder, tokens: int) -> int:
    """Operations of attention's own products for each token of a causal sequence: forward, and 2.5 times that backward."""
    return int(3.5 * model.layers * 2 * tokens * model.queries)


def activation_bytes(model: Decoder, rank: int, width: int) -> int:
    """Bytes that the forward pass keeps for each token: w · (3f + 2q + 2k) + 8d + 4 · 7r + 4 · heads + 8 a layer, and w · d.

    No input of a frozen linear is kept, A·x (fp32) in its stead; what a norm sees is in fp32 whatever the weights are.
    """
    d, f, q, k = model.hidden, model.intermediate, model.queries, model.keys
    kept = width * (3 * f + 2 * q + 2 * k) + 8 * d + 4 * len(model.linears) * rank + 4 * model.heads + 8
    return model.layers * kept + width * d


def client_bytes(model: Decoder, rank: int, width: int, tokens: int) -> dict[str, int]:
    """Memory of a client that trains with so many tokens at one time (microbatch times length): what, in bytes."""
    return {
        "weights": width * model.parameters,
        "basis": 2 * lora_numbers(model, rank),
        "cores, gradients, AdamW": 16 * core_numbers(model, rank),
        "activations": tokens * activation_bytes(model, rank, width),
        "logits": min(CHUNK, tokens * model.vocabulary) * (2 * width + 4),
    }


def server_bytes(model: Decoder, rank: int) -> int:
    """Memory of the server's mean, however many clients there are: the sum and its quotient in fp64, the mean, the last reply
    and the state that was sent in fp32. Replies that are ready at one look come besides."""
    return (8 + 8 + 4 + 4 + 4) * core_numbers(model, rank)


def models_table(rank: int = 64) -> list[str]:
    """What travels."""
    lines = [
        f"| rank {rank} | a client sends and gets, fp32 | bf16 | LoRA {rank} sends | FedEx-LoRA {rank} gets, 5 clients a round "
        "| basis (bf16), once, if it is sent |",
        "|---|---|---|---|---|---|",
    ]
    for model in MODELS:
        cores, lora, fedex = core_numbers(model, rank), lora_numbers(model, rank), fedex_numbers(model, rank, 5)
        cells = (_bytes(4 * cores), _bytes(2 * cores), _bytes(4 * lora), _bytes(4 * (lora + fedex)), _bytes(2 * lora))
        lines.append(f"| {model.name} | {' | '.join(cells)} |")
    return lines


def memory_table(rank: int = 64, width: int = 2, tokens: int = 4096) -> list[str]:
    """What a client holds."""
    parts = [client_bytes(model, rank, width, tokens) for model in MODELS]
    lines = [f"| rank {rank}, bf16, {tokens:,} tokens at one time | {' | '.join(parts[0])} | sum |", "|---|" + "---|" * 6]
    for model, held in zip(MODELS, parts, strict=True):
        lines.append(f"| {model.name} | {' | '.join(map(_bytes, held.values()))} | {_bytes(sum(held.values()))} |")
    return lines


def time_table(rank: int = 64, tokens: int = 512, rows: int = 16, steps: int = 20) -> list[str]:
    """What a round takes a client, on a device that reaches so many operations a second."""
    reached = {"0.1 TFLOP/s": 1e11, "10 TFLOP/s": 1e13, "100 TFLOP/s": 1e14, "400 TFLOP/s": 4e14}
    lines = [
        f"| {steps} steps of {rows} × {tokens} tokens | operations | {' | '.join(reached)} | its bytes at 10 Mbit/s each way |",
        "|---|---|" + "---|" * (len(reached) + 1),
    ]
    for model in MODELS:
        work = steps * rows * tokens * (step_flops(model, rank) + attention_flops(model, tokens))
        wire = 2 * 4 * core_numbers(model, rank) * 8 / 1e7
        cells = [_seconds(work / rate) for rate in reached.values()]
        lines.append(f"| {model.name} | {work:.2g} | {' | '.join(cells)} | {_seconds(wire)} |")
    return lines


def sites_table(rank: int = 64) -> list[str]:
    """What a server moves a round, each way, and holds."""
    counts = (10, 100, 1_000, 10_000)
    heads = " | ".join(f"{count:,} sites a round" for count in counts)
    lines = [f"| rank {rank}, fp32 | {heads} | memory of the mean | adapters of 10,000 |", "|---|" + "---|" * 6]
    for model in MODELS:
        size = 4 * core_numbers(model, rank)
        cells = [_bytes(count * size) for count in counts]
        lines.append(f"| {model.name} | {' | '.join(cells)} | {_bytes(server_bytes(model, rank))} | {_bytes(10_000 * size)} |")
    return lines


def tables() -> str:
    """All tables, in the order of docs/scaling.md."""
    return "\n\n".join("\n".join(table()) for table in (models_table, memory_table, time_table, sites_table))


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def _seconds(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 7200 else f"{seconds / 3600:.3g} h"


if __name__ == "__main__":
    print(tables())
