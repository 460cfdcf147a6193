"""What this project's own tuners have in common: they make `get_peft_model`, `save_pretrained`, `from_pretrained` and
`adapter_names=` work."""

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from fedsb.adapters.own_layer import BASE
from fedsb.errors import AdapterError


@dataclass
class OwnConfig(PeftConfig):
    """What our configurations have in common: which layers are adapted.

    Attributes:
        target_modules: names or suffixes of linear layers, a regular expression, or "all-linear".
        exclude_modules: names or a regular expression of layers to leave out.
        modules_to_save: modules trained and saved whole, such as a classification head.
        layers_to_transform, layers_pattern: as PEFT's.
    """

    target_modules: list[str] | str | None = "all-linear"
    exclude_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[no-untyped-call]
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), list | tuple):
                setattr(self, name, set(getattr(self, name)))


class OwnTuner(BaseTuner):
    """A transformers model whose target layers are `tuner_layer_cls`.

    Attributes:
        called: the method, in messages, where its configuration has no `method`.
        unpacked: whether it takes W0's numbers, which a quantised layer does not have.
        mixes: None, or why there is no `adapter_names=`.
    """

    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012  PEFT's name; target_modules defaults to all-linear
    tuner_layer_cls: type[Any]
    called: ClassVar[str]
    unpacked: ClassVar[bool] = False
    mixes: ClassVar[str | None] = None

    @abstractmethod
    def told(self, config: Any) -> tuple[Any, ...]:
        """What `tuner_layer_cls` is told of an adapter, after its name."""

    def check(self, layers: dict[str, Any], config: Any, adapter_name: str) -> None:
        """Look at all layers that an adapter was put on, path → layer; refuse it if one of them cannot have it."""

    def _create_and_replace(  # type: ignore[override]  # PEFT never hands in a parameter's name, but for its own
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **_: Any,
    ) -> None:
        if isinstance(target, self.tuner_layer_cls):
            target.update_layer(adapter_name, *self.told(peft_config))
            return
        if not isinstance(target, nn.Linear) or (self.unpacked and not target.weight.is_floating_point()):
            only = "torch.nn.Linear with unpacked weights" if self.unpacked else "torch.nn.Linear"
            raise AdapterError(
                f"layer {current_key} is a {type(target).__name__}, and {getattr(peft_config, 'method', self.called)} adapts "
                f"{only} only; "
                "leave it out of target_modules"
            )
        layer = self.tuner_layer_cls(target, adapter_name, *self.told(peft_config))
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """As PEFT's, after which all layers are looked at, so that what one of them refuses says what suits all."""
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, self.tuner_layer_cls)}
        held = {name: layer for name, layer in layers.items() if layer.trained(adapter_name)}
        self.check(held, self.peft_config[adapter_name], adapter_name)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Hand `adapter_names` to every adapted layer and trained head for the time of one forward pass or `generate`."""
        names: Sequence[str] | None = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        if self.mixes is not None:  # PEFT would pass over it: every row would go through the active adapter
            raise ValueError(f"{self.called} has no adapter_names, since {self.mixes}; use set_adapter")
        if self.training:
            raise ValueError("adapter_names works in evaluation mode only; call model.eval() first")
        unknown = sorted(set(names) - set(self.peft_config) - {BASE})
        if unknown:
            raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}")
        names = [name for name in names for _ in range(kwargs.get("num_beams") or 1)]
        handles = [
            module.register_forward_pre_hook(partial(_with_adapter_names, names), with_kwargs=True)
            for module in self.modules()
            if isinstance(module, (self.tuner_layer_cls, AuxiliaryTrainingWrapper))
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _with_adapter_names(names: Sequence[str], module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
    return args, {**kwargs, "adapter_names": names}
