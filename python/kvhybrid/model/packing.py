"""Which packing serves a model, found by running it: two texts of different lengths through a ``Runner``.

Both are prefilled in one step, then a chunk of one goes with a single token of the other, then both
decode; the logits must be the ones that the model gives for each text alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from transformers.cache_utils import DynamicCache

from kvhybrid._core import Batch, CapacityError
from kvhybrid.cache.measured import in_evaluation, input_device
from kvhybrid.cache.step import Step
from kvhybrid.errors import UnsupportedError
from kvhybrid.model.padding import vocab_size
from kvhybrid.model.probe import difference, obstacle_to_paging, own_logits, reason, refuse, trial_cache
from kvhybrid.model.probe_states import refuse_states
from kvhybrid.model.runner import Packing, Runner
from kvhybrid.model.versions import over

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from kvhybrid.cache.kv_cache import KVCache
    from kvhybrid.layout import KVLayout

# New tokens of the two texts, step by step.
STEPS = ((11, 6), (5, 1), (1, 1))


def choose_packing(model: PreTrainedModel, layout: KVLayout, *, alone: bool = False) -> tuple[Packing, str]:
    """Return the fastest packing that gives the model's own logits, and why it was chosen.

    ``alone``: rows are never packed, so that no row's sums depend on who else is there.
    Raises ``UnsupportedError`` with both reasons when neither does.
    """
    refuse(model)
    refuse_states(model, "an engine's steps take rows as they come; kvhybrid.attach serves such models")
    with in_evaluation(model), torch.inference_mode():
        return _choose(model, layout, alone=alone)


def _choose(model: PreTrainedModel, layout: KVLayout, *, alone: bool) -> tuple[Packing, str]:
    own_logits(model, layout)  # or it is refused
    vocab = vocab_size(model)
    lengths = [sum(counts) for counts in zip(*STEPS, strict=True)]
    texts = [(np.arange(n) * (7 + 4 * row) + 3 + row) % vocab for row, n in enumerate(lengths)]
    expected = torch.cat(_own_logits(model, texts))
    problem = "every row is computed alone" if alone else obstacle_to_paging(model)
    problem = problem or _try(model, layout, Packing.RAGGED, texts, expected)
    if problem is None:
        return Packing.RAGGED, "packed rows give the model's own logits"
    worse = _try(model, layout, Packing.ROWWISE, texts, expected)
    if worse is None:
        return Packing.ROWWISE, problem
    raise UnsupportedError(f"{type(model).__name__}: ragged: {problem}; rowwise: {worse}")


def _own_logits(model: PreTrainedModel, texts: list[np.ndarray]) -> list[torch.Tensor]:
    """Return, step by step, the logits ``[2, vocab]`` behind each text's last token of the step."""
    caches = [DynamicCache(config=model.config) for _ in texts]
    done, kept = [0] * len(texts), []
    for counts in STEPS:
        rows = []
        for row, count in enumerate(counts):
            ids = torch.from_numpy(texts[row][done[row] : done[row] + count]).to(input_device(model))
            output = model(input_ids=ids[None], **over(caches[row]), use_cache=True)
            rows.append(output.logits[0, -1].float())
            done[row] += count
        kept.append(torch.stack(rows))
    return kept


def _try(
    model: PreTrainedModel,
    layout: KVLayout,
    packing: Packing,
    texts: list[np.ndarray],
    expected: torch.Tensor,
) -> str | None:
    """Run the texts in ``packing``; return what is wrong with it, or None."""
    cache = trial_cache(model, layout, [len(text) for text in texts])
    runner = Runner(model, cache.storage, packing)
    try:
        found = torch.cat(_packed_logits(runner, cache, texts))
    except CapacityError:
        raise
    except Exception as error:  # noqa: BLE001  # whatever a model raises, it is the reason not to pack so
        return reason(error)
    finally:
        runner.close()
    return difference(found, expected, layout)


def _packed_logits(runner: Runner, cache: KVCache, texts: list[np.ndarray]) -> list[torch.Tensor]:
    rows = [cache.pool.open(text.astype(np.uint32)) for text in texts]
    batch, kept = Batch(cache.pool, rows), []
    done = [0] * len(texts)
    for counts in STEPS:
        step = Step.plan(cache.storage, batch, np.array(counts, np.int32))
        new = [text[at : at + count] for text, at, count in zip(texts, done, counts, strict=True)]
        kept.append(runner.run(step, torch.from_numpy(np.concatenate(new)), range(len(texts))))
        step.commit()
        done = [at + count for at, count in zip(done, counts, strict=True)]
    for row in rows:
        row.close()
    return kept
