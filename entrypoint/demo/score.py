"""The demo's written rules: how good a response to a prompt is, from its rule and its text alone, each in 0..1.

They stand in for the labellers of a real pipeline (a Ragas metric, a judge model, and a reward mixed from both):

    ragas_reward   is it to the point:   keywords of the topic, nothing said twice
    judge_score    is it as asked:       length, form, a proper end
    final_reward   0.3 ragas_reward + 0.7 judge_score
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from entrypoint.demo.prompts import Rule

ENOUGH_KEYWORDS = 3  # an answer with this many is to the point
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
    """Relevance: min(1, keywords found / 3), times the share of longer words that were not said before."""
    words = _words(response)
    hits = sum(any(word.startswith(keyword) for word in words) for keyword in rule.keywords)
    longer = [word for word in words if len(word) > SHORT_WORD]
    fresh = len(set(longer)) / len(longer) if longer else 1.0
    return min(1.0, hits / ENOUGH_KEYWORDS) * fresh


def judge_score(rule: Rule, response: str) -> float:
    """Instruction following: 0.4 length + 0.4 form + 0.2 end; 0 for a response without a word."""
    if not _words(response):
        return 0.0
    form = _list_form(rule, response) if rule.form == "list" else _sentence_form(response)
    return 0.4 * _length(rule, response) + 0.4 * form + 0.2 * _ends_properly(rule, response)


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _length(rule: Rule, response: str) -> float:
    """1 within the limit, falling on a line to 0 at twice the limit."""
    return min(1.0, max(0.0, 2.0 - len(_words(response)) / rule.max_words))


def _sentence_form(response: str) -> float:
    """1 for one sentence on one line; 0.5 for two; 0 for more, or for several lines."""
    text = response.strip()
    if "\n" in text:
        return 0.0
    sentences = len(_SENTENCE_END.findall(text)) + (not text.endswith((".", "!", "?")))
    return {1: 1.0, 2: 0.5}.get(sentences, 0.0)


def _list_form(rule: Rule, response: str) -> float:
    """1 for as many short items as were asked for, with commas, on one line; half of it for another number of items."""
    text = response.strip().rstrip(".")
    items = text.split(",")
    if "\n" in text or len(items) < 2 or any(not 1 <= len(_words(item)) <= 3 for item in items):
        return 0.0
    return 1.0 if len(items) == rule.items else 0.5


def _ends_properly(rule: Rule, response: str) -> float:
    text = response.strip()
    if rule.form == "list":
        return float(text[-1].isalnum() or text.endswith("."))
    return float(text.endswith((".", "!", "?", '."', ".)")))
