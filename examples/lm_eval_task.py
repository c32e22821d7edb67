"""lm-eval on a local task: many continuations after one context, the context computed once.

lm-eval runs context and continuation together, anew for every choice, and never shows the model a cache, so
nothing can be saved behind its back. One method of its model class is overridden here; tasks, metrics and
everything else are lm-eval's own, and so is what it must come to: the same scores.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lm_eval import evaluator
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from saved import Saved, counting

import kvhybrid
from kvhybrid.model.load import load_model
from kvhybrid.model.scoring import score_continuations

if TYPE_CHECKING:
    from kvhybrid.model.attach import Attachment

TASKS = Path(__file__).parent / "lm_eval_task"


class CachedLM(HFLM):
    """lm-eval's own model, but what stands in front of several continuations runs once."""

    def __init__(self, attachment: Attachment, **kwargs: Any) -> None:
        super().__init__(pretrained=attachment.model, **kwargs)
        self.attachment = attachment

    def _loglikelihood_tokens(self, requests, disable_tqdm=False, override_bs=None):
        by_context: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for index, (_, context, continuation) in enumerate(requests):
            # What is too long for the model is cut from the left, as lm-eval does.
            text = (*context, *continuation)[-(self.max_length + 1) :]
            by_context[text[: -len(continuation)]].append(index)
        scores: dict[int, tuple[float, bool]] = {}
        for context, indices in by_context.items():
            found = score_continuations(self.attachment, context, [requests[index][2] for index in indices])
            scores.update(zip(indices, map(tuple, found), strict=True))
        return [scores[index] for index in range(len(requests))]


def evaluate(lm: HFLM) -> tuple[torch.Tensor, dict[str, float]]:
    """Run the task; return the log-likelihood of every choice, and the metrics."""
    tasks = TaskManager(include_path=str(TASKS), include_defaults=False).load(["next_speech"])
    results = evaluator.evaluate(lm, tasks, bootstrap_iters=0)
    scores = [sample["filtered_resps"] for sample in results["samples"]["next_speech"]]
    metrics = {name: value for name, value in results["results"]["next_speech"].items() if "acc" in name}
    return torch.tensor([[nats for nats, _ in choices] for choices in scores]), metrics


def main() -> Saved:
    """Evaluate the embedded model, without kvhybrid and with it."""
    model, tokenizer = load_model()  # the small model inside the package; yours goes here
    with counting(model) as plain:
        expected, expected_metrics = evaluate(HFLM(pretrained=model, tokenizer=tokenizer))
    with kvhybrid.attach(model) as attachment, counting(model) as cached:
        scores, metrics = evaluate(CachedLM(attachment, tokenizer=tokenizer))

    print(f"accuracy {metrics['acc,none']:.2f}, length-normalised {metrics['acc_norm,none']:.2f}")
    print(
        f"largest difference of {scores.numel()} log-likelihoods: {(scores - expected).abs().max():.1e} nats"
    )
    equal = torch.allclose(scores, expected, rtol=1e-5, atol=1e-4) and metrics == expected_metrics
    saved = Saved(plain.tokens, cached.tokens, equal)
    print(saved)
    return saved


if __name__ == "__main__":
    main()
