"""LoPA: a soft prompt before each text, which a sentence encoder's view of the text gates.

    Z = Z_S∘σ(u·vᵀ)          Z, Z_S (m, d), u (m, r) = U₂·tanh(U₁·e), v (d, r) = V₂·tanh(V₁·e), e (h,)

Z goes before the embedded tokens (T, d) of a causal model; e is a frozen encoder's embedding of the instance
(`fedsb.adapters.instances`). Trained are Z_S and the two networks, whose layers have biases:
2(h·H + H) + H·m·r + m·r + H·d·r + d·r + m·d numbers. Jain, Chaudhuri, Reps, Jermaine, "Prompt Tuning Strikes Back: Customizing
Foundation Models with Low-Rank Prompt Adaptation", arXiv 2405.15282, section 4.

Networks start small, N(0, 0.02), so σ is near ½ and Z near Z_S/2; Z_S starts as large as the model's own embeddings are. The
encoder is frozen; in some versions of the authors' code it was trained along, which their count leaves out.

Nothing in the model is changed: what it needs is Z, which whoever has the text can make (`LopaModel.prompts`), and send as input
embeddings.
"""

from dataclasses import dataclass
from typing import Any

import torch
from peft import TaskType
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.peft_types import register_peft_method
from torch import Tensor, nn

from fedsb.adapters.own_tuner import OwnConfig
from fedsb.adapters.peft_type import FEDSB_LOPA
from fedsb.errors import AdapterError

NETWORKS = 0.02  # standard deviation of their weights at the start


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


class Prompt(nn.Module):
    """e (n, h) → Z (n, m, d)."""

    def __init__(self, config: LopaConfig, width: int, spread: float) -> None:
        super().__init__()
        m, r, h, hidden = config.tokens, config.r, config.encoder_width, config.hidden
        self.shared = nn.Parameter(spread * torch.randn(m, width))
        self.u = _network(h, hidden, m * r, config.dropout)
        self.v = _network(h, hidden, width * r, config.dropout)

    def forward(self, instances: Tensor) -> Tensor:
        """Z_S, gated for each instance."""
        e = instances.to(self.shared)
        m, width = self.shared.shape
        u, v = self.u(e).view(len(e), m, -1), self.v(e).view(len(e), width, -1)
        return self.shared * torch.sigmoid(u @ v.mT)


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

    def update_layer(self, adapter_name: str, config: LopaConfig) -> None:
        """Add a prompt."""
        weight = self.base_layer.weight
        spread = 1.0 if weight.is_meta else float(weight.detach().float().std())
        self.fedsb_lopa[adapter_name] = Prompt(config, weight.shape[1], spread).float()
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
        embedding = self._embedding()
        (name,) = self.active_adapters
        prompt = embedding.fedsb_lopa[name]
        if instances.ndim != 2 or instances.shape[1] != prompt.u[0].in_features:  # type: ignore[index,union-attr]
            wanted = prompt.u[0].in_features  # type: ignore[index,union-attr]
            raise ValueError(f"instance is {tuple(instances.shape)}; give the encoder's embeddings, (rows, {wanted})")
        found: Tensor = prompt(instances)
        return found.to(embedding.base_layer.weight.dtype)

    def prompted(self, input_ids: Tensor, attention_mask: Tensor | None, instance: Tensor) -> dict[str, Tensor]:
        """`inputs_embeds` (n, m + T, d), `attention_mask` and `position_ids` (n, m + T) of a batch with its prompts before it."""
        if len(instance) != len(input_ids):
            raise ValueError(f"instance has {len(instance)} rows for a batch of {len(input_ids)}; give one for each")
        z = self.prompts(instance)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        whole = torch.cat([mask.new_ones(len(mask), z.shape[1]), mask], 1)
        embeds = torch.cat([z, self._embedding()(input_ids)], 1)
        return {"inputs_embeds": embeds, "attention_mask": whole, "position_ids": (whole.cumsum(1) - 1).clamp_min(0)}

    def forward(self, *args: Any, instance: Tensor | None = None, **kwargs: Any) -> Any:
        """As the base model's; with `instance`, logits are of the text alone, and there is no cache."""
        if instance is None or self._embedding().disable_adapters:
            return self.model.forward(*args, **kwargs)
        ids, labels = kwargs.pop("input_ids", args[0] if args else None), kwargs.pop("labels", None)
        if any(kwargs.pop(name, None) is not None for name in ("inputs_embeds", "position_ids", "past_key_values")):
            raise ValueError("instance goes with input_ids and attention_mask alone; leave the others out")
        told = self.prompted(ids, kwargs.pop("attention_mask", None), instance)
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
        told = self.prompted(input_ids, attention_mask, instance)
        new = self.model.generate(inputs_embeds=told["inputs_embeds"], attention_mask=told["attention_mask"], **kwargs)
        times = len(new) // len(input_ids)  # num_return_sequences
        return torch.cat([input_ids.repeat_interleave(times, 0), new], 1)

    def _embedding(self) -> LopaEmbedding:
        return next(module for module in self.model.modules() if isinstance(module, LopaEmbedding))


register_peft_method(name="fedsb_lopa", config_cls=LopaConfig, model_cls=LopaModel, prefix="fedsb_lopa")
