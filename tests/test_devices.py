"""The package names the device of every tensor that it makes: the caller may have set another default."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "python" / "kvhybrid"
FACTORIES = {
    *("zeros", "empty", "arange", "tensor", "full", "ones", "rand", "randn", "randint", "as_tensor"),
    *("eye", "linspace", "randperm"),
}
FILES = sorted(path for path in PACKAGE.rglob("*.py") if "triton" not in path.parts)


def made_without_a_device(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        is_torch = isinstance(node.func.value, ast.Name) and node.func.value.id == "torch"
        named = {keyword.arg for keyword in node.keywords}
        if is_torch and node.func.attr in FACTORIES and not named & {"device", None}:
            yield node.lineno


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_every_tensor_is_made_on_a_device_that_is_named(path):
    assert list(made_without_a_device(path)) == []


PROGRAM = """
import anyio, torch, kvhybrid
from kvhybrid import KVCacheConfig, KVEngine
from kvhybrid.model.load import load_model
model, tokenizer = load_model()
ids = torch.arange(5, 405)[None] % 400
expected = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
{default}
options = {{"use_quantization": True, "quantization_bits": 8, "cache_strategy": "adaptive"}}
config = KVCacheConfig(max_tokens=1024, block_size=16, **options)
with kvhybrid.attach(model, config=config) as attachment:
    session = attachment.cache.session("a")
    with torch.device("cpu"):
        for _ in range(2):
            found = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
            other = model.generate(ids + 1, max_new_tokens=4, do_sample=False, pad_token_id=0)
            assert torch.equal(found, expected)
    assert attachment.cache.get_stats()["demoted_pages"] > 0
    cache = attachment.cache
    shape = (1, cache.layout.num_kv_heads, 40, cache.layout.head_dim)
    keys = torch.ones(shape, device="cpu", dtype=torch.float32)
    for layer in range(cache.layout.num_layers):
        cache.process_kv(keys, keys, layer_idx=layer)


async def main():
    async with KVEngine(model, config, tokenizer=tokenizer) as engine:
        for _ in range(2):
            answer = await engine.process_request({{"token_ids": ids[0].tolist(), "max_length": 4}})
            assert answer["token_ids"] == expected[0, 400:].tolist(), answer


{engine}
"""


@pytest.mark.parametrize(
    ("default", "engine"),
    [
        ("torch.set_default_device('cpu')", "anyio.run(main)"),
        ("torch.set_default_dtype(torch.float64)", "anyio.run(main)"),
        ("torch.set_default_dtype(torch.bfloat16)", "anyio.run(main)"),
    ],
)
def test_other_defaults_of_torch_change_nothing(default, engine):
    program = PROGRAM.format(default=default, engine=engine)
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
