"""What quantized pages cost the embedded model: change of perplexity in percent, beside quanto and hqq.

A prefix of 768 tokens is quantized whole, and the next 256 are scored; windows begin every 256 tokens, so
that no token is scored twice. Once as the model is, and once with one pair of key channels of every KV head
scaled up 20 times and the queries' down alike: the same function, with the outlier channels that larger
models have. ``_512``: prefixes of 384 and 128 scored. ``_kl``: mean divergence of next tokens, nats;
``_error``: the standard error of a change, percent.

The text is the last tenth of the one that the model learnt the rest of (and whose checkpoint it chose).
quanto and hqq go through transformers' layers, in groups of 64: ``quanto4`` and ``hqq4`` as transformers
has them by default, ``quanto4_kivi`` with keys a channel. Either is left out, by name and reason, where it
does not run: quanto builds an extension with a C++ compiler first.
"""

import argparse
import copy
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from kvhybrid.model.embedded_model import load_embedded_model
from kvhybrid.model.perplexity import Quantized, measure_quality
from kvhybrid.report import write_report

TEXT = Path(__file__).resolve().parents[2] / "shared" / "data" / "tinyshakespeare.txt"
SOURCE = "https://github.com/karpathy/char-rnn, data/tinyshakespeare/input.txt"
OUTLIER = 20.0
# The whole of it; a smoke test.
WINDOWS, QUICK_WINDOWS = None, 8
# transformers' layer, bits, axis of the groups of keys and of values
THEIRS = {
    "quanto4": ("QuantoQuantizedLayer", 4, 0, 0),
    "quanto4_kivi": ("QuantoQuantizedLayer", 4, -1, 0),
    "hqq8": ("HQQQuantizedLayer", 8, 0, 0),
    "hqq4": ("HQQQuantizedLayer", 4, 0, 0),
}


def with_outliers(model: Any) -> Any:
    """Return a copy with one rotary pair of key channels a KV head scaled up, and queries down alike."""
    model = copy.deepcopy(model)
    config = model.config
    width, groups = config.head_dim, config.num_attention_heads // config.num_key_value_heads
    with torch.no_grad():
        for layer in model.model.layers:
            attention = layer.self_attn
            keys = attention.k_proj.weight.view(config.num_key_value_heads, width, -1)
            queries = attention.q_proj.weight.view(config.num_key_value_heads, groups, width, -1)
            # Another pair for each head, in the middle frequencies.
            for head in range(config.num_key_value_heads):
                pair = [width // 4 + head, width // 4 + head + width // 2]
                keys[head, pair] *= OUTLIER
                queries[head][:, pair] /= OUTLIER
    return model


def theirs(kind: str, bits: int, key_axis: int, value_axis: int) -> Callable[..., Any]:
    """Return what a layer of transformers' quantized cache makes of K and V.

    Raises ``ImportError`` where its package is not installed, ``RuntimeError`` where it cannot be built.
    """
    from transformers import cache_utils

    layer = getattr(cache_utils, kind)(nbits=bits, axis_key=key_axis, axis_value=value_axis)

    def change(key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        layer.keys, layer.device = key, key.device
        # What their caches do with a prefix; no public method does it alone.
        made = [
            layer._dequantize(layer._quantize(tensor.contiguous(), axis)).view_as(tensor)  # noqa: SLF001  # above
            for tensor, axis in ((key, key_axis), (value, value_axis))
        ]
        return made[0], made[1]

    # quanto builds its extension when it is first used, and that is now rather than among measurements.
    change(*torch.randn(2, 1, 2, 64, 32))
    return change


def changes() -> dict[str, Callable[..., Any]]:
    """Return ours, and those of theirs that run here; say on stderr which do not, and why."""
    found: dict[str, Callable[..., Any]] = {"int8": Quantized(8), "int4": Quantized(4)}
    # Torch's builder looks for ninja on the path alone, where no venv's is that was not activated.
    os.environ["PATH"] = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))
    for name, settings in THEIRS.items():
        try:
            found[name] = theirs(*settings)
        except (ImportError, RuntimeError) as error:
            print(f"{name} is left out: {error}", file=sys.stderr)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a few windows: a smoke test, not a measurement")
    parser.add_argument("--json", metavar="FILE", help="write one JSON object to FILE; - is stdout")
    parser.add_argument("--text", type=Path, default=TEXT, help=f"the plays ({SOURCE})")
    options = parser.parse_args()
    if not options.text.is_file():
        print(f"skipped: no text at {options.text}; --text takes {SOURCE}", file=sys.stderr)
        write_report("quality", {}, options.json)
        return
    whole = options.text.read_text(encoding="utf-8")
    model, tokenizer = load_embedded_model()
    ids = torch.tensor(tokenizer.backend_tokenizer.encode(whole[int(0.9 * len(whole)) :]).ids)
    figures: dict[str, float] = {}
    tried = changes()
    for suffix, subject, prefix, scored in (
        ("", model, 768, 256),
        ("_outlier", with_outliers(model), 768, 256),
        ("_512", model, 384, 128),
        ("_512_outlier", with_outliers(model), 384, 128),
    ):
        found = measure_quality(
            subject,
            ids,
            tried,
            prefix=prefix,
            scored=scored,
            windows=QUICK_WINDOWS if options.quick else WINDOWS,
            batch_size=8,
            tick=lambda: print(".", end="", file=sys.stderr, flush=True),
        )
        figures[f"perplexity{suffix}"] = found.pop("full precision").perplexity
        for name, quality in found.items():
            figures[f"{name}_ppl{suffix}"] = 100 * quality.change
            figures[f"{name}_kl{suffix}"] = quality.divergence
            figures[f"{name}_error{suffix}"] = 100 * quality.error
            if quality.refused_pages:
                raise SystemExit(f"{name}: {quality.refused_pages} pages refused")
    print(file=sys.stderr)
    write_report("quality", figures, options.json)


if __name__ == "__main__":
    main()
