"""What every test may rely on: both event loops, a fixed seed, reproducible examples, no network."""

import os
import random
import socket

import pytest
from hypothesis import HealthCheck, settings

# Deadlines would make a busy machine a failing test. CI repeats the same examples on every run.
settings.register_profile(
    "default", deadline=None, max_examples=100, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("ci", settings.get_profile("default"), derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "default")

# The tests' models are so small that a second thread only waits, and on a busy machine for long.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# transformers must look for files here, not on a server.
os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(
    params=[pytest.param(("asyncio", {}), id="asyncio"), pytest.param(("trio", {}), id="trio")],
)
def anyio_backend(request):
    return request.param


@pytest.fixture(autouse=True)
def fixed_seed():
    """Same random numbers in every run; torch is seeded when a test that uses it has imported it."""
    import sys

    random.seed(0)
    if torch := sys.modules.get("torch"):
        torch.manual_seed(0)


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Refuse connections to anything but this machine."""
    connect = socket.socket.connect

    def refuse(self, address):
        local = self.family not in (socket.AF_INET, socket.AF_INET6) or address[0] in (
            "127.0.0.1",
            "::1",
            "localhost",
        )
        if not local:
            raise OSError(f"a test tried to reach {address[0]}")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture
def clean_environment(monkeypatch, tmp_path):
    """No KVHYBRID_* variable and no .env file in reach."""
    for name in [name for name in os.environ if name.upper().startswith("KVHYBRID_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    return tmp_path
