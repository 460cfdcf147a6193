"""LoPA: a soft prompt before each text, which a sentence encoder's view of the text gates.

    Z = s·Z_S∘σ(u·vᵀ)        Z, Z_S (m, d), u (m, r) = U₂·tanh(U₁·e), v (d, r) = V₂·tanh(V₁·e), e (h,)

Z goes before the embedded tokens (T, d) of a causal model; e is a frozen encoder's embedding of the instance
(`fedsb.adapters.instances`). Trained are Z_S and the two networks, whose layers have biases:
2(h·H + H) + H·m·r + m·r + H·d·r + d·r + m·d numbers. Jain, Chaudhuri, Reps, Jermaine, "Prompt Tuning Strikes Back: Customizing
Foundation Models with Low-Rank Prompt Adaptation", arXiv 2405.15282, section 4.

Networks start small, N(0, 0.02), so σ is near ½ and Z near s·Z_S/2. s is the standard deviation of the model's own embeddings
and Z_S starts as N(0, 1): so prompts start as large as tokens, with a Z_S that can be drawn by who has no weights (the paper has
no s). The encoder is frozen; in some versions of the authors' code it was trained along, which their count leaves out.

Nothing in the model is changed: what it needs is Z, which whoever has the text can make (`LopaModel.prompts`), and send as input
embeddings. Z is no linear function of what is trained, so in a federation the mean of the parts is not the mean of the prompts.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from peft import TaskType
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.peft_types import register_peft_method
from torch import Tensor, nn

from fedsb.adapters.instances import width_of
from fedsb.adapters.method import Method, Parts
from fedsb.adapters.own_tuner import OwnConfig
from fedsb.adapters.peft_type import FEDSB_LOPA
from fedsb.config import RunConfig
from fedsb.errors import AdapterError

NETWORKS = 0.02  # standard deviation of their weights at the start
NAMES = {  # part → its parameter in `Prompt`
    "shared": "shared.weight",
    "U1": "u.0.weight",
    "U1_bias": "u.0.bias",
    "U2": "u.3.weight",
    "U2_bias": "u.3.bias",
    "V1": "v.0.weight",
    "V1_bias": "v.0.bias",
    "V2": "v.3.weight",
    "V2_bias": "v.3.bias",
}


@dataclass
class LopaConfig(OwnConfig):
    """Configuration for `get_peft_model(model, LopaConfig(encoder="minilm-l6-v2", encoder_width=384))`.

    Attributes:
        tokens: m, length of the prompt.
        r: rank of the gate.
        encoder: the frozen sentence encoder, by name, for whoever loads this.
        encoder_width: h, numbers of its embeddings.
        hidden: H, width of the two networks.
        dropout: before each of their second layers, in training.

    What `OwnConfig` says of layers is filled in: the input embedding.
    """

    tokens: int = 10
    r: int = 1
    encoder: str = "minilm-l6-v2"
    encoder_width: int = 384
    hidden: int = 256
    dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type, self.task_type = FEDSB_LOPA, TaskType.CAUSAL_LM
        if min(self.tokens, self.r, self.encoder_width, self.hidden) < 1:
            raise AdapterError(
                f"tokens = {self.tokens}, r = {self.r}, encoder_width = {self.encoder_width} and hidden = {self.hidden} make no "
                "prompt; set all of them from 1 on"
            )


class Shared(nn.Module):
    """A gate (n, m, d) → Z_S∘gate; a module, so that Z_S has gradients of single records (`fedsb/training/private.py`)."""

    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(tokens, width))

    def forward(self, gate: Tensor) -> Tensor:
        """Entry by entry."""
        return self.weight * gate


class Prompt(nn.Module):
    """e (n, h) → Z/s (n, m, d)."""

    def __init__(self, config: LopaConfig, width: int) -> None:
        super().__init__()
        m, r, h, hidden = config.tokens, config.r, config.encoder_width, config.hidden
        self.shared = Shared(m, width)
        self.u = _network(h, hidden, m * r, config.dropout)
        self.v = _network(h, hidden, width * r, config.dropout)

    def forward(self, instances: Tensor) -> Tensor:
        """Z_S, gated for each instance."""
        e = instances.to(self.shared.weight)
        m, width = self.shared.weight.shape
        u, v = self.u(e).view(len(e), m, -1), self.v(e).view(len(e), width, -1)
        found: Tensor = self.shared(torch.sigmoid(u @ v.mT))
        return found


def _network(inputs: int, hidden: int, outputs: int, dropout: float) -> nn.Sequential:
    layers = [nn.Linear(inputs, hidden), nn.Tanh(), nn.Dropout(dropout), nn.Linear(hidden, outputs)]
    for layer in (layers[0], layers[-1]):
        assert isinstance(layer, nn.Linear)
        nn.init.normal_(layer.weight, std=NETWORKS)
        nn.init.zeros_(layer.bias)
    return nn.Sequential(*layers)


def count(tokens: int, rank: int, encoder_width: int, hidden: int, width: int) -> int:
    """How many numbers are trained, with a model of `width`."""
    h, m, d, r = encoder_width, tokens, width, rank
    return 2 * (h * hidden + hidden) + hidden * m * r + m * r + hidden * d * r + d * r + m * d


class LopaEmbedding(nn.Module, BaseTunerLayer):  # type: ignore[misc]
    """The model's input embedding, which computes what it did; it holds the prompts, fp32."""

    adapter_layer_names = ("fedsb_lopa",)
    other_param_names = ()

    def __init__(self, base_layer: nn.Embedding, adapter_name: str, config: LopaConfig) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.fedsb_lopa = nn.ModuleDict()
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self.update_layer(adapter_name, config)

    @cached_property
    def spread(self) -> float:
        """s, the standard deviation of the embedding's numbers."""
        return float(self.base_layer.weight.detach().float().std())

    @property
    def in_features(self) -> int:
        """h, numbers of an instance's embedding."""
        (name,) = self.active_adapters
        return int(self.fedsb_lopa[name].u[0].in_features)  # type: ignore[index,union-attr,arg-type]

    @property
    def out_features(self) -> int:
        """d, numbers of a token's embedding."""
        return int(self.base_layer.weight.shape[1])

    def trained(self, adapter: str) -> dict[str, nn.Parameter]:
        """Part → parameter of an adapter."""
        held = dict(self.fedsb_lopa[adapter].named_parameters()) if adapter in self.fedsb_lopa else {}
        return {part: held[name] for part, name in NAMES.items() if name in held}

    def prompts(self, instances: Tensor) -> Tensor:
        """Z (n, m, d) of instances (n, h) by the active adapter, in the model's dtype. Raises ValueError for another h."""
        if instances.ndim != 2 or instances.shape[1] != self.in_features:
            raise ValueError(f"instance is {tuple(instances.shape)}; give the encoder's embeddings, (rows, {self.in_features})")
        (name,) = self.active_adapters
        found: Tensor = self.spread * self.fedsb_lopa[name](instances)
        return found.to(self.base_layer.weight.dtype)

    def update_layer(self, adapter_name: str, config: LopaConfig) -> None:
        """Add a prompt."""
        self.fedsb_lopa[adapter_name] = Prompt(config, self.out_features).float()
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        prompt = self.fedsb_lopa[adapter_name]
        if not any(p.is_meta for p in prompt.parameters()):
            prompt.to(self.base_layer.weight.device if device is None else device)  # and keep it fp32

    def forward(self, ids: Tensor) -> Tensor:
        """As without prompts."""
        found: Tensor = self.base_layer(ids)
        return found

    def merge(self, *args: Any, **kwargs: Any) -> None:
        """Refused: a prompt is no change of weights."""
        raise ValueError("a prompt cannot be merged into weights; send it along as input embeddings (LopaModel.prompts)")

    def unmerge(self) -> None:
        """Nothing to do."""


class LopaModel(BaseTuner):
    """A causal model that takes `instance=` (n, h) beside `input_ids`, forward and in `generate`; without it, the base model.

    Raises ValueError where `instance` is given and adapters, batch or width do not go with it.
    """

    prefix = "fedsb_lopa"
    tuner_layer_cls = LopaEmbedding
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012  PEFT's name

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        """PEFT looks for the name at a key's end; in `fedsb_lopa.NAME.u.0.weight` it is not there."""
        return key.replace(f".{cls.prefix}.{adapter_name}.", f".{cls.prefix}.", 1)

    def inject_adapter(self, model: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Put a prompt beside the input embedding, whatever its name is."""
        embedding = model.get_input_embeddings()
        if model.get_output_embeddings() is None:
            raise AdapterError("LoPA puts a prompt before the text of a causal model, and this is none; use another method")
        self.peft_config[adapter_name].target_modules = [name for name, module in model.named_modules() if module is embedding]  # type: ignore[attr-defined]
        super().inject_adapter(model, adapter_name, *args, **kwargs)

    def _create_and_replace(  # type: ignore[override]
        self,
        peft_config: LopaConfig,
        adapter_name: str,
        target: Any,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **_: Any,
    ) -> None:
        if isinstance(target, LopaEmbedding):
            target.update_layer(adapter_name, peft_config)
            return
        layer = LopaEmbedding(target, adapter_name, peft_config)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def prompts(self, instances: Tensor) -> Tensor:
        """Z (n, m, d) of instances (n, h) by the active adapter, in the model's dtype: all that a server needs of it."""
        return self._embedding().prompts(instances)

    def forward(self, *args: Any, instance: Tensor | None = None, **kwargs: Any) -> Any:
        """As the base model's; with `instance`, logits are of the text alone, and there is no cache."""
        if instance is None or self._embedding().disable_adapters:
            return self.model.forward(*args, **kwargs)
        ids, labels = kwargs.pop("input_ids", args[0] if args else None), kwargs.pop("labels", None)
        if any(kwargs.pop(name, None) is not None for name in ("inputs_embeds", "position_ids", "past_key_values")):
            raise ValueError("instance goes with input_ids and attention_mask alone; leave the others out")
        told = prompted(self.model, ids, kwargs.pop("attention_mask", None), instance)
        length = told["inputs_embeds"].shape[1] - ids.shape[1]
        if labels is not None:
            labels = torch.cat([labels.new_full((len(labels), length), -100), labels], 1)
        found = self.model.forward(**told, labels=labels, **(kwargs | {"use_cache": False}))
        found.logits = found.logits[:, length:]
        return found

    def generate(self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        """As the base model's, with `instance=`; each beam of a row has its prompt. Returns ids, those of the text first."""
        instance = kwargs.pop("instance", None)
        if instance is None or self._embedding().disable_adapters:
            return self.model.generate(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        assert input_ids is not None
        told = prompted(self.model, input_ids, attention_mask, instance)
        new = self.model.generate(inputs_embeds=told["inputs_embeds"], attention_mask=told["attention_mask"], **kwargs)
        times = len(new) // len(input_ids)  # num_return_sequences
        return torch.cat([input_ids.repeat_interleave(times, 0), new], 1)

    def _embedding(self) -> LopaEmbedding:
        return _embedding_of(self.model)


def prompted(model: Any, input_ids: Tensor, attention_mask: Tensor | None, instance: Tensor) -> dict[str, Tensor]:
    """`inputs_embeds` (n, m + T, d), `attention_mask` and `position_ids` (n, m + T) of a batch with its prompts before it.

    Args:
        model: the transformers model (not the PEFT wrapper) whose input embedding has a prompt.
        input_ids, attention_mask: (n, T).
        instance: (n, h).

    Raises ValueError where these do not go together.
    """
    if len(instance) != len(input_ids):
        raise ValueError(f"instance has {len(instance)} rows for a batch of {len(input_ids)}; give one for each")
    embedding = _embedding_of(model)
    z = embedding.prompts(instance)
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    whole = torch.cat([mask.new_ones(len(mask), z.shape[1]), mask], 1)
    embeds = torch.cat([z, embedding(input_ids)], 1)
    return {"inputs_embeds": embeds, "attention_mask": whole, "position_ids": (whole.cumsum(1) - 1).clamp_min(0)}


def made_up_instances(model: Any, count: int) -> Sequence[Tensor | None]:
    """Instances for made-up records, each another unit vector (h,); of a model without prompts none."""
    embedding = model.get_input_embeddings()
    return torch.eye(count, embedding.in_features).unbind() if isinstance(embedding, LopaEmbedding) else [None] * count


def _embedding_of(model: Any) -> LopaEmbedding:
    embedding = model.get_input_embeddings()
    if not isinstance(embedding, LopaEmbedding):
        raise ValueError("the model has no LoPA prompt, and its batch has instances; use the model that was adapted")
    return embedding


def _settings(run: RunConfig) -> dict[str, Any]:
    adapter = run.adapter
    of = {"tokens": adapter.tokens, "hidden": adapter.hidden}
    return of | {"encoder": adapter.encoder, "encoder_width": width_of(adapter.encoder)}


def _start(spread: float) -> Callable[[tuple[int, ...], torch.Generator], Tensor]:
    def drawn(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        return spread * torch.randn(shape, generator=generator)

    return drawn


def _prompts(parts: Parts, instances: Tensor) -> Tensor:
    """Z/s of instances (n, h), which are made to have length 1, in the parts' dtype."""
    e = torch.nn.functional.normalize(instances, dim=1)
    u, v = ((torch.tanh(e @ parts[f"{x}1"].mT + parts[f"{x}1_bias"]) @ parts[f"{x}2"].mT + parts[f"{x}2_bias"]) for x in "UV")
    m, d = parts["shared"].shape
    return parts["shared"] * torch.sigmoid(u.view(len(e), m, -1) @ v.view(len(e), d, -1).mT)


LOPA = Method(
    lambda rank, alpha, told: LopaConfig(r=rank, **told),
    {
        "shared": ("tokens", "out"),
        "U1": ("hidden", "in"),
        "U1_bias": ("hidden",),
        "U2": ("tokens*r", "hidden"),
        "U2_bias": ("tokens*r",),
        "V1": ("hidden", "in"),
        "V1_bias": ("hidden",),
        "V2": ("out*r", "hidden"),
        "V2_bias": ("out*r",),
    },
    (),
    None,
    exact=False,
    says="A frozen sentence encoder reads each text, and a soft prompt `Z = s Z_S * sigmoid(u v^T)`, made from what it finds, "
    "goes before the text; the model is as it was (LoPA).",
    rate=1e-3,  # the authors', on code
    begins={"shared": _start(1.0)} | {part: _start(NETWORKS) for part in ("U1", "U2", "V1", "V2")},
    settings=_settings,
    output=_prompts,
)

register_peft_method(name="fedsb_lopa", config_cls=LopaConfig, model_cls=LopaModel, prefix="fedsb_lopa")
