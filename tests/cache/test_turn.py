"""What closes from a finalizer or a signal handler, in the middle of a call of its thread, never hangs."""

import sys
import threading

import pytest
import torch

from kvhybrid import ClosedError, InvalidRequestError, KVCache, KVCacheConfig, KVHybridError, KVLayout
from kvhybrid.cache.turn import Turn


def make(**options):
    layout = KVLayout(num_layers=2, num_kv_heads=1, head_dim=8, dtype=torch.float32, block_size=8)
    return KVCache(KVCacheConfig(max_tokens=512, block_size=8, **options), layout=layout)


def slices():
    return torch.ones(1, 1, 5, 8), torch.ones(1, 1, 5, 8)


class At:
    """Calls something at the ``count``-th line of the package that runs, as a signal handler would."""

    def __init__(self, count, call):
        self.left, self.call = count, call

    def trace(self, frame, event, argument):
        del argument
        if "kvhybrid" not in frame.f_code.co_filename:
            return None
        if event == "line":
            self.left -= 1
            if self.left == 0:
                sys.settrace(None)
                self.call()
        return self.trace

    def __enter__(self):
        self.before = sys.gettrace()
        sys.settrace(self.trace)
        return self

    def __exit__(self, *exc_info):
        sys.settrace(self.before)


ACTS = {
    "close": lambda cache: cache.close(),
    "drop the session": lambda cache: cache.drop_session(),
    "drop another": lambda cache: cache.drop_session("other"),
    "process": lambda cache: process(cache, session_id="default"),
    "statistics": lambda cache: cache.get_stats(),
    "clear": lambda cache: cache.clear(),
}


def process(cache, **options):
    try:
        for layer in (0, 1):
            cache.process_kv(*slices(), layer_idx=layer, **options)
    except (ClosedError, InvalidRequestError) as error:
        return error
    return None


@pytest.mark.parametrize(
    "options", [{}, {"enable_gc": True}, {"use_quantization": True, "quantization_bits": 8}]
)
@pytest.mark.parametrize("act", ACTS.values(), ids=ACTS)
def test_a_handler_may_come_at_any_line(act, options):
    for count in range(1, 400, 7):
        layout = KVLayout(num_layers=2, num_kv_heads=1, head_dim=8, dtype=torch.float32, block_size=16)
        cache = KVCache(KVCacheConfig(**{"max_tokens": 512, "block_size": 16, **options}), layout=layout)
        process(cache, session_id="other")
        with At(count, lambda cache=cache: act(cache)) as at:
            process(cache)
            cache.drop_session()
        cache.close()
        cache.pool.check()
        found = cache.pool.statistics()
        assert (found["mutable_pages"], found["sequences"]) == (0, 0), count
        if at.left > 0:
            break


def test_what_is_asked_within_a_turn_is_done_at_its_end():
    done, turn = [], Turn("it")
    with turn:
        turn.soon(lambda: done.append("later"))
        done.append("first")
        with pytest.raises(InvalidRequestError, match="it is in the middle of a call of this thread"), turn:
            pass
    turn.soon(lambda: done.append("now"))
    assert done == ["first", "later", "now"]


def test_nobody_waits_for_another_threads_turn():
    done, turn, has_turn, goes_on = [], Turn("it"), threading.Event(), threading.Event()

    def hold():
        with turn:
            has_turn.set()
            assert goes_on.wait(30)

    thread = threading.Thread(target=hold)
    thread.start()
    assert has_turn.wait(30)
    turn.soon(lambda: done.append("later"))
    assert not done
    goes_on.set()
    thread.join()
    assert done == ["later"]


def test_what_raises_in_a_turn_leaves_it_free():
    done, turn = [], Turn("it")
    with pytest.raises(ZeroDivisionError), turn:
        turn.soon(lambda: 1 / 0)
    with turn:
        done.append("again")
    assert done == ["again"]


@pytest.mark.parametrize("rows", [65, 100_000, 2**40])
def test_more_rows_than_pages_are_refused_before_anything_is_made(rows, monkeypatch):
    cache = make()
    monkeypatch.setattr("kvhybrid.cache.process_kv.TensorSession", lambda *_: pytest.fail("was made"))
    many = torch.ones(1, 1, 5, 8).expand(rows, 1, 5, 8)
    with pytest.raises(KVHybridError, match="rows"):
        cache.process_kv(many, many)
    assert len(cache._tensors) == 0
