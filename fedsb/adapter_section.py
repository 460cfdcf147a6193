"""The section of a configuration that says what is trained; the other sections are in `sections.py`."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from fedsb.abilities import BASES, FUSING, HEADED, HEADS, OWN_METHOD, PROMPTING, SCALED, Method
from fedsb.sections import PositiveFloat, PositiveInt, Section, SiteName


class AdapterSection(Section):
    """`[adapter]`: what is trained."""

    method: Method = Field("lora-sb", description="the way of adapting, a row of docs/methods.md")
    rank: PositiveInt = Field(
        64,
        description="r: a core or a head has r x r numbers, LoRA's factors r x in and out x r; Bone's blocks are r x r, so r "
        "must divide both sides of every layer; of `lopa` the gate's, by default 1",
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
    encoder: str = Field(
        "minilm-l6-v2",
        description="the frozen sentence encoder that looks at each prompt; named as `model.source` is (only `lopa`)",
    )
    tokens: PositiveInt = Field(10, le=512, description="length of the soft prompt, in tokens (only `lopa`)")
    hidden: PositiveInt = Field(256, le=8192, description="width of the two networks behind the encoder (only `lopa`)")
    target_modules: Literal["all-linear"] | Annotated[tuple[str, ...], Field(strict=False, min_length=1)] = Field(
        "all-linear", description="names of the linear layers to adapt; all of them except the output head"
    )

    @model_validator(mode="after")
    def _consistent(self) -> "AdapterSection":
        if self.method in FUSING and self.heads is None:
            raise ValueError(f'adapter.method = "{self.method}" needs adapter.heads, how many adapters basis.pool holds; set it')
        if self.method not in SCALED and self.alpha is not None:
            raise ValueError(f'adapter.alpha scales LoRA, and adapter.method = "{self.method}" has no scale; drop it')
        if self.method not in HEADED and self.heads is not None:
            raise ValueError(
                f'adapter.heads are those of {", ".join(HEADED)}, and adapter.method = "{self.method}" has none; drop them'
            )
        for key, method in OWN_METHOD.items():
            if self.method != method and getattr(self, key) != AdapterSection.model_fields[key].default:
                raise ValueError(f'adapter.{key} is of {method}, and adapter.method = "{self.method}" has none; drop it')
        if self.method in PROMPTING and self.target_modules != "all-linear":
            raise ValueError(f'adapter.method = "{self.method}" adapts no linear layer; drop adapter.target_modules')
        if self.smallest_rank > self.rank:
            raise ValueError("adapter.smallest_rank is larger than adapter.rank; lower it")
        return self
