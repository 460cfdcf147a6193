"""The section of a configuration that says what is trained; the other sections are in `sections.py`."""

from typing import Annotated, Literal

from pydantic import Field

from fedsb.abilities import BASES, HEADS, Method
from fedsb.sections import PositiveFloat, PositiveInt, Section, SiteName


class AdapterSection(Section):
    """`[adapter]`: what is trained."""

    method: Method = Field("lora-sb", description="the way of adapting, a row of docs/methods.md")
    rank: PositiveInt = Field(
        64,
        description="r: a core or a head has r x r numbers, LoRA's factors r x in and out x r; Bone's blocks are r x r, so r "
        "must divide both sides of every layer",
    )
    ranks: dict[SiteName, PositiveInt] = Field(
        default_factory=dict,
        description="clients of a lower rank than `rank`, as a table: `ranks = {client-0 = 8}` (only for methods "
        "whose clients may have different ranks; docs/methods.md)",
    )
    nested: bool = Field(
        False,
        description="true: each training step uses leading blocks of a rank drawn from 1 to the client's, so that a trained core "
        "works when it is cut (only `nested-sb`)",
    )
    heads: PositiveInt | None = Field(
        None,
        description=f"heads of a layer, each of rank r (only `ravan`, and `refreshed-sb`: at most one a round; default {HEADS}); "
        "of `lorafusion` and `lorafusion-product`: how many adapters `basis.pool` holds",
    )
    smallest_rank: PositiveInt = Field(1, description="the smallest rank that is drawn (only `dylora`)")
    draw: Literal["step", "round"] = Field(
        "step",
        description="a rank drawn by each client for each step, or one for all in a round, as privacy needs it (only `dylora`)",
    )
    frozen: bool = Field(
        False, description="train only the last row and column of the rank that is drawn, not all up to it (only `dylora`)"
    )
    alpha: PositiveFloat | None = Field(
        None,
        description="LoRA's α: updates are scaled by α / rank (`lora-ga`: α / √rank); by default the rank (not for methods "
        "without a scale)",
    )
    bases: PositiveInt | None = Field(
        None, description=f"random matrices whose sum each of A and B is, and so numbers of each (only `nola`; default {BASES})"
    )
    target_modules: Literal["all-linear"] | Annotated[tuple[str, ...], Field(strict=False, min_length=1)] = Field(
        "all-linear", description="names of the linear layers to adapt; all of them except the output head"
    )
