"""Questions as methods with a text tower read them: without the sentence that says how to answer."""

from __future__ import annotations

# Closing sentences that LLaVA's benchmarks put behind a question (arXiv 2310.03744, appendix: response formatting prompts).
CLOSINGS = (
    "Answer the question using a single word or phrase.",
    "Answer with the option's letter from the given choices directly.",
)


def question_alone(asked: str) -> str:
    """Return the text of a chat without placeholders and closing sentence."""
    text = asked.replace("<image>", "").strip()
    for closing in CLOSINGS:
        text = text.removesuffix(closing).rstrip()
    return text
