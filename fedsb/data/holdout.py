"""Examples held out of a train split, to choose settings by without a look at the test set."""

from collections.abc import Sequence

from fedsb.data.examples import Example
from fedsb.data.seeds import generator
from fedsb.errors import DataError


def hold_out(examples: Sequence[Example], share: float, source: str) -> tuple[list[Example], list[Example]]:
    """(what is left to train on, in its order; what is held out, shuffled): no prompt is in both.

    The draw follows from the number of examples alone, so runs of all seeds hold out the same. An example whose prompt is held
    out with another is in neither, since scoring on what was trained on would flatter.

    Args:
        share: of the examples, 0 < share < 1; rounded to a whole number.
        source: where they come from, for the error.

    Raises DataError if that leaves nothing on one of the two sides.
    """
    order = generator("hold-out").permutation(len(examples)).tolist()
    chosen = order[: round(share * len(examples))]
    held = {examples[i].prompt: examples[i] for i in chosen}
    kept = [example for example in examples if example.prompt not in held]
    if not held or not kept:
        side = "held out" if not held else "left to train on"
        raise DataError(f"{source}: of its {len(examples)} train examples none is {side} by data.validation = {share}; change it")
    return kept, list(held.values())
