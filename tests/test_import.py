"""Importing the package costs next to nothing, and the public surface is what it says."""

import pickle
import subprocess
import sys
import threading

import pytest

import kvhybrid
import kvhybrid.errors


def loaded_after(statement):
    """The top-level modules that a fresh interpreter holds after one statement."""
    code = f"import sys; {statement}; print(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    return set(done.stdout.split())


def test_importing_the_package_loads_nothing_heavy():
    loaded = loaded_after("import kvhybrid")
    assert "kvhybrid" in loaded
    assert not loaded & {"torch", "transformers", "anyio", "numpy", "pydantic"}


@pytest.mark.parametrize("name", ["KVCacheConfig", "KVLayout", "UnsupportedError", "CacheStrategy"])
def test_configuration_does_without_torch(name):
    assert not loaded_after(f"from kvhybrid import {name}") & {"torch", "transformers", "anyio"}


@pytest.mark.parametrize("name", kvhybrid.__all__)
def test_every_public_name_is_there(name):
    assert getattr(kvhybrid, name) is getattr(kvhybrid, name)
    assert name in dir(kvhybrid)


def test_a_name_that_is_not_public_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = kvhybrid.nonsense
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = kvhybrid.errors.nonsense


def test_every_error_has_the_common_ancestor_and_is_public():
    for name in kvhybrid.errors.__all__:
        error = getattr(kvhybrid.errors, name)
        assert issubclass(error, kvhybrid.KVHybridError)
        assert getattr(kvhybrid, name) is error
        assert error.__module__ == "kvhybrid"
        assert error.__doc__


def test_running_out_of_memory_is_also_torchs_error():
    torch = pytest.importorskip("torch")
    assert issubclass(kvhybrid.OutOfMemoryError, kvhybrid.CapacityError)
    assert issubclass(kvhybrid.OutOfMemoryError, torch.OutOfMemoryError)
    with pytest.raises(torch.OutOfMemoryError, match="no room") as caught:
        raise kvhybrid.OutOfMemoryError("no room")
    again = pickle.loads(pickle.dumps(caught.value))
    assert type(again) is kvhybrid.OutOfMemoryError
    assert again.args == ("no room",)


def test_errors_do_without_torch_until_its_own_is_asked_for():
    assert "torch" not in loaded_after("import kvhybrid.errors; kvhybrid.errors.CapacityError")
    assert "torch" in loaded_after("import kvhybrid.errors; kvhybrid.errors.OutOfMemoryError")


def test_there_is_one_class_for_running_out_of_memory_however_many_ask_at_once(monkeypatch):
    pytest.importorskip("torch")
    monkeypatch.delitem(vars(kvhybrid.errors), "OutOfMemoryError", raising=False)
    start, found = threading.Barrier(8), []

    def ask():
        start.wait()
        found.append(kvhybrid.errors.OutOfMemoryError)

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len(set(found)) == 1


def test_overload_says_when_to_come_back():
    assert kvhybrid.OverloadedError("full", 1.5).retry_after == 1.5
