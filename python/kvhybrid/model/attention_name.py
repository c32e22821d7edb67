"""``StandIn``: a model attends through us for one forward pass, in one thread, and no object says so.

Models of ``transformers`` look their attention up by a name in their configuration. Others may share that
object, copy, pickle or save it at any time, in any thread, so nothing is ever written there: for the length
of a pass, in its thread, the model's configurations answer with another name when they are asked.
"""

from __future__ import annotations

import functools
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

import torch
from transformers.configuration_utils import PretrainedConfig
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from kvhybrid.model.interface import paged_attention_forward, paged_mask, reading_pages
from kvhybrid.model.own_attention import OURS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedModel

__all__ = ["StandIn"]

_NAME: Final = "_attn_implementation"
_OWN: Final[property] = vars(PretrainedConfig)[_NAME]

_thread = threading.local()
_lock = threading.Lock()


def _shown(config: PretrainedConfig) -> str | None:
    """Return what a configuration names its attention: its own, or in a pass over pages ours."""
    own: str | None = _OWN.__get__(config)
    if torch.compiler.is_compiling():  # traced code never reads pages
        return own
    return getattr(_thread, "names", {}).get(id(config), own)


def _install() -> None:
    """Register our functions and have configurations ask ``_shown``. Once for the process."""
    with _lock:
        if vars(PretrainedConfig)[_NAME] is not _OWN:
            return
        for own, ours in OURS.items():
            AttentionInterface.register(ours, functools.partial(paged_attention_forward, own))
            AttentionMaskInterface.register(ours, functools.partial(paged_mask, own))
        setattr(PretrainedConfig, _NAME, property(_shown, _OWN.fset, _OWN.fdel, _OWN.__doc__))


class StandIn:
    """Stands in for one model's attention. The model's own must be one that ours stand for."""

    def __init__(self, model: PreTrainedModel) -> None:
        _install()
        found = (getattr(module, "config", None) for module in model.modules())
        known = {id(config): config for config in found if isinstance(config, PretrainedConfig)}
        self._configs = list(known.values())

    @contextmanager
    def attending(self, *, reads_pages: bool = True) -> Iterator[None]:
        """Have the model attend through us inside. ``reads_pages``: its keys may stand for pages."""
        before = getattr(_thread, "names", {})
        own = {id(config): _OWN.__get__(config) for config in self._configs}
        _thread.names = {key: OURS[name] for key, name in own.items() if name in OURS}
        try:
            with reading_pages(reads_pages):
                yield
        finally:
            _thread.names = before
