"""The sections of a configuration: every setting with its type, default and meaning.

Each field's description is what `docs/configuration.md` says about it; a test compares the two.
"""

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

PositiveInt = Annotated[int, Field(gt=0)]
NaturalInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(gt=0, le=1)]
Share = Annotated[float, Field(gt=0, lt=1)]
SITE_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")  # of a client, a task or a run; safe as a folder
SiteName = Annotated[str, Field(pattern=rf"^{SITE_NAME.pattern}$")]
CLIENT = "{client}"  # in the folder of a `jsonl:` or `commonvoice:` source: the name of the client that reads it


class Section(BaseModel):
    """Base of all sections: frozen, strict about types, and without unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class ModelSection(Section):
    """`[model]`: the frozen base model."""

    source: str = Field(
        "smollm2-135m-instruct",
        description="a hub id, a folder, a `.gguf` file, `package:NAME` (a file that the Python package NAME carries), "
        "or a short name: `smollm2-135m-instruct`, `minilm-l6-v2`",
    )
    kind: Literal["causal", "classification", "speech"] = Field(
        "causal",
        description="`causal` for language models, `classification` for sequence classification, `speech` for speech recognition "
        "with Whisper-type models",
    )
    dtype: Literal["auto", "bf16", "fp32"] = Field(
        "auto",
        description="dtype of the frozen weights; `auto`: bf16 on GPUs and on CPUs with AMX or AVX-512 BF16, fp32 on CPUs "
        "without, which multiply bf16 slower",
    )


class TaskSection(Section):
    """`[[data.tasks]]` and `[basis.public]`: where examples come from."""

    name: SiteName = Field(description="the name of the task in tables")
    source: str = Field(
        description="`gym:NAME` (a reasoning-gym data set), `jsonl:FOLDER` (with train.jsonl and test.jsonl; `{client}` in it "
        'stands for the client\'s name, only with `data.partition = "own"`), `hub:ID` (a Hugging Face data set with the '
        "splits train and test), `commonvoice:FOLDER` (train.tsv, test.tsv and clips; `{client}` as in `jsonl:`), or "
        "`code:humaneval`"
    )
    options: dict[str, int | float | str | bool] = Field(
        default_factory=dict, description="options of the reasoning-gym data set, or the `name` of a hub data set"
    )
    train: PositiveInt | None = Field(None, description="training examples at the most (required for `gym:`)")
    test: PositiveInt | None = Field(None, description="test examples at the most (required for `gym:`)")


class DataSection(Section):
    """`[data]`: the tasks, and which of their examples each client holds."""

    tasks: tuple[TaskSection, ...] = Field(strict=False, min_length=1, description="the tasks, as `[[data.tasks]]`")
    partition: Literal["task", "iid", "dirichlet", "size", "own"] = Field(
        "iid",
        description="`task`: client i holds task i modulo the number of tasks; `iid`: shuffled and dealt out evenly; "
        "`dirichlet`: shares of each label (or task) drawn from Dirichlet(alpha); `size`: iid with sizes from "
        "Dirichlet(alpha); `own`: nothing is dealt out, each client holds all that its own sources have",
    )
    labels: tuple[Annotated[str, Field(min_length=1)], ...] = Field(
        (),
        strict=False,
        description="the labels of a classifier, in the order of its outputs; by default those of the task's train split, "
        'sorted (required with `partition = "own"`, where the server reads no data)',
    )
    validation: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0,
        description="share of each task's train split that is held out before it is dealt, whatever the seed: nobody trains "
        'on it and `evaluation.split = "validation"` scores on it (at most `test` examples of a task)',
    )
    alpha: PositiveFloat = Field(0.5, description="concentration of the Dirichlet distribution; small is more skewed")
    max_length: PositiveInt = Field(256, description="tokens of an example; what is longer loses the beginning of its text")
    system_prompt: str | None = Field(None, description="system message put before each prompt of a chat model")


class BasisSection(Section):
    """`[basis]`: the frozen B and A that all clients share."""

    source: Literal["random", "weights", "public", "sketch", "pool"] = Field(
        "random",
        description="`random`: orthonormal from the seed, 0 bytes; `weights`: leading singular vectors of W0, no data; "
        "`public`: SVD of the first update, estimated at the server on public examples; `sketch`: from the sum of the clients' "
        "sketches of their first gradients, which with privacy is paid for like everything else; `pool`: frozen adapters. "
        "`lora-xs` has `weights` and no other, `lora-ga` `sketch` or `public`, `lorafusion` and `lorafusion-product` `pool`",
    )
    pool: str | None = Field(
        None, description='a folder of plain LoRA folders, as `fedsb export --all` writes it (only `source = "pool"`)'
    )
    r0: Literal["zero", "paper"] = Field(
        "zero", description="the core at the start: 0, or the paper's diag(S) of the estimated update (only `public`)"
    )
    eta: PositiveFloat = Field(
        1e-4,
        description='learning rate of the estimated first update, which scales the paper\'s R0 (only `r0 = "paper"`)',
    )
    sign: bool = Field(False, description="take the sign of the summed gradient, as the paper does (only `public`)")
    public: TaskSection | None = Field(None, description="the public examples, as `[basis.public]` (only `public`)")
    examples: PositiveInt = Field(64, description="examples used for the estimate: public ones, or of each client (`sketch`)")
    dtype: Literal["bf16", "fp32"] = Field("bf16", description="dtype in which B and A are kept and sent")


class TrainSection(Section):
    """`[train]`: what a client does in one round."""

    steps: PositiveInt = Field(20, description="optimiser steps per client and round")
    batch_size: PositiveInt = Field(16, description="examples per step")
    microbatch: PositiveInt = Field(8, description="examples per forward and backward pass; less takes less memory")
    learning_rate: PositiveFloat | Literal["auto"] = Field(
        "auto",
        description="AdamW's learning rate; `auto`: 0.64 / rank, with a `public` or `sketch` basis 0.32 / rank "
        "(as for rank 16 below it); of `ffa-lora` and `lora-xs` 4e-3, of `lora-ga` 1e-4, of the other LoRAs 2e-3, of `miss`, "
        "`bone` and `bone-row` 4e-4, of `flora` and `flora-ones` 5e-3, of `nola` 1e-2, of `galore` 1e-3, of `lorafusion` 2e-2, "
        "of `ravan` 0.64 / (rank √heads)",
    )
    head_learning_rate: PositiveFloat = Field(
        5e-3, description="AdamW's learning rate for a classification head that is trained along"
    )
    schedule: Literal["linear", "constant"] = Field(
        "linear", description="`linear`: to a tenth of the learning rate over all rounds; `constant`: no decay"
    )
    warmup_steps: NaturalInt = Field(5, description="steps of linear warm-up at the start of the run")


class FederationSection(Section):
    """`[federation]`: who takes part, how often, and how long the server waits."""

    clients: PositiveInt = Field(4, description="clients of a simulation, and sites that common data is dealt to")
    names: tuple[SiteName, ...] = Field(
        (), strict=False, description="names of the simulated clients; by default client-0, client-1, …"
    )
    rounds: PositiveInt = Field(5, description="rounds of training")
    fraction: Fraction = Field(1.0, description="share of the known clients that is drawn in each round")
    min_clients: PositiveInt = Field(1, description="clients needed to start, and usable replies needed to count a round")
    weighting: Literal["examples", "uniform"] = Field("examples", description="weight of a client in the mean")
    wire_dtype: Literal["fp32", "bf16"] = Field("fp32", description="dtype in which cores travel")
    over_sample: Annotated[float, Field(ge=1, allow_inf_nan=False)] = Field(
        1.0,
        description="how many times more clients are asked than `fraction` wants; a round is over once the wanted number of "
        "usable replies is in, and the rest are cut off. Which replies come first is chance, so above 1 two runs on real "
        "sites differ",
    )
    max_update_norm: PositiveFloat | Literal["auto"] = Field(
        "auto",
        description="what a reply may differ by from the state that was sent. `auto`: each number by as much as AdamW's steps "
        "can move it; a number: besides, the L2 norm of the whole difference",
    )
    max_examples: PositiveInt | None = Field(
        None, description="a client that says it has more examples than this counts as one that has as many (default: no limit)"
    )
    strikes: NaturalInt = Field(
        3,
        description="refused replies after which a client is left out of the rest of the run; 0: never. Silence, an error and "
        "a policy's refusal are no strikes",
    )
    wait_seconds: PositiveFloat = Field(300.0, description="longest wait for min_clients to appear, s")
    round_seconds: PositiveFloat = Field(3600.0, description="longest wait for the replies of one round, s")


class StrategySection(Section):
    """`[strategy]`: what the server makes of the clients' states in a round; docs/strategies.md says what each is and costs."""

    name: Literal[
        "fedavg",
        "fedprox",
        "scaffold",
        "fedbuff",
        "fedadam",
        "fedyogi",
        "fedadagrad",
        "trimmed-mean",
        "median",
        "krum",
        "multi-krum",
    ] = Field("fedavg", description="a row of docs/strategies.md; `fedavg`: the mean, weighted by `federation.weighting`")
    mu: PositiveFloat = Field(
        0.01,
        description="weight μ of the proximal term μ/2·‖w - w₀‖² in a client's loss, w₀ being the global state (only `fedprox`)",
    )
    rate: PositiveFloat = Field(0.1, description="the server's learning rate (only `fedadam`, `fedyogi`, `fedadagrad`)")
    beta1: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.9, description="how much of the first moment is kept a round (only `fedadam`, `fedyogi`, `fedadagrad`)"
    )
    beta2: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.99, description="how much of the second moment is kept a round (only `fedadam`, `fedyogi`)"
    )
    tau: PositiveFloat = Field(
        1e-3, description="what is added to the root of the second moment (only `fedadam`, `fedyogi`, `fedadagrad`)"
    )
    concurrency: PositiveInt = Field(4, description="clients that are kept at work (only `fedbuff`)")
    buffer: PositiveInt = Field(
        2, description="updates after which a round is over, whenever they were asked for (only `fedbuff`)"
    )
    max_staleness: NaturalInt = Field(10, description="rounds by which an update may come late and still count (only `fedbuff`)")
    trim: Annotated[float, Field(gt=0, lt=0.5)] = Field(
        0.2, description="share of the values of each number that is cut off on each side (only `trimmed-mean`)"
    )
    hostile: PositiveInt = Field(
        1, description="clients a round that may be hostile without deciding the result (only `krum`, `multi-krum`)"
    )
    keep: PositiveInt = Field(2, description="states whose mean is the result (only `multi-krum`)")


class PersonalSection(Section):
    """`[personal]`: how each client goes on from the global core on its own data."""

    steps: NaturalInt = Field(20, description="optimiser steps; 0 publishes the global core as everybody's own")
    learning_rate: PositiveFloat | Literal["auto"] = Field(
        "auto", description="AdamW's learning rate; `auto`: a tenth of the training one"
    )


class EvaluationSection(Section):
    """`[evaluation]`: how base, global and personal models are scored on each client's test set."""

    split: Literal["test", "validation"] = Field(
        "test",
        description="each client's own test set, or its share of what `data.validation` holds out; no test set is read then",
    )
    batch_size: PositiveInt = Field(32, description="test examples per forward pass")
    max_new_tokens: PositiveInt = Field(128, description="tokens generated at the most where the answer ends a text")


class PrivacySection(Section):
    """`[privacy]`: what is promised about those whose data train, and how; docs/privacy.md says to whom and against whom."""

    unit: Literal["none", "record", "client"] = Field(
        "none",
        description="what is protected: `none`; `record`: each training example, by noise that each client adds for itself "
        "(DP-SGD); `client`: all that one client contributes, by noise on the sum of the clients' updates",
    )
    epsilon: PositiveFloat | None = Field(
        None, description="ε that the whole run may spend; the noise is the least that keeps it. Or set `noise_multiplier`"
    )
    noise_multiplier: PositiveFloat | None = Field(
        None, description="standard deviation of the noise over `clip_norm`; what it costs, `fedsb privacy plan` says"
    )
    delta: Share | Literal["auto"] = Field(
        "auto", description="δ; `auto`, and at the most: one over the number of a client's records, or of clients"
    )
    basis_share: Share = Field(
        0.2, description='share of ε that a basis from sketches may spend (only `basis.source = "sketch"`)'
    )
    clip_norm: PositiveFloat = Field(
        1.0,
        description="largest L2 norm of one record's gradient (`record`), of one client's update (`client`), and of any client's "
        "sketch",
    )
    head_clip_norm: PositiveFloat | None = Field(
        None,
        description="of a classification head that is trained along: what its part of a record's gradient is clipped by, as the "
        "rest by `clip_norm`; by default 2·√d for d features (only `record`)",
    )
    secure_sum: bool = Field(
        False,
        description="true: the server learns the sum of the clients' updates and no single one; takes three clients or more, and "
        "two thirds of those asked must stay to the end of a round",
    )
    scores: Literal["withheld", "plain"] = Field(
        "withheld",
        description="scores on the clients' test sets: `withheld`, or `plain`, told without noise (with unit `none` always told)",
    )


class RuntimeSection(Section):
    """`[runtime]`: speed only; nothing here changes what is computed, so a resumed run may change it."""

    device: Literal["auto", "cpu", "cuda", "mps"] = Field("auto", description="where to compute")
    threads: NaturalInt = Field(0, description="CPU threads of torch; 0 leaves torch's choice")
    progress: Literal["auto", "bars", "lines", "json", "none"] = Field(
        "auto",
        description="how progress is shown: `bars`, plain `lines`, `json` (the events of events.jsonl), `none`; `auto`: bars on "
        "a terminal, lines elsewhere",
    )


Tracker = Literal["tensorboard", "mlflow", "wandb"]


class TrackSection(Section):
    """`[track]`: where the server also tells of a run; nothing here changes what is computed, so a resumed run may change it."""

    to: tuple[Tracker, ...] = Field(
        (),
        strict=False,
        description="trackers, each an extra of this package: `tensorboard` (files in the run's folder), `mlflow` (the server "
        "that MLFLOW_TRACKING_URI names), `wandb` (WANDB_MODE, WANDB_API_KEY and the like say where). They get what "
        "`events.jsonl` says, clients' names included",
    )
    project: str = Field("fedsb", min_length=1, description="the experiment of MLflow, or the project of Weights & Biases")


class CompareSection(Section):
    """`[compare]`: what `fedsb compare` runs and sets side by side; no other command takes it."""

    methods: tuple[str, ...] = Field(
        (), strict=False, description="what is compared: methods, and names of `variants`; `--methods` says otherwise"
    )
    seeds: tuple[NaturalInt, ...] = Field(
        (), strict=False, description="each method runs once with each of these as `seed`; `--seeds` says otherwise"
    )
    rates: tuple[PositiveFloat, ...] = Field(
        (),
        strict=False,
        description="factors of the learning rate that a method would take by itself. Each is tried with each method on the "
        "validation split, and that of the best exact match (then of the least loss) runs; with less than two nothing is tried",
    )
    validation: Share = Field(
        0.1, description="`data.validation` while rates are tried; what is compared in the end trains on all of train"
    )
    tuning_seed: NaturalInt = Field(100, description="seed with which rates are tried, none of `seeds`")
    variants: dict[SiteName, dict[str, Any]] = Field(
        default_factory=dict,
        description="name → settings that it changes, as `[compare.variants.NAME]` with lines such as `adapter.rank = 8`; a "
        "method's name changes `adapter.method` alone",
    )
