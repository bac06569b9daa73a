"""When a tuned agent calls a tool and when it doesn't, on its first turn and on later ones.

    .venv/bin/python bench/conversation.py runs/quickstart/sft [MODEL ...]

Prompts and histories are made from held-out functions and wordings, histories in the voice of soul/SOUL.md; greedy decoding. "right" is the
very call that the rollout has, byte for byte, which is one of several good ones. See docs/log.md.
"""

import random
import sys
from collections import Counter
from contextlib import suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from datagen.code_changes import Unsuitable
from datagen.code_seeds import chat_seeds, read_code, split
from datagen.from_code import held_out_tasks
from datagen.phrases import Voice
from datagen.rollouts import execute, speak
from datagen.talk import asked, said
from model.load import find, load_model
from model.ops import enable_compile_cache
from model.sampler import Sampler
from soul.conversation import assistant, calls_of, user
from soul.spec import load_soul
from soul.template import Template

# what people type first, whether a training row has it or not
FIRST = (
    "hi", "Hi", "hi!", "Hi!", "hello", "Hello!", "hello there", "hey", "Hey!", "good morning", "thanks", "Thanks!", "thank you", "thx",
    "never mind", "ok", "cool", "who are you?", "what can you do?", "what is your name?", "how are you?", "tell me a joke", "bye",
    "are you there?", "can you help me?", "test", "what is python?", "what is a list comprehension?",
)  # fmt: skip
GREETING = [user("hi"), assistant("hi. bring a bug or an idea.")]
LONGEST = 1_500  # tokens of a prompt


def histories(functions, n: int) -> list[list[dict]]:
    """n conversations about held-out functions, each call of them executed."""
    voice, rng, done = Voice(load_soul("soul/SOUL.md")), random.Random(3), []
    for task in held_out_tasks(functions, n + n // 3, 11):
        with suppress(Unsuitable):
            done.append(speak(task, execute(task), voice, rng)[0])
    return done[:n]


def prompts() -> list[tuple[str, list[dict], list[dict] | None]]:
    """(what it is, messages, the calls of the rollout's reply, None for words that need no call)."""
    _, functions = split(read_code("stdlib"))
    rows = [("first words", [user(text)], None) for text in FIRST]
    rows += [("small talk", [user(text)], None) for text, _ in said(True)]
    rows += [("questions", [user(text)], None) for text in asked(True)]
    rows += [("about code", [user(row["prompt"])], None) for row in chat_seeds(functions, 50, 7)]
    done = histories(functions, 60)
    closing = [text for text, kind in said(True) if kind in ("thank", "leave", "hold")]
    for number, messages in enumerate(done[:40]):
        other = done[(number + 17) % len(done)]
        right = calls_of(other[1])
        rows.append(("thanks after work", [*messages, user(closing[number % len(closing)])], None))
        rows.append(("work", [other[0]], right))
        rows.append(("work after hi", [*GREETING, other[0]], right))
        rows.append(("work after work", [*messages, other[0]], right))
    return rows


def main() -> None:
    enable_compile_cache()
    rows = prompts()
    for name in sys.argv[1:]:
        loaded = load_model(find(name))
        template, sampler = Template(loaded.tokenizer), Sampler(loaded.model, loaded.tokenizer, batch=16)
        encoded = [template.encode(messages, prompt=True).ids for _, messages, _ in rows]
        kept = [i for i, ids in enumerate(encoded) if len(ids) <= LONGEST]
        replies = sampler.generate(
            [encoded[i] for i in kept], max_new=64, temperature=0.0, seeds=[0] * len(kept), stop_ids=template.stop_ids
        )
        n, decided, right = Counter(), Counter(), Counter()
        for (what, _, wanted), reply in zip((rows[i] for i in kept), replies, strict=True):
            called = loaded.tokenizer.special["<|tool_call_start|>"] in reply.ids
            n[what] += 1
            decided[what] += called == bool(wanted)
            right[what] += bool(wanted) and calls_of(template.parse_reply(reply.ids).messages[0]) == wanted
        print(f"\n{name}")
        for what in n:
            exact = f", right {right[what]}" if what.startswith("work") else ""
            print(f"{what:20} {decided[what]:3} of {n[what]} {'call' if what.startswith('work') else 'no call'}{exact}", flush=True)


if __name__ == "__main__":
    main()
