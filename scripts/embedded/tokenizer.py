"""The embedded model's tokenizer: a byte-level BPE and a chat template.

Byte-level, so that any text has tokens and comes back unchanged.
"""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

PAD, BOS, END = "<|pad|>", "<|bos|>", "<|end|>"
ROLES = ("system", "user", "assistant")
SPECIAL_TOKENS = [PAD, BOS, END, *(f"<|{role}|>" for role in ROLES)]

# Contents are rendered untouched and nothing depends on later messages: the rendering of a
# conversation is a prefix, in characters and in tokens, of the rendering of its continuation,
# which is what lets a cache reuse it.
CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
{%- if message['role'] not in ['system', 'user', 'assistant'] -%}
{{- raise_exception('unknown role: ' + message['role'] + ' (system, user or assistant)') -}}
{%- endif -%}
{{- '<|' + message['role'] + '|>' + message['content'] + '<|end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|assistant|>' -}}
{%- endif -%}
"""


def train_tokenizer(text: str, vocab_size: int, context: int) -> PreTrainedTokenizerFast:
    """Learn `vocab_size` tokens (special ones and the 256 bytes included) from `text`.

    Args:
        text: the training part only, so that validation stays unseen.
        vocab_size: number of tokens.
        context: most positions of the model, in tokens.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([text], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=END,
        chat_template=CHAT_TEMPLATE,
        model_max_length=context,
        # A decoder-only model continues from the last position, so padding goes before it.
        padding_side="left",
        clean_up_tokenization_spaces=False,
        # The class's default adds token_type_ids, which Llama's `generate` refuses.
        model_input_names=["input_ids", "attention_mask"],
    )
