"""The training loop: windows in, the best model by validation out."""

import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from embedded.corpus import conversations
from embedded.measure import encode, validation_loss
from embedded.muon import Muon

PHASES = ((0.40, (256,)), (0.55, (512,)), (1.0, (*7 * (1024,), 4096)))
"""(until this share of the steps, windows in tokens, taken in turn). Short windows are cheap and teach
almost everything; from there on the model learns in the context that it is measured and shown in, and a
few windows as long as its positions reach keep the distant ones from being noise."""

VALIDATION_WINDOW = 1024
"""Tokens; the windows whose validation loss chooses the weights that are kept."""


@dataclass(frozen=True)
class Recipe:
    """What a run depends on, besides the text."""

    seed: int = 0
    steps: int = 1600
    batch_tokens: int = 4096
    vocab_size: int = 1024
    context: int = 4096
    muon_lr: float = 0.02
    adamw_lr: float = 0.003
    weight_decay: float = 0.1
    dropout: float = 0.3
    chat_share: float = 0.12
    constant_share: float = 0.3
    eval_every: int = 100
    bfloat16: bool = False


@dataclass(frozen=True)
class Progress:
    """One step's outcome; `validation` (nats a byte) only where it was measured."""

    step: int
    loss: float
    validation: float | None


def build_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Return the untrained model, float32, with dropout on both residual branches."""
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=192,
            num_hidden_layers=6,
            num_attention_heads=6,
            num_key_value_heads=2,
            head_dim=32,
            intermediate_size=512,
            max_position_embeddings=recipe.context,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )

    def drop(module: torch.nn.Module, _inputs: object, output: Tensor) -> Tensor:
        return functional.dropout(output, recipe.dropout, training=module.training)

    # Llama has no residual dropout of its own; hooks add it and leave nothing in the weights.
    for layer in model.model.layers:
        layer.self_attn.o_proj.register_forward_hook(drop)
        layer.mlp.down_proj.register_forward_hook(drop)
    return model


def build_optimizers(recipe: Recipe, model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Return Muon for the layers' matrices and AdamW for the embedding and the norms."""
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    norms = [p for p in model.parameters() if p.ndim < 2]
    groups = [
        {"params": [model.get_input_embeddings().weight], "weight_decay": recipe.weight_decay},
        {"params": norms, "weight_decay": 0.0},
    ]
    return [
        Muon(matrices, lr=recipe.muon_lr, weight_decay=recipe.weight_decay),
        torch.optim.AdamW(groups, lr=recipe.adamw_lr, betas=(0.9, 0.95)),
    ]


def rate(recipe: Recipe, step: int) -> float:
    """Return the factor on the learning rates: a short warm-up, constant, then linearly to 0."""
    done = step / recipe.steps
    return min(1.0, (step + 1) / 20, (1 - done) / (1 - recipe.constant_share))


class Windows:
    """Draws batches: mostly plain text, a share of conversations, from anywhere in either."""

    def __init__(self, recipe: Recipe, tokenizer: PreTrainedTokenizerFast, text: str) -> None:
        chats = conversations(text, random.Random(recipe.seed))
        rendered = "".join(str(tokenizer.apply_chat_template(chat, tokenize=False)) for chat in chats)
        self._plain = encode(tokenizer, text)
        self._chats = encode(tokenizer, rendered)
        self._recipe = recipe
        self._generator = torch.Generator().manual_seed(recipe.seed)

    def draw(self, step: int) -> tuple[Tensor, Tensor]:
        """Return inputs and next tokens, int64 [batch, window] each, of `batch_tokens` in all."""
        done = (step + 1) / self._recipe.steps
        sizes = next(sizes for until, sizes in PHASES if done <= until)
        window = sizes[step % len(sizes)]
        rows = []
        for _ in range(self._recipe.batch_tokens // window):
            is_chat = torch.rand((), generator=self._generator).item() < self._recipe.chat_share
            stream = self._chats if is_chat else self._plain
            start = int(torch.randint(len(stream) - window, (), generator=self._generator))
            rows.append(stream[start : start + window + 1])
        batch = torch.stack(rows)
        return batch[:, :-1], batch[:, 1:]


def train(
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerFast,
    training_text: str,
    validation_text: str,
    report: Callable[[Progress], None],
) -> tuple[LlamaForCausalLM, int]:
    """Train on `training_text`; return the best model by `validation_text` and its step.

    Equal recipes give equal weights on one machine with one number of threads.
    """
    torch.manual_seed(recipe.seed)
    torch.use_deterministic_algorithms(True)
    model = build_model(recipe, tokenizer)
    optimizers = build_optimizers(recipe, model)
    initial = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    windows = Windows(recipe, tokenizer, training_text)
    best, best_step, best_state = float("inf"), 0, model.state_dict()
    model.train()
    for step in range(recipe.steps):
        for optimizer, rates in zip(optimizers, initial, strict=True):
            for group, lr in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = lr * rate(recipe, step)
        inputs, targets = windows.draw(step)
        with torch.autocast("cpu", torch.bfloat16, enabled=recipe.bfloat16):
            logits = model(input_ids=inputs, use_cache=False).logits
        loss = functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        validation = None
        if (step + 1) % recipe.eval_every == 0 or step + 1 == recipe.steps:
            validation = validation_loss(model, tokenizer, validation_text, VALIDATION_WINDOW).per_byte
            if validation < best:
                best, best_step = validation, step + 1
                best_state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        report(Progress(step + 1, loss.item(), validation))
    model.load_state_dict(best_state)
    return model.eval(), best_step
