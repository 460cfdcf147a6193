import pytest

from benchmarks import secure_sum
from tests.benchmarks.samples import check, last_line


def test_a_toy_run_ends_with_its_figures(capsys: pytest.CaptureFixture[str]) -> None:
    secure_sum.main(["--clients", "5", "--size", "5000", "--peer-clients", "2"])
    result = last_line(capsys)
    keys = {"extra_bytes", "client_seconds", "server_seconds", "server_seconds_lost", "mean_error"}
    check(result, "secure_sum", keys)
    found = result["figures"]
    assert found["mean_error"]["value"] <= 1
    names, count = 11, 5  # `hospital-00`
    extra = 64 + 32 + 80 * (count - 1) + 32 * count + 2 + count * (65 + names) + 1 + 80 * (count - 1) + 1
    assert found["extra_bytes"]["bytes"][0] == 4 * 5000 + extra
    assert found["extra_bytes"]["value"] == pytest.approx(extra / 20_000, rel=1e-4)
    assert set(found["client_seconds"]["stages"]) == {"advertise", "share", "mask", "reveal"}
    assert found["extra_bytes"]["peer"] > 1  # Flower's masked numbers take 8 bytes
