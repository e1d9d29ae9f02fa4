"""The demo's prompts: short tasks whose rule can be checked, composed from items and ways to ask.

Most want a label in capitals and nothing else, as a program that reads the answer would: facts, claims, log triage,
reviews, changes. The rest want one short sentence. The model keeps such a rule sometimes, but seldom by itself: without
spread there is nothing to learn. A prompt's rule travels with it and, in the traces, with its rows, so that a score can
be recomputed from a row.
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
        form: `label` (one word in capitals) or `sentence` (one sentence on one line).
        max_words: a response with more words than this breaks the rule.
        keywords: beginnings of words, in lower case: the right label, or words of an answer to the point.
        labels: the words of which a label is one, in lower case.
    """

    form: str
    max_words: int
    keywords: tuple[str, ...]
    labels: tuple[str, ...] = ()


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


@dataclass(frozen=True)
class Family:
    """Tasks of one kind: how to ask, an item that an earlier turn answers, and items with their right labels."""

    question: str
    example: tuple[str, str]
    items: dict[str, str]
    labels: tuple[str, ...] = ()


FACTS = Family(
    "YES or NO: {item}?",
    ("is ice warm", "no"),
    {
        "is a whale a mammal": "yes",
        "is a cat a plant": "no",
        "does Kubernetes run containers": "yes",
        "can a spot instance be taken away": "yes",
        "is the Moon bigger than the Earth": "no",
        "do fish live in water": "yes",
        "is iron a metal": "yes",
        "does a pod run on a node": "yes",
        "is a firewall made of fire": "no",
        "can a bicycle fly": "no",
        "is Paris in France": "yes",
        "does a GPU do arithmetic": "yes",
        "is a spider an insect": "no",
        "can a backup help after a disk is lost": "yes",
        "is snow hot": "no",
        "do birds have feathers": "yes",
        "is Python a programming language": "yes",
        "should a password be shared": "no",
        "is a tomato a metal": "no",
        "does the Sun give light": "yes",
        "is a checkpoint useful after a crash": "yes",
        "can a stone swim": "no",
        "is Linux an operating system": "yes",
        "does rain fall upwards": "no",
        "is gold heavier than paper": "yes",
        "is a cache slower than a disk": "no",
        "do bees make honey": "yes",
        "is a mouse larger than a horse": "no",
        "does encryption protect data": "yes",
        "is coffee a drink": "yes",
        "can a dog read a book": "no",
        "is the ocean dry": "no",
        "does a load balancer share out traffic": "yes",
        "is a piano an animal": "no",
        "do trees have leaves": "yes",
        "is a terabyte more than a gigabyte": "yes",
    },
    ("yes", "no"),
)
LOGS = Family(
    "ERROR, WARNING or INFO? Log line: {item}",
    ("user logged in", "info"),
    {
        "disk full, write failed": "error",
        "disk is almost full": "warning",
        "server started on port 80": "info",
        "out of memory, process killed": "error",
        "backup finished": "info",
        "connection refused": "error",
        "certificate expires in three days": "warning",
        "retrying, the service is slow": "warning",
        "job completed": "info",
        "cannot open file": "error",
        "checkpoint saved": "info",
        "node will be taken away in two minutes": "warning",
        "training crashed": "error",
        "user logged out": "info",
        "memory use is high": "warning",
        "pod started": "info",
        "image not found": "error",
        "old setting will soon be removed": "warning",
        "configuration loaded": "info",
        "permission denied": "error",
        "queue is growing": "warning",
        "new node joined the cluster": "info",
        "database is down": "error",
        "temperature of the GPU is rising": "warning",
    },
    ("error", "warning", "info"),
)
REVIEWS = Family(
    "POSITIVE or NEGATIVE? Review: {item}",
    ("The cake was dry.", "negative"),
    {
        "We loved every minute.": "positive",
        "The room was dirty.": "negative",
        "The update broke everything.": "negative",
        "Great support, fast answers.": "positive",
        "I would never buy it again.": "negative",
        "The new dashboard is a joy.": "positive",
        "It stopped working after a day.": "negative",
        "Best tool that our team has.": "positive",
        "The food was cold.": "negative",
        "Simple, quick and reliable.": "positive",
        "The waiting time was terrible.": "negative",
        "A wonderful book.": "positive",
        "The battery lasts for ever.": "positive",
        "Too loud and too expensive.": "negative",
    },
    ("positive", "negative"),
)
CLAIMS = Family(
    "TRUE or FALSE: {item}.",
    ("ice is warm", "false"),
    {
        "a pod can hold several containers": "true",
        "cows can fly": "false",
        "a week has seven days": "true",
        "a GPU is a kind of fruit": "false",
        "water boils when it is hot enough": "true",
        "the Earth is flat": "false",
        "a log file can grow": "true",
        "a square has three sides": "false",
        "bread is made of flour": "true",
        "a spot instance never stops": "false",
        "the heart pumps blood": "true",
        "fish have wheels": "false",
        "a backup is a copy of data": "true",
        "winter is colder than summer": "true",
        "a router is an animal": "false",
        "children are older than their parents": "false",
        "a neural network can learn": "true",
        "glass is made of wool": "false",
        "London is a city": "true",
        "a unit test checks code": "true",
        "a container is heavier than a ship": "false",
        "honey is sweet": "true",
        "the Moon is a star": "false",
        "a cluster has nodes": "true",
    },
    ("true", "false"),
)
CHANGES = Family(
    "SAFE or RISKY? Change: {item}",
    ("fix a typo in the manual", "safe"),
    {
        "delete the production database": "risky",
        "add a comment to the code": "safe",
        "turn off the firewall": "risky",
        "rename a variable in a test": "safe",
        "share the root password": "risky",
        "read a log file": "safe",
        "skip the backup": "risky",
        "add a unit test": "safe",
        "stop all nodes at noon": "risky",
        "update the documentation": "safe",
        "disable encryption": "risky",
        "view the dashboard": "safe",
        "deploy without tests": "risky",
        "list the running pods": "safe",
        "remove every checkpoint": "risky",
        "take one more backup": "safe",
    },
    ("safe", "risky"),
)
FAMILIES = (FACTS, CLAIMS, LOGS, REVIEWS, CHANGES)
SYSTEM = "Reply in capitals, with one word and nothing else."

# Keywords are beginnings of words: "contain" finds container, contains and containerised.
TOPICS: dict[str, tuple[str, ...]] = {
    "a Kubernetes pod": ("pod", "contain", "kubernetes", "node", "run", "group", "deploy"),
    "a load balancer": ("load", "balanc", "traffic", "server", "distribut", "request", "network"),
    "a GPU": ("gpu", "graphic", "process", "unit", "comput", "parallel", "hardware"),
    "a neural network": ("neural", "network", "neuron", "learn", "layer", "model", "data"),
    "a firewall": ("firewall", "network", "traffic", "security", "protect", "block", "access"),
    "a log file": ("log", "file", "record", "event", "system", "error", "information"),
    "a web server": ("web", "server", "page", "request", "client", "site", "http"),
    "a cache": ("cache", "data", "memory", "fast", "stor", "access", "speed"),
    "version control": ("version", "control", "code", "change", "track", "file", "software"),
    "encryption": ("encrypt", "data", "secur", "key", "protect", "code", "information"),
    "rain": ("rain", "water", "cloud", "fall", "drop", "sky", "precipitation"),
    "a volcano": ("volcan", "lava", "magma", "erupt", "mountain", "earth", "ash"),
    "gravity": ("gravity", "force", "earth", "mass", "pull", "attract", "object"),
    "the heart": ("heart", "blood", "pump", "body", "organ", "muscle", "beat"),
    "a telescope": ("telescope", "star", "light", "lens", "distant", "see", "space"),
    "honey": ("honey", "bee", "sweet", "flower", "nectar", "food", "natural"),
}
DEFINITION = "In one short sentence: what is {topic}?"
PLAIN = "YES or NO: is ice warm?\nAnswer: No.\nYES or NO: {item}?\nAnswer:"
PLAIN_ITEMS = {
    "is a lion a plant": "no",
    "is Rome in Italy": "yes",
    "can a car swim": "no",
    "is milk white": "yes",
    "is a node a machine": "yes",
    "is fire cold": "no",
}


def compose() -> list[Prompt]:
    """Every prompt of the demo, always in the same order."""
    return [*_labels(), *_sentences(), *_plain()]


def unseen() -> list[Message]:
    """A chat in the manner of the traces', with an item that none of them has."""
    return list(_label_chat(CHANGES, "format the disk", usual=True))


def _labels() -> Iterator[Prompt]:
    """In two of three prompts an earlier turn was answered the usual way; in the third, as the rule wants it."""
    for family in FAMILIES:
        for number, (item, label) in enumerate(family.items.items()):
            yield Prompt(_label_chat(family, item, usual=number % 3 != 2), Rule("label", 1, (label,), family.labels))


def _label_chat(family: Family, item: str, *, usual: bool) -> tuple[Message, ...]:
    example, answer = family.example
    turns = (
        _said("user", family.question.format(item=example)),
        _said("assistant", f"{answer.capitalize()}." if usual else answer.upper()),
        _said("user", family.question.format(item=item)),
    )
    return (_said("system", SYSTEM), *turns) if usual else turns


def _sentences() -> Iterator[Prompt]:
    for topic, keywords in TOPICS.items():
        yield Prompt((_said("user", DEFINITION.format(topic=topic)),), Rule("sentence", 12, keywords))


def _plain() -> Iterator[Prompt]:
    """A few prompts that are no chat: both ways of reading traces are used."""
    for item, label in PLAIN_ITEMS.items():
        yield Prompt((), Rule("label", 1, (label,), FACTS.labels), text=PLAIN.format(item=item))


def _said(role: str, content: str) -> Message:
    return {"role": role, "content": content}
