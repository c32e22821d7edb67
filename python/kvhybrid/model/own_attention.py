"""What a model attends with when it reads no pages: torch's attention, or eager code of its own.

Each stands behind a name of ours, so that whoever made the mask knows for whom. Eager code is a function of
the model's own file; torch's attention leaves out soft caps and sinks, which is what such a model then says.
"""

from __future__ import annotations

import inspect
import sys
from typing import TYPE_CHECKING, Any, Final

from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

from kvhybrid.errors import UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import torch

SDPA: Final = "sdpa"
EAGER: Final = "eager"
OURS: Final[Mapping[str, str]] = {SDPA: "kvhybrid", EAGER: "kvhybrid_eager"}
"""A model's own implementation, and what stands for it while the model attends through us."""
MASKS: Final[Mapping[str, Callable[..., torch.Tensor | None]]] = {SDPA: sdpa_mask, EAGER: eager_mask}

CAP: Final = "softcap"
SINKS: Final = "s_aux"
EXTRAS: Final[Mapping[str, tuple[str, ...]]] = {SDPA: (), EAGER: (CAP, SINKS)}
"""Arguments beside the scale and the window that an implementation computes, and we with it."""


def attend_itself(
    own: str, module: torch.nn.Module, *args: Any, **kwargs: Any
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Call the attention function that ``module`` has without us.

    Raises ``UnsupportedError`` for eager code that is not where transformers has it.
    """
    function = sdpa_attention_forward if own == SDPA else _eager_function(module)
    found: tuple[torch.Tensor, torch.Tensor | None] = function(module, *args, **kwargs)
    return found


def _eager_function(module: torch.nn.Module) -> Callable[..., Any]:
    """Return the eager function of the file that the module's ``forward`` comes from."""
    source = sys.modules.get(inspect.unwrap(type(module).forward).__module__)
    function: Callable[..., Any] | None = getattr(source, "eager_attention_forward", None)
    if function is None:
        raise UnsupportedError(f"{type(module).__name__} has no eager_attention_forward beside it")
    return function
