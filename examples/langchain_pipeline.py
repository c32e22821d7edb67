"""langchain over a transformers pipeline: the same instructions in front of every question.

langchain and the pipeline call ``model.generate`` as they always do. Only the instructions' first run is
computed; every further question pays for itself alone.
"""

from __future__ import annotations

from langchain_core.prompts import PromptTemplate
from langchain_huggingface import HuggingFacePipeline
from saved import Saved, counting
from transformers import pipeline, set_seed

import kvhybrid
from kvhybrid.model.load import load_model

PROMPT = PromptTemplate.from_template(
    """You are a messenger at the court of King Richard, and you answer whoever asks you. Speak plainly, for
the king is tired of riddles. Name the place before you name the deed; name the living before you name the
dead. Whatever you did not see with your own eyes, say that you only heard it. Never speak of the queen
unless you are asked for her. If the news is bad, say first that you are loyal, and then say the news.

{speaker}:
{question}

Messenger:
"""
)
QUESTIONS = [
    {"speaker": "KING RICHARD", "question": "What news from the harbour?"},
    {"speaker": "KING RICHARD", "question": "Who holds the bridge, and with how many men?"},
    {"speaker": "BUCKINGHAM", "question": "Where is the Duke of York?"},
    {"speaker": "DUCHESS OF YORK", "question": "Is my son alive?"},
    {"speaker": "KING RICHARD", "question": "What news from the harbour, sir, and from the fleet?"},
    {"speaker": "CATESBY", "question": "Did you come alone?"},
]


def main() -> Saved:
    """Ask every question, without kvhybrid and with it."""
    model, tokenizer = load_model()  # the small model inside the package; yours goes here
    generate = pipeline(
        "text-generation", model=model, tokenizer=tokenizer, max_new_tokens=20, return_full_text=False
    )
    chain = PROMPT | HuggingFacePipeline(pipeline=generate)

    def ask() -> list[str]:
        set_seed(0)  # answers are sampled
        return [chain.invoke(question) for question in QUESTIONS]

    with counting(model) as plain:
        expected = ask()
    with kvhybrid.attach(model) as attachment, counting(model) as cached:
        answers = ask()
        stats = attachment.cache.get_stats()

    for question, answer in zip(QUESTIONS, answers, strict=True):
        print(f"{question['speaker']}: {question['question']}\n    {' '.join(answer.split())}")
    print(f"prompt tokens: {stats['queried_tokens']:,}, of them cached {stats['cached_tokens']:,}")
    saved = Saved(plain.tokens, cached.tokens, answers == expected)
    print(saved)
    return saved


if __name__ == "__main__":
    main()
