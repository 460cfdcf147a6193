"""A server under whatever strangers send: requests made from its own description, and adapter files that are none. It answers
each by a sentence, and goes on answering the others as before."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error

from fedsb.serving.peft_folder import CONFIG_FILE, WEIGHTS_FILE
from fedsb.serving.sources import source_of
from tests.serving.test_http import Running, text
from tests.serving.test_peft_folder import BROKEN, GOOD
from tests.serving.test_tenants import Shop, finished  # noqa: F401 - a fixture

QUIET = settings(deadline=None, suppress_health_check=list(HealthCheck), max_examples=60)


@pytest.fixture(scope="module")
def running(finished: tuple[Path, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:  # noqa: F811
    """A server of a run's adapters, and of a folder of others, in which somebody writes."""
    shop = Shop(*finished)
    root = tmp_path_factory.mktemp("folders")
    (root / "stranger").mkdir()
    (root / "stranger" / CONFIG_FILE).write_text(json.dumps(GOOD))
    shop.tenants.sources = [*shop.tenants.sources, source_of(root, shop.source.sha256, shop.bank.layers)]
    found = Running(shop)
    yield found
    found.close()


@pytest.fixture(scope="module")
def before(running: Running) -> dict[str, str]:
    """What tenants say as long as nobody disturbs them."""
    return {name: text(running.client(), name) for name in ("base", "client-0", "client-1", "client-2")}


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
@pytest.mark.usefixtures("before")  # so that it is known what was said before
def test_no_request_breaks_it(mode: GenerationMode, running: Running) -> None:
    """As its own description has them, and as it has them not: never a 5xx, and an error is always told."""
    asked: set[str] = set()

    def ask(case: Any) -> None:
        response = case.call(headers={"Authorization": "Bearer none"})
        case.validate_response(response, checks=[not_a_server_error])
        if response.status_code >= 400 and case.path.startswith("/v1/"):
            assert response.json()["error"]["message"]
        asked.add(case.path)

    for each in schemathesis.openapi.from_url(f"{running.url}/openapi.json").get_all_operations():
        operation = each.ok()
        if mode is GenerationMode.POSITIVE or operation.body:  # any text is a path
            QUIET(given(operation.as_strategy(generation_mode=mode))(ask))()
    assert {"/v1/completions", "/v1/chat/completions", "/v1/load_lora_adapter"} <= asked


def test_it_goes_on_as_before(running: Running, before: dict[str, str]) -> None:
    assert running.quiet()
    for name, said in before.items():
        running.post("/v1/load_lora_adapter", {"lora_name": name})  # if a made-up request has unloaded it
        assert text(running.client(), name) == said


@settings(QUIET, max_examples=300)
@given(BROKEN)
def test_files_that_are_no_adapters_are_refused_and_nobody_notices(running: Running, before: dict[str, str], data: bytes) -> None:
    root = running.shop.tenants.sources[1].root  # type: ignore[attr-defined]
    (root / "stranger" / WEIGHTS_FILE).write_bytes(data)
    found = running.post("/v1/load_lora_adapter", {"lora_name": "stranger"})
    assert found.status_code in (200, 400), found.text
    if found.status_code == 400:
        assert found.json()["error"]["message"] == "the adapter stranger cannot be loaded; the server's log says why"
        assert str(root) not in found.text
    assert text(running.client(), "client-0") == before["client-0"]
