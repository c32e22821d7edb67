"""Every causal language model class of the installed transformers: what ``attach`` makes of a tiny one.

Either it is served, and its texts are the model's own to the token, or it is refused with the reason.
``python tests/compatibility.py --json FILE`` tries them all; ``--table FILE...`` prints what several
versions found. ``make test-transformers`` does both.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import warnings
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers
from tiny_models import VOCAB, family_names, small_model

import kvhybrid
from kvhybrid import KVCacheConfig, KVHybridError
from kvhybrid.model.versions import over

SECONDS = 120
NEW = 8
FORWARD = (21, 1, 7, 1, 1)
# Tiny models with sharp logits, float32: what another order of summing explains, with room.
ALLOWED = 1e-3


WRITTEN = (
    "Written by `make test-transformers`, which makes a tiny model of every causal language model class of "
    "each version and attaches it; do not edit. Greedy texts (of new and known prompts, of prompts that "
    "share an opening, of a padded batch) are compared with the model's own to the token; the figure is the "
    "largest difference of logits, float32, between a text fed in steps over the cache and in one pass "
    "without. Empty: not in that version. Skipped: no tiny model of it could be made."
)


def random_ids(length: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB - 5, (1, length), generator=generator)


def texts(model: Any) -> list[torch.Tensor]:
    """Return greedy texts of prompts that are new, known, share openings and lie padded in a batch."""
    first, other = random_ids(37, 1), random_ids(37, 2)
    changed = torch.cat([first[:, :22], random_ids(9, 3)], dim=1)
    batch = torch.cat([first, other])
    mask = torch.ones_like(batch)
    batch[1, :5], mask[1, :5] = 0, 0
    calls = [(first, None), (first, None), (changed, None), (batch, mask), (other, None)]
    return [
        model.generate(
            ids,
            attention_mask=mask if mask is not None else torch.ones_like(ids),
            max_new_tokens=NEW,
            do_sample=False,
        )
        for ids, mask in calls
    ]


def logits_in_steps(model: Any, past: Any) -> torch.Tensor:
    """Return the logits of a text fed in steps, each behind what ``past`` holds of it."""
    ids, done, found = random_ids(sum(FORWARD), 4), 0, []
    for width in FORWARD:
        fed = ids[:, done : done + width]
        found.append(model(input_ids=fed, **over(past), use_cache=True).logits)
        done += width
    return torch.cat(found, dim=1)


def examine(family: str) -> dict[str, Any]:
    """Return what became of a family: ``skipped``, ``refused``, or its ``route`` and what was compared."""
    try:
        model = small_model(family)
        own_texts = texts(model)
        own_logits = model(input_ids=random_ids(sum(FORWARD), 4), use_cache=False).logits
    except Exception as error:  # noqa: BLE001  # a class that wants something else is no finding of ours
        return {"skipped": _short(error)}
    try:
        attachment = kvhybrid.attach(model, config=KVCacheConfig(max_tokens=4096, block_size=8))
    except KVHybridError as error:
        return {"refused": str(error)}
    with attachment:
        ours = texts(model)
        logits = logits_in_steps(model, attachment.cache.session("steps"))
    return {
        "route": str(attachment.route),
        "reason": attachment.reason,
        "equal": all(map(torch.equal, own_texts, ours)),
        "difference": float((own_logits - logits).abs().max()),
    }


def is_wrong(found: dict[str, Any]) -> bool:
    """Return whether an answer was wrong, or an error was not one of ours."""
    return "failed" in found or ("route" in found and not (found["equal"] and found["difference"] < ALLOWED))


def _short(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def _expired(*_: object) -> None:
    raise TimeoutError(f"more than {SECONDS} s")


def examine_all(families: list[str]) -> dict[str, Any]:
    signal.signal(signal.SIGALRM, _expired)
    results = {}
    for family in families:
        signal.alarm(SECONDS)
        try:
            with torch.no_grad():
                results[family] = examine(family)
        except Exception as error:  # noqa: BLE001  # what nobody foresaw is what this looks for
            results[family] = {"failed": _short(error)}
        signal.alarm(0)
        sys.stdout.write(f"{family:28} {json.dumps(results[family])}\n")
        sys.stdout.flush()
    return results


def _cell(found: dict[str, Any] | None) -> str:
    if found is None:
        return ""
    if "route" in found:
        return f"{found['route']}, {'equal' if found['equal'] else 'DIFFERENT'}, {found['difference']:.0e}"
    return next(name for name in ("refused", "skipped", "failed") if name in found)


def table(reports: list[dict[str, Any]]) -> str:
    """Return the reports as a page of Markdown: a row a family, then why others are not served."""
    versions = [report["transformers"] for report in reports]
    found = [report["families"] for report in reports]
    names = sorted({name for families in found for name in families})
    served = [name for name in names if any("route" in families.get(name, {}) for families in found)]
    lines = [
        "# Which models are served",
        "",
        WRITTEN,
        "",
        f"| family | {' | '.join(versions)} |",
        "| --- |" + " --- |" * len(versions),
    ]
    lines += [f"| {name} | {' | '.join(_cell(f.get(name)) for f in found)} |" for name in served]
    newest = found[-1]
    for kind, heading in (("refused", "Refused"), ("skipped", "Not tried: no tiny model could be made")):
        lines += ["", f"## {heading} ({versions[-1]})", ""]
        lines += [f"- {name}: {newest[name][kind]}" for name in names if kind in newest.get(name, {})]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write what was found to this file")
    parser.add_argument("--table", type=Path, nargs="+", help="print these files as a table, oldest first")
    parser.add_argument("families", nargs="*", help="all by default")
    options = parser.parse_args()
    if options.table:
        sys.stdout.write(table([json.loads(path.read_text()) for path in options.table]))
        return 0
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    results = examine_all(options.families or family_names())
    if options.json:
        report = {"transformers": transformers.__version__, "families": results}
        options.json.write_text(json.dumps(report, indent=1))
    wrong = [family for family, found in results.items() if is_wrong(found)]
    sys.stdout.write(f"{transformers.__version__}: {len(results)} families, wrong: {wrong or 'none'}\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
