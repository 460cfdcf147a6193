"""What methods and strategies can and cannot, by name: for settings, which know nothing of the code behind the names."""

from typing import Literal

Method = Literal[
    "lora-sb",
    "lora-xs",
    "nested-sb",
    "refreshed-sb",
    "ravan",
    "lora",
    "ffa-lora",
    "fedsa-lora",
    "fedex-lora",
    "flora-stacking",
    "hetlora",
    "flexlora",
    "lora-ga",
    "dylora",
    "miss",
    "bone",
    "bone-row",
    "flora",
    "flora-ones",
    "nola",
    "galore",
    "lopa",
    "lorafusion",
    "lorafusion-product",
]

HEADS = 4  # of RAVAN, as in its paper's tables
RANKS = {"lopa": 1}  # methods with another rank by default than `adapter.rank` says
BASES = 128  # random matrices of NOLA on each side, as its paper has for a model of 7B
IN_TURN = ("refreshed-sb",)  # methods whose heads are trained one after another
PROMPTING = ("lopa",)  # methods with a prompt for each instance, which an encoder looks at
FUSING = ("lorafusion", "lorafusion-product")  # methods that mix a pool of adapters
HEADED = ("ravan", *IN_TURN, *FUSING)  # methods with `adapter.heads`
RANKED_LORA = ("hetlora", "flexlora")  # methods whose mean needs each client's own factors
RANKED = ("nested-sb", "flora-stacking", *RANKED_LORA)  # methods whose clients may have different ranks
ANY = ("random", "weights", "public", "sketch")
SOURCES: dict[str, tuple[str, ...]] = {  # method → what `basis.source` may be, the default first; of others `random` alone
    "lora-sb": ANY,
    "nested-sb": ANY,
    "lora-xs": ("weights",),
    "lorafusion": ("pool",),
    "lorafusion-product": ("pool",),
    "lora-ga": ("sketch", "public"),
}
FOLDING = ("fedex-lora", "flora-stacking", "galore")  # methods that add to the weights after each round
SCALED = (  # methods that multiply an update by alpha / rank
    "lora",
    "ffa-lora",
    "fedsa-lora",
    "lora-xs",
    "lora-ga",
    "dylora",
    "flora",
    "nola",
    "fedex-lora",
    "flora-stacking",
    *RANKED_LORA,
)
NO_RECORDS = ("miss", "bone", "bone-row", "nola")  # methods whose trained numbers are in no module that Opacus knows
ROBUST = ("trimmed-mean", "median", "krum", "multi-krum")  # strategies that look at single states
MEANS = ("fedavg", "fedprox")  # strategies whose server takes a round's mean as it is
WHOLE = (*ROBUST, "scaffold", "fedbuff")  # strategies that count every number of a state alike
OPTIMISERS = ("fedadam", "fedyogi", "fedadagrad")  # strategies whose server takes steps of its own
OWN_METHOD = {  # of `[adapter]` → the method that has it
    "smallest_rank": "dylora",
    "draw": "dylora",
    "frozen": "dylora",
    "bases": "nola",
    "encoder": "lopa",
    "tokens": "lopa",
    "hidden": "lopa",
}
OWN_SETTINGS = {  # of `[strategy]` → the strategies that have it
    "mu": ("fedprox",),
    "rate": OPTIMISERS,
    "beta1": OPTIMISERS,
    "beta2": ("fedadam", "fedyogi"),
    "tau": OPTIMISERS,
    "concurrency": ("fedbuff",),
    "buffer": ("fedbuff",),
    "max_staleness": ("fedbuff",),
    "trim": ("trimmed-mean",),
    "hostile": ("krum", "multi-krum"),
    "keep": ("multi-krum",),
}
