"""The demo's prompts: short tasks whose rule can be checked, composed from topics and wordings.

A prompt's rule travels with it (and, in the traces, with its rows), so that a score can be recomputed from a row.
The tasks are such that a 135M model sometimes keeps the rule and sometimes not: without spread, nothing is learnt.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass

Message = dict[str, str]


@dataclass(frozen=True)
class Rule:
    """What a good response looks like.

    Attributes:
        form: `sentence` (one sentence on one line) or `list` (items separated by commas on one line).
        max_words: a response with more words than this breaks the rule.
        keywords: word beginnings, in lower case, of which an answer to the point holds some.
        items: length of the list; 0 for a sentence.
    """

    form: str
    max_words: int
    keywords: tuple[str, ...]
    items: int = 0


@dataclass(frozen=True)
class Prompt:
    """One prompt: chat messages, or plain text where `text` is set."""

    messages: tuple[Message, ...]
    rule: Rule
    text: str | None = None

    @property
    def input(self) -> str:
        """What the trace's column `input` holds: JSON chat messages, or the plain text."""
        return self.text if self.text is not None else json.dumps(list(self.messages), ensure_ascii=False)


# Keywords are beginnings of words: "contain" finds container, contains and containerised.
PLATFORM: dict[str, tuple[str, ...]] = {
    "a Kubernetes pod": ("pod", "contain", "kubernetes", "node", "run", "group", "deploy"),
    "a Kubernetes node": ("node", "kubernetes", "machine", "server", "run", "cluster", "pod"),
    "a container image": ("image", "contain", "run", "file", "application", "software", "package"),
    "a load balancer": ("load", "balanc", "traffic", "server", "distribut", "request", "network"),
    "a spot instance": ("spot", "instance", "cloud", "price", "cost", "cheap", "capacity"),
    "a GPU": ("gpu", "graphic", "process", "unit", "comput", "parallel", "hardware"),
    "a checkpoint in model training": ("checkpoint", "model", "train", "save", "state", "point", "weight"),
    "the learning rate": ("learn", "rate", "model", "train", "step", "weight", "parameter"),
    "a neural network": ("neural", "network", "neuron", "learn", "layer", "model", "data"),
    "a tokenizer": ("token", "text", "word", "split", "string", "language", "sequence"),
    "a language model": ("language", "model", "text", "word", "generat", "predict", "learn"),
    "a firewall": ("firewall", "network", "traffic", "security", "protect", "block", "access"),
    "a database index": ("index", "data", "query", "table", "search", "fast", "record"),
    "a backup": ("backup", "data", "copy", "copies", "file", "restor", "los"),
    "a log file": ("log", "file", "record", "event", "system", "error", "information"),
    "a message queue": ("message", "queue", "send", "system", "process", "order", "communicat"),
    "a web server": ("web", "server", "page", "request", "client", "site", "http"),
    "a cache": ("cache", "data", "memory", "fast", "stor", "access", "speed"),
    "an API": ("api", "application", "interface", "program", "software", "communicat", "data"),
    "a unit test": ("unit", "test", "code", "function", "software", "check", "work"),
    "version control": ("version", "control", "code", "change", "track", "file", "software"),
    "encryption": ("encrypt", "data", "secur", "key", "protect", "code", "information"),
    "a data lake": ("data", "lake", "stor", "raw", "large", "analy", "structur"),
    "a service account": ("service", "account", "access", "user", "application", "permission", "system"),
}

GENERAL: dict[str, tuple[str, ...]] = {
    "rain": ("rain", "water", "cloud", "fall", "drop", "sky", "precipitation"),
    "a volcano": ("volcan", "lava", "magma", "erupt", "mountain", "earth", "ash"),
    "the Moon": ("moon", "earth", "orbit", "satellite", "sky", "night", "planet"),
    "a bicycle": ("bicycle", "bike", "wheel", "ride", "pedal", "transport", "two"),
    "a library": ("library", "book", "read", "collection", "information", "place", "borrow"),
    "bread": ("bread", "flour", "bak", "food", "dough", "wheat", "eat"),
    "gravity": ("gravity", "force", "earth", "mass", "pull", "attract", "object"),
    "a magnet": ("magnet", "iron", "metal", "attract", "field", "force", "pole"),
    "photosynthesis": ("photosynthesis", "plant", "light", "sun", "energy", "oxygen", "carbon"),
    "a thermometer": ("thermometer", "temperature", "measur", "heat", "degree", "device", "instrument"),
    "a whale": ("whale", "ocean", "sea", "mammal", "water", "animal", "large"),
    "the heart": ("heart", "blood", "pump", "body", "organ", "muscle", "beat"),
    "an island": ("island", "land", "water", "sea", "ocean", "surround", "body"),
    "a bridge": ("bridge", "cross", "river", "road", "connect", "structure", "over"),
    "coffee": ("coffee", "bean", "drink", "caffeine", "beverage", "brew", "plant"),
    "a clock": ("clock", "time", "hour", "minute", "measur", "device", "hand"),
    "snow": ("snow", "ice", "water", "cold", "winter", "crystal", "fall"),
    "a forest": ("forest", "tree", "plant", "animal", "land", "wood", "wild"),
    "a telescope": ("telescope", "star", "light", "lens", "distant", "see", "space"),
    "honey": ("honey", "bee", "sweet", "flower", "nectar", "food", "natural"),
}

LISTS: dict[str, tuple[str, ...]] = {
    "colours": ("red", "blue", "green", "yellow", "orange", "purple", "black", "white", "pink"),
    "fruits": ("apple", "banana", "orange", "grape", "mango", "peach", "pear", "strawberr", "pineapple"),
    "animals": ("dog", "cat", "horse", "lion", "tiger", "elephant", "bird", "bear", "fish", "monkey"),
    "planets": ("mercury", "venus", "earth", "mars", "jupiter", "saturn", "uranus", "neptune"),
    "countries in Europe": ("france", "germany", "italy", "spain", "portugal", "poland", "greece", "sweden", "united"),
    "programming languages": ("python", "java", "c", "ruby", "go", "rust", "php", "javascript", "swift"),
    "operating systems": ("linux", "windows", "mac", "android", "ios", "unix", "ubuntu", "apple"),
    "cloud services": ("aws", "amazon", "azure", "google", "cloud", "storage", "microsoft", "comput", "database"),
    "musical instruments": ("guitar", "piano", "violin", "drum", "flute", "trumpet", "cello", "saxophone"),
    "sports": ("football", "soccer", "basketball", "tennis", "baseball", "hockey", "golf", "swim", "volleyball"),
    "kinds of weather": ("rain", "sun", "snow", "wind", "cloud", "storm", "fog", "hail", "thunder"),
    "vegetables": ("carrot", "broccoli", "spinach", "potato", "tomato", "onion", "pepper", "lettuce", "cabbage"),
}

DEFINITION = (
    "In one short sentence: what is {topic}?",
    "Explain {topic} to a platform engineer in at most 15 words.",
    "Why is {topic} useful? Answer in one sentence.",
)
ENUMERATION = (
    "Name three {topic} as a comma-separated list.",
    "List three {topic} on one line, separated by commas. No other words.",
)
SYSTEM = "You answer on one line, without introduction."
EARLIER_TURN: tuple[Message, ...] = (
    {"role": "user", "content": "What is a river? Be brief."},
    {"role": "assistant", "content": "A river is water that flows to the sea."},
)
PLAIN = "Question: What is {topic}?\nShort answer, one sentence:"


def compose() -> list[Prompt]:
    """Every prompt of the demo, always in the same order."""
    return [*_sentences(), *_lists(), *_plain()]


def _sentences() -> Iterator[Prompt]:
    topics = {**PLATFORM, **GENERAL}
    for number, (topic, keywords) in enumerate(topics.items()):
        wordings = DEFINITION if topic in PLATFORM else (DEFINITION[0], DEFINITION[2])
        for variant, wording in enumerate(wordings):
            limit = 15 if "15 words" in wording else 20
            yield _chat(wording.format(topic=topic), Rule("sentence", limit, keywords), number + variant)


def _lists() -> Iterator[Prompt]:
    for number, (topic, keywords) in enumerate(LISTS.items()):
        for variant, wording in enumerate(ENUMERATION):
            yield _chat(wording.format(topic=topic), Rule("list", 9, keywords, items=3), number + variant)


def _plain() -> Iterator[Prompt]:
    """A few prompts that are no chat: both ways of reading traces are used."""
    for topic in ("a web server", "a GPU", "snow", "a bridge", "a backup", "coffee"):
        keywords = {**PLATFORM, **GENERAL}[topic]
        yield Prompt((), Rule("sentence", 20, keywords), text=PLAIN.format(topic=topic))


def _chat(question: str, rule: Rule, number: int) -> Prompt:
    """Every third prompt has a system message, every ninth an earlier turn."""
    system: tuple[Message, ...] = ({"role": "system", "content": SYSTEM},) if number % 3 == 0 else ()
    turns = EARLIER_TURN if number % 9 == 4 else ()
    return Prompt((*system, *turns, {"role": "user", "content": question}), rule)
