"""What compression costs a model: perplexity behind a compressed prefix, by scorer and share kept.

Measured through sessions of the attached model, as its users have them. Knows sessions; what else can be done
to a prefix is ``kvhybrid.model.perplexity``'s.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from kvhybrid.cache.measured import input_device
from kvhybrid.errors import InvalidRequestError
from kvhybrid.model.perplexity import Quality, judge, window_nats
from kvhybrid.model.versions import over

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kvhybrid.model.attach import Attachment
    from kvhybrid.model.transformers_cache import PagedSession
    from kvhybrid.presets import CompressionScorer

WHOLE = "full precision"


class Setting(NamedTuple):
    """One way to compress."""

    scorer: CompressionScorer
    kept: float

    def __str__(self) -> str:
        return f"{self.scorer.value} {self.kept:g}"


@torch.inference_mode()
def measure_compression(
    attachment: Attachment,
    ids: torch.Tensor,
    settings: Sequence[Setting],
    *,
    prefix: int = 768,
    scored: int = 256,
    windows: int | None = None,
    batch_size: int = 4,
    tick: Callable[[], object] = lambda: None,
) -> dict[str, Quality]:
    """Return what each setting costs, by its name; without one, ``"full precision"``.

    ``ids``: int64 ``[tokens]``, cut as by ``measure_quality``. Scorers that ask for queries need a cache
    whose configuration names one of them. There must be room for ``prefix + scored`` tokens of every row of
    a batch, and twice as many again.

    Raises ``InvalidRequestError`` when the text has not one window, ``CapacityError`` without room, and what
    ``PagedSession.compress`` does.
    """
    length = prefix + scored + 1
    whole = len(ids) // length
    if whole == 0:
        raise InvalidRequestError(f"the text has {len(ids)} tokens, and a window takes {length}")
    rows = ids[: whole * length].view(whole, length)[:windows]
    names = {str(setting): setting for setting in settings}
    nats: dict[str, list[torch.Tensor]] = {name: [] for name in (WHOLE, *names)}
    divergence = dict.fromkeys(names, 0.0)
    for batch in rows.to(input_device(attachment.model)).split(batch_size):
        session = attachment.session("")
        try:
            attachment.model(input_ids=batch[:, :prefix], **over(session))
            truth = _guesses(attachment, session, None, batch[:, prefix:-1])
            targets = batch[:, prefix + 1 :]
            nats[WHOLE].append(window_nats(truth, targets))
            for name, setting in names.items():
                guesses = _guesses(attachment, session, setting, batch[:, prefix:-1])
                nats[name].append(window_nats(guesses, targets))
                further = torch.nn.functional.kl_div(guesses, truth, reduction="sum", log_target=True)
                divergence[name] += float(further)
        finally:
            session.close()
        tick()
    windows_nats = {name: torch.cat(found) for name, found in nats.items()}
    scored_tokens = len(rows) * scored
    return {
        name: judge(
            found,
            windows_nats[WHOLE],
            divergence=divergence.get(name, 0.0) / scored_tokens,
            refused_pages=0,
        )
        for name, found in windows_nats.items()
    }


def _guesses(
    attachment: Attachment, session: PagedSession, setting: Setting | None, ids: torch.Tensor
) -> torch.Tensor:
    """Return log-probabilities behind each of ``ids``, which follow a compressed fork of the session."""
    (fork,) = session.fork()
    try:
        if setting is not None:
            fork.compress(setting.kept, scorer=setting.scorer)
        logits = attachment.model(input_ids=ids, **over(fork)).logits
    finally:
        fork.close()
    return torch.log_softmax(logits.float(), -1)
