"""What the contestants are asked: held-out prompts, a base model's fair instruction, and proof that training saw none of it."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from datagen.code_seeds import is_held_out, read_code, split
from datagen.from_code import held_out_tasks
from datagen.talk import held_out_talk
from soul import conversation
from soul.errors import UserError
from soul.files import sha256_json
from soul.rows import read_rows
from soul.spec import Soul, run_checks
from soul.tools import TOOLS

GRAM = 13  # words; the length at which GPT-3's authors called a run of text contaminated
EXAMPLES = (  # request, wordings of which the one that breaks least of the SOUL is shown, call
    ("what does os.getcwd do?", ("it gives the path of the current directory.", "It gives the path of the current directory."), None),
    ("where is load_page?", ("looking for it.", "I will look for it."), {"name": "Grep", "arguments": {"pattern": "def load_page"}}),
    ("change the timeout in client.py to 30", ("reading the file first.", "I will read the file first."),
     {"name": "Read", "arguments": {"file_path": "client.py"}}),
)  # fmt: skip


@dataclass(frozen=True)
class Prompt:
    """One question. `messages` end with the person's turn; `files` is the workspace that a tool sees; `verify` is None or
    {file, must_contain}, what a file must hold when the work is done."""

    id: str
    kind: str
    messages: list[dict]
    needs_tool: bool
    files: dict[str, str] = field(default_factory=dict)
    verify: dict | None = None

    @property
    def text(self) -> str:
        return self.messages[-1]["content"]


def held_out(n: int, seed: int = 0, source: str = "stdlib") -> list[Prompt]:
    """n prompts from functions in modules, questions and wordings that no training row may use. A third needs no tool: talk about a
    function, questions about anything, and small talk, in turn."""
    _, functions = split(read_code(source))
    if leaked := sorted({f.module.name for f in functions if not is_held_out(f.module.name)}):
        raise AssertionError(f"eval prompts from training modules: {', '.join(leaked)}")
    talk = [Prompt(row["id"], row["kind"], [conversation.user(row["prompt"])], False) for row in held_out_talk(functions, n // 3, seed)]
    work = []
    for number, task in enumerate(held_out_tasks(functions, n - len(talk), seed)):
        verify = {"file": next(iter(task.final)), "must_contain": list(task.must_contain)} if task.final else None
        asked = [conversation.user(task.request)]
        work.append(Prompt(f"held-out-{seed}-{number}", task.kind, asked, bool(task.steps[0].tool), task.files, verify))
    return [*work, *talk]


def from_rows(path: Path, n: int) -> list[Prompt]:
    """Prompts from any rollout or chat Parquet file: each row up to its first reply, which says whether a tool was needed."""
    prompts = []
    for number, row in enumerate(read_rows(path)[:n]):
        messages = row.get("messages") or [*row["prompt"], *row["chosen"]]
        first = next((i for i, m in enumerate(messages) if m["role"] == "assistant"), len(messages))
        if not first or messages[first - 1]["role"] != "user":
            raise UserError("has no user turn before its first reply", where=f"{path}, row {number + 1}")
        needs_tool = first < len(messages) and bool(conversation.calls_of(messages[first]))
        files = {f["path"]: f["content"] for f in row["files"]}
        prompts.append(Prompt(row["id"], row["source"] or "file", messages[:first], needs_tool, files))
    if not prompts:
        raise UserError("holds no rows", where=path)
    return prompts


def set_hash(prompts: list[Prompt]) -> str:
    return sha256_json([[p.id, p.messages, p.needs_tool, p.files] for p in prompts])


def chat_prompt(soul: Soul, messages: list[dict]) -> list[dict]:
    """The fair chance of a model that was never trained on our template: the whole SOUL, the tools, the format, and three
    exchanges shown as real turns, since small models follow what they have just done better than what they are told."""
    tools = "\n".join(f"- {name}({', '.join(p.name for p in TOOLS[name].params)}): {TOOLS[name].doc}" for name in soul.tools)
    told = (
        f"{soul.text.strip()}\n\nYou work in a folder of files. You can't see them; you use these tools:\n{tools}\n\n"
        "When a request is about a file or a function in it, say in one short sentence what you are going to do, "
        "then write one call as JSON on its own line, and stop. When no tool is needed, just answer."
    )
    turns = [conversation.system(told)]
    for request, remarks, call in EXAMPLES:
        said = min(remarks, key=lambda text: len(run_checks(soul, [conversation.user(request), conversation.assistant(text)])))
        turns += [conversation.user(request), conversation.assistant(said + (f"\n{json.dumps(call)}" if call else ""))]
    return [*turns, *messages]


def overlap(prompts: list[Prompt], rows: Iterable[dict]) -> dict:
    """How many eval prompts stand word for word in training rows, and how many share a run of 13 words with any text of them."""
    asked, grams = set(), set()
    for row in rows:
        for message in [m for key in ("messages", "prompt", "chosen") for m in row.get(key) or []]:
            words = _words(message["content"])
            grams.update(_grams(words))
            if message["role"] == "user":
                asked.add(tuple(words))
    exact = sum(tuple(_words(p.text)) in asked for p in prompts)
    return {"exact": exact, "grams": sum(not grams.isdisjoint(_grams(_words(p.text))) for p in prompts), "n": len(prompts)}


def _words(text: str) -> list[str]:
    return text.casefold().split()


def _grams(words: list[str]) -> set[tuple[str, ...]]:
    return {tuple(words[i : i + GRAM]) for i in range(len(words) - GRAM + 1)}
