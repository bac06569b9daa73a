"""What people say that needs no tool, and replies to it: greetings, thanks, questions about the agent, and questions about anything.

A model that was tuned on tool rollouts alone searches the project for "hi". One wording and one question in five are kept for the evals.
"""

import random
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import yaml

from datagen.code_seeds import Function, chat_seeds, is_held_out
from datagen.phrases import REQUESTS, SMALL_TALK, typed
from datagen.tasks import Step, Task

# how often talk is of which kind: the base knows how to greet, but not the SOUL's name and tools, and "hi" is what people say first
USUAL = dict.fromkeys(SMALL_TALK, 1) | {"who": 8, "able": 4, "greet": 3, "thank": 2}
BEFORE = {"greet": 6, "who": 1, "able": 2, "mood": 2, "stuck": 1}  # in a conversation that goes on
AFTER = {"thank": 4, "leave": 3, "hold": 3, "mood": 1}
ITSELF, BRIGHT = {"who", "able"}, {"greet", "thank", "leave"}
LEADS = ("", "", "hey, ", "hi! ", "so, ", "wait, ", "ok, ", "just curious: ")
QUESTIONS: dict[str, str] = yaml.safe_load(Path(__file__).with_name("questions.yaml").read_text(encoding="utf-8"))


@cache
def said(held_out: bool) -> list[tuple[str, str]]:
    """(words, kind) of all small talk for training or for evals: the two share no wording."""
    return [(text, kind) for kind in SMALL_TALK for text in REQUESTS[kind] if is_held_out(text) == held_out]


@cache
def asked(held_out: bool) -> list[str]:
    """The questions about anything for training or for evals."""
    return [question for question in QUESTIONS if is_held_out(question) == held_out]


def talk(rng: random.Random, _pool: object = None, among: dict[str, int] | None = None) -> Task:
    """Small talk or a question, and its reply; small talk alone, of these kinds in these shares, where `among` is given.
    The Voice knows the agent's name and tools."""
    if not among and rng.random() < 0.5:
        words = rng.choice(asked(False))
        step = Step("told", slots={"core": QUESTIONS[words]})
    else:
        known = [(words, kind, weight) for words, kind in said(False) if (weight := (among or USUAL).get(kind))]
        ((words, kind, _),) = rng.choices(known, [weight for _, _, weight in known])
        lead = rng.choice(LEADS) if kind in ITSELF and not among else ""
        mark = rng.choice(["", "", "!"] if kind in BRIGHT and words[-1].isalpha() else [""])
        words, step = lead + words + mark, Step(SMALL_TALK[kind])
    longest = max(re.findall(r"\w+", words), key=len)  # what a needless search would look for
    return Task("talk", "made", typed(rng, words), {}, (step,), {"name": longest})


def held_out_talk(functions: Sequence[Function], n: int, seed: int = 0) -> list[dict]:
    """At most n rows {id, kind, prompt}, the evals' prompts that need no tool: about (held-out) functions, questions about anything,
    and small talk, a third each."""
    rng, rows = random.Random(f"talk:{seed}"), [row | {"kind": "about code"} for row in chat_seeds(functions, -(-n // 3), seed)]
    for kind, texts, left in (("question", asked(True), 2), ("small talk", [words for words, _ in said(True)], 1)):
        drawn = rng.sample(texts, min(len(texts), -(-(n - len(rows)) // left)))
        rows += [{"id": f"{kind}-{seed}-{i}", "kind": kind, "prompt": typed(rng, text)} for i, text in enumerate(drawn)]
    return rows
