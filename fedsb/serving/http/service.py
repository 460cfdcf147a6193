"""What the routes need: who may ask whom, with which adapters, and what is counted."""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from starlette.requests import Request

from fedsb.errors import FedsbError
from fedsb.serving.bank import BankFull
from fedsb.serving.engine import Engine
from fedsb.serving.http.keys import Key, Keys
from fedsb.serving.tenants import Lease, Tenants

log = logging.getLogger(__name__)
BUSY_SECONDS = 1  # after which to ask again, where all are at work
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


@dataclass(frozen=True)
class Bounds:
    """What one request may ask.

    Attributes:
        body: bytes.
        answer: tokens of an answer, where the request does not say; and at the most.
    """

    body: int = 1 << 20
    answer: int = 1024


class Refused(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, message: str, code: str, wait: float | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.wait = status, message, code, wait


class Figures:
    """What Prometheus is told; tenants are not named."""

    def __init__(self, engine: Engine, tenants: Tenants) -> None:
        self.registry = CollectorRegistry()
        told: dict[str, Any] = {"registry": self.registry}
        self.requests = Counter("fedsb_serve_requests", "Requests answered, by path and status.", ["path", "status"], **told)
        self.tokens = Counter("fedsb_serve_tokens", "Tokens of prompts and of answers.", ["kind"], **told)
        self.first = Histogram("fedsb_serve_first_token_seconds", "Until an answer begins.", buckets=SECONDS, **told)
        self.between = Histogram(
            "fedsb_serve_between_tokens_seconds", "From one piece of an answer to the next.", buckets=SECONDS, **told
        )
        Gauge("fedsb_serve_running", "Requests at work or waiting.", **told).set_function(lambda: engine.running)
        Gauge("fedsb_serve_adapters_loaded", "Adapters in memory.", **told).set_function(lambda: tenants.loaded)
        Gauge("fedsb_serve_slots_taken", "Adapters in memory, with old versions that are still in use.", **told).set_function(
            lambda: tenants.bank.taken
        )
        for kind in ("prompt", "answer"):
            self.tokens.labels(kind)


class Service:
    """What the routes need."""

    def __init__(
        self, base: str, tokenizer: Any, engine: Engine, tenants: Tenants, keys: Keys | None = None, bounds: Bounds | None = None
    ) -> None:
        self.base, self.tokenizer, self.engine, self.tenants = base, tokenizer, engine, tenants
        self.keys, self.bounds = keys or Keys(), bounds or Bounds()
        self.figures = Figures(engine, tenants)
        self.began = int(time.time())
        told = getattr(engine.model.generation_config, "eos_token_id", None)
        several = told if isinstance(told, list) else [told]  # as Llama 3 has it
        self.ends = tuple({token for token in (tokenizer.eos_token_id, *several) if token is not None})
        self.closing = False

    def allowed(self, request: Request) -> Key:
        """Whose key a request has. Raises Refused."""
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        key = self.keys.find(token.strip() if scheme.lower() == "bearer" else None)
        if key is None:
            raise Refused(401, "this server asks for a key; send it as Authorization: Bearer KEY", "invalid_api_key")
        return key

    def leases(self, key: Key, model: str, count: int) -> list[Lease | None]:
        """The adapter that `model` names, for that many answers; None is the base model. Raises Refused."""
        name = model.removeprefix(f"{self.base}:") if model != self.base else ""
        if not name:
            if not key.may_ask_base:
                raise unknown(model)
            return [None] * count
        if not key.may_ask(name) or not self.tenants.has(name):
            raise unknown(model)
        found: list[Lease | None] = []
        try:
            for _ in range(count):
                found.append(self.tenants.take(name))
        except BankFull as error:
            log.warning("%s", error)
            self._give_back(found)
            raise Refused(503, "all room for adapters is in use; try again later", "overloaded", BUSY_SECONDS) from None
        except FedsbError as error:
            log.error("%s", error)
            self._give_back(found)
            raise Refused(503, f"the adapter of {name} cannot be loaded; the server's log says why", "adapter_unusable") from None
        return found

    def _give_back(self, leases: Sequence[Lease | None]) -> None:
        for lease in leases:
            if lease:
                self.tenants.give_back(lease)

    def models(self, key: Key) -> list[dict[str, Any]]:
        """Of /v1/models: the base model first; only what the key may ask."""
        told = {"object": "model", "created": self.began, "owned_by": "fedsb", "root": self.base}
        found = [{"id": self.base, **told, "parent": None}] if key.may_ask_base else []
        return found + [{"id": name, **told, "parent": self.base} for name in self.tenants.names() if key.may_ask(name)]


def unknown(model: str) -> Refused:
    """What whoever asks for a model that is not there, or not his, hears."""
    return Refused(404, f"the model {model[:100]!r} does not exist", "model_not_found")


def error_body(message: str, status: int, code: str, param: str | None = None) -> dict[str, Any]:
    """An error as OpenAI's clients read it."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
