"""The demo's written rules: how good a response to a prompt is, from its rule and its text alone, each in 0..1.

They stand in for the labellers of a real pipeline (a Ragas metric, a judge model, and a reward mixed from both):

    ragas_reward   is it to the point:   the right label, or keywords of the topic; nothing said twice
    judge_score    is it as asked:       capitals and nothing else, or one short sentence with a proper end
    final_reward   0.3 ragas_reward + 0.7 judge_score
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from entrypoint.demo.prompts import Rule

ENOUGH_KEYWORDS = 3  # a sentence with this many is to the point
SHORT_WORD = 3  # words of so many letters and less may be said twice
RAGAS_WEIGHT = 0.3
_WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")
_SENTENCE_END = re.compile(r"[.!?](?=\s|$)")


@dataclass(frozen=True)
class Scores:
    """The three labels of one response, rounded to four digits as they are stored."""

    ragas_reward: float
    judge_score: float
    final_reward: float


def score(rule: Rule, response: str) -> Scores:
    """All three labels of `response`."""
    ragas, judge = ragas_reward(rule, response), judge_score(rule, response)
    final = RAGAS_WEIGHT * ragas + (1 - RAGAS_WEIGHT) * judge
    return Scores(round(ragas, 4), round(judge, 4), round(final, 4))


def ragas_reward(rule: Rule, response: str) -> float:
    """Relevance, times the share of longer words that were not said before.

    Of a label: 1 for the right one, 1/n where n labels are named and it is among them.
    Of a sentence: min(1, keywords found / 3).
    """
    words = _words(response)
    hits = sum(any(word.startswith(keyword) for word in words) for keyword in rule.keywords)
    named = len(set(words) & set(rule.labels)) if rule.form == "label" else ENOUGH_KEYWORDS
    longer = [word for word in words if len(word) > SHORT_WORD]
    fresh = len(set(longer)) / len(longer) if longer else 1.0
    return min(1.0, hits / max(1, named)) * fresh


def judge_score(rule: Rule, response: str) -> float:
    """Instruction following.

    Of a label: 0.75 capitals + 0.25 length; 0 where none is named.
    Of a sentence: 0.65 length + 0.25 form + 0.1 end; 0 without a word.
    """
    words = _words(response)
    if not words:
        return 0.0
    if rule.form == "sentence":
        return 0.65 * _length(rule, words) + 0.25 * _form(response) + 0.1 * _ends_properly(response)
    if not set(words) & set(rule.labels):
        return 0.0
    capitals = response.isupper() and words[0] in rule.labels
    return 0.75 * capitals + 0.25 * _length(rule, words)


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _length(rule: Rule, words: list[str]) -> float:
    """1 within the limit, falling on a line to 0 at twice the limit."""
    return min(1.0, max(0.0, 2.0 - len(words) / rule.max_words))


def _form(response: str) -> float:
    """1 for one sentence on one line; 0.5 for two; 0 for more, or for several lines."""
    text = response.strip()
    if "\n" in text:
        return 0.0
    sentences = len(_SENTENCE_END.findall(text)) + (not _ends_properly(text))
    return {1: 1.0, 2: 0.5}.get(sentences, 0.0)


def _ends_properly(response: str) -> bool:
    return response.strip().endswith((".", "!", "?"))
