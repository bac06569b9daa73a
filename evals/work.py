"""Calls really executed, each prompt in a fresh directory of its own files: one call, or the agent's whole loop."""

import re
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from queue import SimpleQueue

from agent.loop import ContextFull, Reply, Status, run_turn
from datagen.code_seeds import tree_of
from datagen.talk import said as small_talk
from evals.prompts import Prompt
from soul.console import progress
from soul.conversation import calls_of, user
from soul.template import Template
from workspace.tools import make_workspace

NOT_RUN = "error: not executed: evals run no shell command but a plain look at one file"
PLAIN = re.compile(r"ls|(?:cat|wc -l|python3?) \w[\w.-]*")
THANKS = [words for words, kind in small_talk(held_out=True) if kind == "thank"]
LATER = ("no call for thanks", "next request runs")
LOOP_TOKENS = 256  # most in one reply of a loop: an Edit carries a whole function twice


def first_result(prompt: Prompt, calls: list[tuple[str, dict[str, str]]]) -> str:
    """What the first call gives; begins `error: ` when there is none, or when it fails.

    A model's own shell command doesn't run on the machine that measures it, unless it lists, counts, or runs one file of the prompt.
    """
    if not calls:
        return "error: no call"
    name, args = calls[0]
    if name == "Bash" and not PLAIN.fullmatch(args.get("command", "")):
        return NOT_RUN
    with tempfile.TemporaryDirectory() as root:
        return make_workspace(prompt.files, root).run(name, args)


def run_loops(tokenizer, sampler, prompts: list[Prompt], *, temperature: float, seed: int, what: str) -> list[dict]:
    """Let the agent's loop work on each prompt that has a `verify`, allowing every call but Bash, and judge the files it leaves.

    Each conversation then goes on: with thanks, and with the next prompt whose files have other names (`later`).
    """
    from model.sampler import Request

    template = Template(tokenizer)
    inbox: SimpleQueue[tuple[Request, Future]] = SimpleQueue()

    def work(number: int, prompt: Prompt) -> dict:
        def generate(messages: list[dict], *, seed: int, attempt: int) -> Reply:
            ids = template.encode(messages, prompt=True).ids
            if len(ids) + LOOP_TOKENS > sampler.max_len:
                raise ContextFull
            drawn = Future()
            inbox.put((Request(ids, LOOP_TOKENS, temperature + 0.4 * attempt, 0.95, seed, frozenset(template.stop_ids)), drawn))
            done = drawn.result()
            parsed = template.parse_reply(done.ids)
            return Reply(parsed.messages[0], tuple(parsed.problems), tuple(done.ids), cut=done.finish == "length")

        with tempfile.TemporaryDirectory() as root:
            workspace = make_workspace(prompt.files, root, max_result_chars=sampler.max_len)
            turn = partial(run_turn, generate=generate, ask=lambda name, _: name != "Bash", seed=seed)
            messages, status = turn(prompt.messages, workspace=workspace)
            done = solved(prompt, Path(root))
            others = [other for other in (*prompts[number + 1 :], *prompts[:number]) if not _names(other) & _names(prompt)]
            said, columns = later(messages, THANKS[number % len(THANKS)], others[:1], turn, Path(root))
        told = {"id": prompt.id, "kind": prompt.kind, "status": str(status), "done": done}
        return told | {"messages": messages, "later": said, "columns": columns}

    with ThreadPoolExecutor(max(len(prompts), 1)) as pool:
        return _serve(sampler, inbox, [pool.submit(work, *numbered) for numbered in enumerate(prompts)], what)


def later(messages: list[dict], thanks: str, others: Sequence[Prompt], turn: Callable, root: Path) -> tuple[list[dict], dict[str, bool]]:
    """(what is said after a task, verdicts on it): whether thanks are answered without a call, and whether the first call for the next
    request gives no error. A verdict is missing where the conversation has no room for another reply."""
    said, status = turn([*messages, user(thanks)], workspace=make_workspace({}, root), max_steps=4)
    if status is Status.context_full:
        return said[len(messages) :], {}
    columns = {LATER[0]: status is Status.answered and not any(map(calls_of, said[len(messages) :]))}
    for other in others:
        asked, status = turn([*said, user(other.text)], workspace=make_workspace(other.files, root), max_steps=1)
        results = [message["content"] for message in asked[len(said) :] if message["role"] == "tool"]
        if status is not Status.context_full:
            columns[LATER[1]] = bool(results) and not results[0].startswith("error: ")
        said = asked
    return said[len(messages) :], columns


def _names(prompt: Prompt) -> set[str]:
    return {Path(path).name for path in (*prompt.files, prompt.verify["file"])}


def _serve(sampler, inbox: SimpleQueue, threads: list[Future], what: str) -> list[dict]:
    """The results of the threads; what they ask for meanwhile is decoded together."""
    live: dict[int, Future] = {}
    try:
        with progress(what, total=len(threads), unit="tasks") as update:
            while not all(thread.done() for thread in threads):
                while not inbox.empty():
                    request, drawn = inbox.get()
                    live[sampler.submit(request)] = drawn
                for handle, completion in sampler.step() if live else []:
                    live.pop(handle).set_result(completion)
                if not live:
                    time.sleep(0.005)
                update(sum(thread.done() for thread in threads))
    except BaseException:  # Ctrl-C, or the sampler failed: nobody may be left waiting for a reply, or the pool never ends
        while not all(thread.done() for thread in threads):
            waiting = [*live.values(), *(inbox.get()[1] for _ in range(inbox.qsize()))]
            for drawn in waiting:
                drawn.cancel()
            time.sleep(0.005)
        raise
    return [thread.result() for thread in threads]


def solved(prompt: Prompt, root: Path) -> bool:
    """Whether the file that the task names has what it asks for and is still Python, and nothing else changed."""
    here = {p.relative_to(root).as_posix(): p.read_text("utf-8", "replace") for p in root.rglob("*") if p.is_file()}
    new = here.pop(prompt.verify["file"], "")
    others = {name: text for name, text in prompt.files.items() if name != prompt.verify["file"]}
    return here == others and all(text in new for text in prompt.verify["must_contain"]) and tree_of(new) is not None
