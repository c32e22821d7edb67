"""``kvhybrid doctor``: what this machine has, what a model keeps, and how it would be served, or why not.

Decides nothing itself: it asks what ``attach`` and the engine ask, and prints what they find.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from transformers.utils import logging

from kvhybrid.cache.kv_cache import KVCache
from kvhybrid.config import KVCacheConfig
from kvhybrid.errors import KVHybridError
from kvhybrid.model.embedded_model import embedded_model_path
from kvhybrid.model.load import load_weights
from kvhybrid.model.obstacles import standing_obstacle
from kvhybrid.model.original import original
from kvhybrid.model.packing import choose_packing
from kvhybrid.model.probe import choose_route, try_routes
from kvhybrid.model.threads import in_own_thread
from kvhybrid.report import machine, versions

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel

    from kvhybrid.layout import KVLayout

    Findings = dict[str, Any]


def run_doctor(path: Path | None, *, device: str, as_json: bool) -> bool:
    """Examine the model at ``path``, print what was found, and return whether it is served.

    Whatever a model or its configuration raises is a finding and no traceback.
    """
    logging.disable_progress_bar()
    findings = in_own_thread(examine, path, device)
    if as_json:
        sys.stdout.write(json.dumps(findings, indent=2) + "\n")
    else:
        _print(findings)
    return "refused" not in findings


def examine(path: Path | None, device: str) -> Findings:
    """Return everything that the command prints; ``refused`` is there when ``attach`` would refuse."""
    findings: Findings = {"machine": machine(), "versions": versions()}
    try:
        model = original(
            load_weights(path if path is not None else embedded_model_path(), torch.device(device), None)
        )
        findings["model"] = _describe(model)
        layout = KVCache.for_model(model, KVCacheConfig(max_tokens=1024, max_memory_mb=None)).layout
        findings["layout"] = _measure(layout)
        findings["routes"] = [
            {
                "route": str(trial.route),
                "difference": trial.difference,
                "allowed": trial.allowed,
                "problem": trial.problem,
            }
            for trial in try_routes(model, layout)
        ]
        route, reason = choose_route(model, layout)
        findings["attach"] = {"route": str(route), "reason": reason, "passes_by": standing_obstacle(model)}
    except KVHybridError as error:
        findings["refused"] = str(error)
        return findings
    except Exception as error:  # noqa: BLE001  # a model's own code may raise anything
        findings["refused"] = f"{type(error).__name__}: {error}"
        return findings
    try:
        packing, reason = choose_packing(model, layout)
        findings["engine"] = {"packing": str(packing), "reason": reason}
    except KVHybridError as error:
        findings["engine"] = {"refused": str(error)}
    return findings


def _describe(model: PreTrainedModel) -> Findings:
    weight = next(model.parameters())
    return {
        "class": type(model).__name__,
        "family": model.config.model_type,
        "parameters": sum(p.numel() for p in model.parameters()),
        "dtype": str(weight.dtype).removeprefix("torch."),
        "device": str(weight.device),
        "attention": model.config._attn_implementation,
    }


def _measure(layout: KVLayout) -> Findings:
    shapes = Counter(layout.layers)
    return {
        "layers": [
            {
                "layers": count,
                "num_kv_heads": shape.num_kv_heads if shape is not None else 0,
                "head_dim": shape.head_dim if shape is not None else 0,
                "value_head_dim": shape.value_head_dim if shape is not None else 0,
            }
            for shape, count in shapes.items()
        ],
        "dtype": layout.dtype,
        "bytes_per_token": layout.bytes_per_token,
        "block_size": layout.block_size,
        "bytes_per_page": layout.bytes_per_page,
        "state_bytes": layout.state_bytes,
        "fingerprint": layout.fingerprint,
    }


def _print(findings: Findings) -> None:
    console = Console(highlight=False, soft_wrap=True)

    def line(name: str, text: str) -> None:
        console.print(f"[bold]{name:<9}[/]", end="")
        console.print(text, markup=False)

    here = findings["machine"]
    line("machine", f"{here['cpu']}, {here['cores']} cores, {here['system']}")
    line("versions", ", ".join(f"{name} {version}" for name, version in findings["versions"].items()))
    if (model := findings.get("model")) is not None:
        line(
            "model",
            f"{model['class']} ({model['family']}), {model['parameters']:,} parameters, {model['dtype']} on "
            f"{model['device']}, attends through {model['attention']!r}",
        )
    if (layout := findings.get("layout")) is not None:
        line("layout", _layers(layout))
        line(
            "",
            f"{layout['bytes_per_token']:,} bytes a token, {layout['bytes_per_page']:,} a page of "
            f"{layout['block_size']} tokens; fingerprint {layout['fingerprint']}",
        )
    for trial in findings.get("routes", ()):
        line("route", f"{trial['route']}: {_outcome(trial)}")
    if (attach := findings.get("attach")) is not None:
        line("attach", f"{attach['route']} route: {attach['reason']}")
        if attach["passes_by"] is not None:
            line("", f"but every plain call of generate passes the cache by: {attach['passes_by']}")
    if (engine := findings.get("engine")) is not None:
        served = f"{engine['packing']} packing: {engine['reason']}" if "packing" in engine else "refused: "
        line("engine", served + engine.get("refused", ""))
    if (refused := findings.get("refused")) is not None:
        line("refused", refused)


def _layers(layout: Findings) -> str:
    parts = [
        f"{_counted(shape['layers'], 'layer')} of {_counted(shape['num_kv_heads'], 'head')}, "
        f"K {shape['head_dim']} and V {shape['value_head_dim']} wide"
        if shape["num_kv_heads"]
        else f"{_counted(shape['layers'], 'layer')} without K and V"
        for shape in layout["layers"]
    ]
    if layout["state_bytes"]:
        parts.append(f"{layout['state_bytes']:,} bytes of state a text")
    return "; ".join(parts) + f"; {layout['dtype']}"


def _counted(number: int, word: str) -> str:
    return f"{number} {word}" if number == 1 else f"{number} {word}s"


def _outcome(trial: Findings) -> str:
    if trial["difference"] is None:
        return str(trial["problem"])
    found = f"logits differ by {trial['difference']:.2g} of {trial['allowed']:.2g} allowed"
    return found if trial["problem"] is None else f"not taken: {found}"
