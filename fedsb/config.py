"""The whole configuration of a run: TOML in, a frozen and checked `RunConfig` out.

Defaults live here and nowhere else. A file in `configs/` holds only what differs. Each field's description is what
`docs/configuration.md` says about it; a test compares the two.
"""

import difflib
import hashlib
import json
import re
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from fedsb.errors import ConfigError

PositiveInt = Annotated[int, Field(gt=0)]
NaturalInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(gt=0, le=1)]
SITE_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")  # of a client, a task or a run; safe as a folder
SiteName = Annotated[str, Field(pattern=rf"^{SITE_NAME.pattern}$")]
TYPE = re.compile(r"(constrained-)?(int|float|str|bool)|(literal|tuple)\[.*\]")  # in the location of a union's error


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
    kind: Literal["causal", "classification"] = Field(
        "causal", description="`causal` for language models, `classification` for sequence classification"
    )
    dtype: Literal["auto", "bf16", "fp32"] = Field(
        "auto",
        description="dtype of the frozen weights; `auto`: bf16 on GPUs and on CPUs with AMX, fp32 on CPUs without, "
        "which multiply bf16 slower",
    )


class TaskSection(Section):
    """`[[data.tasks]]` and `[basis.public]`: where examples come from."""

    name: SiteName = Field(description="the name of the task in tables")
    source: str = Field(
        description="`gym:NAME` (a reasoning-gym data set), `jsonl:FOLDER` (with train.jsonl and test.jsonl), "
        "or `hub:ID` (a Hugging Face data set with the splits train and test)"
    )
    options: dict[str, int | float | str | bool] = Field(
        default_factory=dict, description="options of the reasoning-gym data set, or the `name` of a hub data set"
    )
    train: PositiveInt | None = Field(None, description="training examples at the most (required for `gym:`)")
    test: PositiveInt | None = Field(None, description="test examples at the most (required for `gym:`)")


class DataSection(Section):
    """`[data]`: the tasks, and how their examples are dealt out to the clients."""

    tasks: tuple[TaskSection, ...] = Field(strict=False, min_length=1, description="the tasks, as `[[data.tasks]]`")
    partition: Literal["task", "iid", "dirichlet", "size"] = Field(
        "iid",
        description="`task`: client i holds task i modulo the number of tasks; `iid`: shuffled and dealt out evenly; "
        "`dirichlet`: shares of each label (or task) drawn from Dirichlet(alpha); `size`: iid with sizes from "
        "Dirichlet(alpha)",
    )
    alpha: PositiveFloat = Field(0.5, description="concentration of the Dirichlet distribution; small is more skewed")
    max_length: PositiveInt = Field(256, description="tokens of an example; what is longer loses the beginning of its text")
    system_prompt: str | None = Field(None, description="system message put before each prompt of a chat model")


class AdapterSection(Section):
    """`[adapter]`: what is trained."""

    method: Literal["lora-sb"] = Field("lora-sb", description="the way of adapting, a row of docs/methods.md")
    rank: PositiveInt = Field(64, description="r: a core has r x r numbers")
    target_modules: Literal["all-linear"] | Annotated[tuple[str, ...], Field(strict=False, min_length=1)] = Field(
        "all-linear", description="names of the linear layers to adapt; all of them except the output head"
    )


class BasisSection(Section):
    """`[basis]`: the frozen B and A that all clients share."""

    source: Literal["random", "weights", "public"] = Field(
        "random",
        description="`random`: orthonormal from the seed, 0 bytes; `weights`: leading singular vectors of W0, no data; "
        "`public`: SVD of the first update, estimated at the server on public examples",
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
    examples: PositiveInt = Field(64, description="public examples used for the estimate")
    dtype: Literal["bf16", "fp32"] = Field("bf16", description="dtype in which B and A are kept and sent")


class TrainSection(Section):
    """`[train]`: what a client does in one round."""

    steps: PositiveInt = Field(20, description="optimiser steps per client and round")
    batch_size: PositiveInt = Field(16, description="examples per step")
    microbatch: PositiveInt = Field(8, description="examples per forward and backward pass; less takes less memory")
    learning_rate: PositiveFloat | Literal["auto"] = Field(
        "auto",
        description="AdamW's learning rate; `auto`: 0.64 / rank, with a `public` basis 0.32 / rank (as for rank 16 below it)",
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

    clients: PositiveInt = Field(4, description="clients of a simulation")
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


class PersonalSection(Section):
    """`[personal]`: how each client goes on from the global core on its own data."""

    steps: NaturalInt = Field(20, description="optimiser steps; 0 publishes the global core as everybody's own")
    learning_rate: PositiveFloat | Literal["auto"] = Field(
        "auto", description="AdamW's learning rate; `auto`: a tenth of the training one"
    )


class EvaluationSection(Section):
    """`[evaluation]`: how base, global and personal models are scored on each client's test set."""

    batch_size: PositiveInt = Field(32, description="test examples per forward pass")
    max_new_tokens: PositiveInt = Field(128, description="tokens generated at the most where the answer ends a text")


class RuntimeSection(Section):
    """`[runtime]`: speed only; nothing here changes what is computed, so a resumed run may change it."""

    device: Literal["auto", "cpu", "cuda", "mps"] = Field("auto", description="where to compute")
    threads: NaturalInt = Field(0, description="CPU threads of torch; 0 leaves torch's choice")
    progress: Literal["auto", "bars", "lines", "none"] = Field("auto", description="how progress is shown")


class RunConfig(Section):
    """A whole run. Immutable; equal configurations have equal digests."""

    name: SiteName = Field(description="the run's name; its folder is runs/NAME unless --out says otherwise")
    seed: NaturalInt = Field(0, description="seed of everything that is drawn: data, partition, sampling, batches, basis")
    model: ModelSection = Field(default_factory=lambda: ModelSection.model_validate({}))
    data: DataSection
    adapter: AdapterSection = Field(default_factory=lambda: AdapterSection.model_validate({}))
    basis: BasisSection = Field(default_factory=lambda: BasisSection.model_validate({}))
    train: TrainSection = Field(default_factory=lambda: TrainSection.model_validate({}))
    federation: FederationSection = Field(default_factory=lambda: FederationSection.model_validate({}))
    personal: PersonalSection = Field(default_factory=lambda: PersonalSection.model_validate({}))
    evaluation: EvaluationSection = Field(default_factory=lambda: EvaluationSection.model_validate({}))
    runtime: RuntimeSection = Field(default_factory=lambda: RuntimeSection.model_validate({}))

    @model_validator(mode="after")
    def _consistent(self) -> "RunConfig":
        names = [task.name for task in self.data.tasks]
        if len(set(names)) < len(names):
            raise ValueError("data.tasks has two tasks of one name; give each its own")
        if self.federation.names and len(self.federation.names) != self.federation.clients:
            raise ValueError(
                f"federation.names lists {len(self.federation.names)} names for {self.federation.clients} clients; "
                "make the numbers equal or leave names out"
            )
        if len(set(self.federation.names)) < len(self.federation.names):
            raise ValueError("federation.names has a name twice; give each client its own")
        if self.federation.min_clients > self.federation.clients:
            raise ValueError("federation.min_clients is larger than federation.clients; lower it")
        if self.federation.over_sample > 1 and self.federation.fraction == 1:
            raise ValueError("federation.over_sample has nobody more to ask where fraction = 1; lower federation.fraction")
        if (self.basis.source == "public") != (self.basis.public is not None):
            raise ValueError('basis.source = "public" and a [basis.public] section go together; set both or neither')
        if self.basis.source != "public" and (self.basis.r0 == "paper" or self.basis.sign):
            raise ValueError('basis.r0 = "paper" and basis.sign need basis.source = "public"; drop them or change the source')
        if self.data.partition == "task" and self.federation.clients < len(self.data.tasks):
            raise ValueError('data.partition = "task" needs at least as many clients as tasks; raise federation.clients')
        if self.model.kind == "classification" and len(self.data.tasks) > 1:
            raise ValueError("classification takes one task, whose labels the head has; keep one of data.tasks")
        return self

    @property
    def client_names(self) -> tuple[str, ...]:
        """Names of the simulated clients, in order."""
        width = len(str(self.federation.clients - 1))
        return self.federation.names or tuple(f"client-{i:0{width}d}" for i in range(self.federation.clients))

    def digest(self) -> str:
        """SHA-256 over all that decides the result of clients that answer as they should: so over everything but `[runtime]`,
        the longest waits, and the strikes."""
        patience = {"wait_seconds", "round_seconds", "strikes"}
        content = self.model_dump(mode="json", exclude={"runtime": True, "federation": patience})
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def to_toml(self) -> str:
        """The configuration as resolved, every default written out."""
        return tomli_w.dumps(self.model_dump(mode="json", exclude_none=True))

    def to_json(self) -> str:
        """One line, for messages between server and clients."""
        return self.model_dump_json(exclude_none=True)

    @classmethod
    def from_json(cls, text: str) -> "RunConfig":
        """Read what `to_json` wrote. Raises ConfigError."""
        return _validated(json.loads(text), "the server's configuration")

    @classmethod
    def load(cls, path: Path, overrides: Sequence[str] = ()) -> "RunConfig":
        """Read a TOML file and apply `section.key=value` overrides, whose values are TOML or plain words.

        Raises ConfigError with the key, the file and what to do.
        """
        try:
            table = tomllib.loads(path.read_text())
        except FileNotFoundError:
            raise ConfigError(
                f"{path}: there is no such configuration file; `ls configs` shows the ones that come along"
            ) from None
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: cannot be read ({error}); name a readable TOML file") from None
        except tomllib.TOMLDecodeError as error:
            raise ConfigError(f"{path}: is not valid TOML ({error}); mend that line") from None
        for override in overrides:
            _override(table, override)
        return _validated(table, str(path))


def _override(table: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key.strip():
        raise ConfigError(f"--set {override}: has no value; write --set section.key=value")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()  # a plain word: --set adapter.method=lora-sb
    *sections, name = key.strip().split(".")
    for section in sections:
        table = table.setdefault(section, {})
        if not isinstance(table, dict):
            raise ConfigError(f"--set {override}: {section} is not a section; `fedsb simulate --help` shows the form")
    table[name] = value


def _validated(table: dict[str, Any], where: str) -> RunConfig:
    try:
        return RunConfig.model_validate(table)
    except ValidationError as error:
        faults = sorted(error.errors(), key=lambda fault: fault["type"] != "extra_forbidden")  # a misspelt key is missing too
        first, key = faults[0], _key(faults[0]["loc"])
        allowed = [fault["msg"] for fault in faults if _key(fault["loc"]) == key]  # one for each type that it may have
        raise ConfigError(
            f"{where}: {_sentence(first['type'], first['loc'], ' or '.join(allowed), first.get('input'))}"
        ) from None


def _key(location: tuple[int | str, ...]) -> str:
    """A pydantic location as a key of the file, without the names of the types that were tried."""
    return ".".join(str(part) for part in location if not TYPE.fullmatch(str(part)))


def _sentence(kind: str, location: tuple[int | str, ...], message: str, value: object) -> str:
    """One pydantic error as one sentence: the key, what is wrong, what to do."""
    key = _key(location)
    if kind == "extra_forbidden":
        *parents, name = location
        near = difflib.get_close_matches(str(name), _keys_at(tuple(parents)), n=1)
        remedy = f"did you mean {'.'.join([*map(str, parents), near[0]])}?" if near else "docs/configuration.md lists them all"
        return f"{key} is not a setting; {remedy}"
    if kind == "missing":
        return f"{key} is missing; set it"
    if kind == "value_error":
        return message.removeprefix("Value error, ")
    return f"{key} = {value!r} will not do: {message[0].lower()}{message[1:]}; change it"


def _keys_at(parents: tuple[int | str, ...]) -> list[str]:
    section: type[BaseModel] = RunConfig
    for parent in (part for part in parents if isinstance(part, str)):
        annotation = section.model_fields[parent].annotation
        candidates = [annotation, *getattr(annotation, "__args__", ())]
        section = next(c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel))
    return list(section.model_fields)
