"""`soulsmith chat`: talk to a model that can Read, Edit, Grep and Bash in one directory, with your permission."""

import codecs
import json
import os
import signal
import sys
from collections.abc import Callable
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from agent.loop import ContextFull, Reply, Status, run_turn
from agent.permissions import Permission
from agent.terminal import Terminal
from soul import conversation
from soul.errors import UserError
from soul.files import disk_error, home, sound
from soul.settings import config_to_json
from soul.spec import load_soul
from soul.template import Template
from workspace.tools import Sandbox, Workspace

MAX_CONTEXT = 8192
RETRY_HEAT = 0.4  # added to the temperature for each malformed reply: near 0, another seed would draw it again
HELP = "/reset forgets the conversation, /quit leaves, Ctrl-C stops the model; a second Ctrl-C leaves. Anything else is said to the model."


@dataclass(frozen=True)
class Config:
    """Talk to a model that can Read, Edit, Grep and Bash in one directory, with your permission."""

    model: str
    """A run, a checkpoint or a safetensors directory, or a pulled name such as smollm2-135m."""
    root: Path = Path()
    """The directory that the tools may touch."""
    prompt: str | None = None
    """Say only this and leave; the exit code is 0 when the model answered, 1 otherwise."""
    soul: Path | None = None
    """A SOUL.md to give as system prompt; a tuned model has its own trained in and needs none."""
    temperature: float = 0.2
    top_p: float = 0.95
    max_new: int = 512
    """Most tokens of one reply."""
    max_steps: int = 12
    """Most replies of one turn."""
    seed: int = 0
    sandbox: bool = True
    """Confine commands to --root, without network, by what the kernel offers. Reading and editing are confined anyway."""
    yes: bool = False
    """Allow every call without asking."""
    transcript: Path | None = None
    """Where to write the transcript (JSONL); default: the next number in MODEL/transcripts."""


def main(config: Config) -> int:
    if config.temperature < 0 or not 0 < config.top_p <= 1 or config.max_new < 1 or config.max_steps < 1:
        raise UserError("temperature must be at least 0, top_p in (0, 1], max_new and max_steps at least 1")
    system = [conversation.system(load_soul(config.soul).text)] if config.soul else []
    sandbox = Sandbox.detect() if config.sandbox else Sandbox("none", why="turned off")
    workspace = Workspace(config.root, sandbox=sandbox)
    terminal = Terminal()
    model = Model(config, terminal.text)
    terminal.note(sandbox.describe(), "bold red" if sandbox.kind == "none" else "dim")
    # three characters a token is what code has; so Read pages by itself and `shorten` rarely cuts
    workspace.max_result_chars = min(workspace.max_result_chars, 3 * model.result_tokens)
    with closing(Transcript(config.transcript or _next_transcript(Path(config.model)))) as transcript:
        transcript.write("config", config_to_json(config) | model.describe())
        if config.yes:
            terminal.note("--yes: every call runs without asking", "bold red")
        permission = Permission(workspace, show=terminal.note, read_line=_read_line, interactive=sys.stdin.isatty(), yes=config.yes)
        session = Session(config, model, workspace, permission, terminal, transcript, system)
        if config.prompt is not None:
            return 0 if session.say(config.prompt) == Status.answered else 1
        terminal.note(f"transcript: {transcript.path}\n{HELP}")
        session.converse(_read_line)
    return 0


class Model:
    """A loaded model that draws replies for `run_turn`, streaming their text in whole characters."""

    def __init__(self, config: Config, on_text: Callable[[str], None]):
        from model.load import load_model  # JAX: only when a model is really wanted
        from model.sampler import Sampler

        loaded = load_model(config.model)
        self.config, self.on_text, self.path, self.tokenizer = config, on_text, Path(loaded.path), loaded.tokenizer
        self.template = Template(loaded.tokenizer)
        trained_on = loaded.meta.get("template_hash")
        if trained_on not in (None, self.template.hash):
            message = f"was trained on another template ({trained_on[:12]}, this is {self.template.hash[:12]})"
            raise UserError(message, where=config.model, fix="Train it again with this version, or use the version it was trained with.")
        self.sampler = Sampler(loaded.model, loaded.tokenizer, max_len=min(MAX_CONTEXT, loaded.config.max_len), batch=1)
        self.result_tokens = self.sampler.max_len // 4
        if config.max_new >= self.sampler.max_len // 2:
            raise UserError(f"max_new {config.max_new} leaves no room in a context of {self.sampler.max_len} tokens")

    def __call__(self, messages: list[dict], *, seed: int, attempt: int) -> Reply:
        """Draw one reply. Raises ContextFull when prompt and max_new do not fit, KeyboardInterrupt on Ctrl-C."""
        prompt = self.template.encode(messages, prompt=True).ids
        if len(prompt) + self.config.max_new > self.sampler.max_len:
            raise ContextFull
        utf8 = codecs.getincrementaldecoder("utf-8")("replace")  # a character may span tokens
        stream = self.sampler.stream(
            prompt, max_new=self.config.max_new, temperature=self.config.temperature + RETRY_HEAT * attempt,
            top_p=self.config.top_p, seed=seed, stop_ids=self.template.stop_ids,
        )  # fmt: skip
        ids: list[int] = []
        speaking = True
        with closing(stream), _interruptible() as interrupted:
            for token in stream:
                ids.append(token)
                speaking = speaking and token not in self.template.token
                if speaking:  # a call is shown by the permission prompt
                    self.on_text(utf8.decode(self.tokenizer.decode_bytes([token])))
                if interrupted():
                    raise KeyboardInterrupt
        parsed = self.template.parse_reply(ids)
        return Reply(parsed.messages[0], tuple(parsed.problems), tuple(ids), cut=speaking)

    def shorten(self, text: str) -> str:
        """At most a quarter of the context: the head and the tail of a longer result."""
        ids, half = self.tokenizer.encode(text), (self.result_tokens - 16) // 2  # 16 for the note between
        if len(ids) <= self.result_tokens:
            return text
        head, tail = (self.tokenizer.decode_bytes(part).decode("utf-8", "ignore") for part in (ids[:half], ids[-half:]))
        return f"{head}\n[{len(text) - len(head) - len(tail)} characters elided]\n{tail}"

    def describe(self) -> dict:
        return {"model_path": str(self.path), "template_hash": self.template.hash, "context": self.sampler.max_len}


class Session:
    """The conversation so far, and what happens to a line that a person types."""

    def __init__(self, config, model, workspace, permission, terminal, transcript, system):
        self.config, self.model, self.workspace, self.permission = config, model, workspace, permission
        self.terminal, self.transcript, self.system = terminal, transcript, system
        self.messages, self.turns = list(system), 0

    def converse(self, read_line: Callable[[str], str]) -> None:
        """Read and answer lines until /quit, the end of input, or Ctrl-C twice in a row."""
        pressed = False
        while True:
            try:
                line = read_line("\n> ").strip()
            except EOFError:
                return
            except KeyboardInterrupt:
                if pressed:
                    return
                pressed = True
                self.terminal.note("Ctrl-C again leaves")
                continue
            if line == "/quit":
                return
            if line == "/reset":
                self.messages = list(self.system)
                self.workspace.seen.clear()  # what was read is no longer in the context
                self.transcript.write("reset", {})
                self.terminal.note("forgotten")
            elif line.startswith("/"):
                self.terminal.note(HELP)
            elif line:
                pressed = self.say(line) == Status.interrupted

    def say(self, line: str) -> Status:
        line = sound(line)  # a terminal may deliver bytes that are not UTF-8
        self.transcript.write("user", {"text": line})
        self.messages, status = run_turn(
            [*self.messages, conversation.user(line)], generate=self.model, workspace=self.workspace, ask=self.permission,
            on_event=self._event, shorten=self.model.shorten, max_steps=self.config.max_steps,
            seed=self.config.seed + 1000 * self.turns,
        )  # fmt: skip
        self.turns += 1
        return status

    def _event(self, kind: str, data: dict) -> None:
        self.transcript.write(kind, data)
        self.terminal.event(kind, data)


class Transcript:
    """JSON lines, each on disk before the next thing happens. Never overwrites; raises UserError when it cannot be written."""

    def __init__(self, path: Path):
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.file = open(path, "x", encoding="utf-8", errors="backslashreplace")  # noqa: SIM115 (closed by `close`)
        except FileExistsError:
            raise UserError("the transcript exists already", where=path, fix="Name another file.") from None
        except OSError as error:
            raise disk_error(error, path) from error

    def write(self, event: str, data: dict) -> None:
        self.file.write(json.dumps({"event": event, **data}, ensure_ascii=False) + "\n")
        self.file.flush()
        os.fsync(self.file.fileno())

    def close(self) -> None:
        self.file.close()


def _next_transcript(model: Path) -> Path:
    own = model.is_dir() and home() not in model.resolve().parents  # the cache holds what was pulled, nothing else
    directory = (model if own else home()) / "transcripts"
    taken = [int(path.stem) for path in directory.glob("*.jsonl") if path.stem.isdecimal()]
    return directory / f"{max(taken, default=0) + 1:04}.jsonl"


def _read_line(prompt: str) -> str:
    with suppress(ImportError):
        import readline  # noqa: F401 (line editing and history for input())
    return input(prompt)


@contextmanager
def _interruptible():
    """Yields a function that tells whether Ctrl-C was pressed; a second one raises at once.

    The sampler donates its cache to every dispatch: an exception in the middle of one would lose the cache.
    """
    pressed = []

    def press(*_):
        if pressed:
            raise KeyboardInterrupt
        pressed.append(True)

    before = signal.signal(signal.SIGINT, press)
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, before)
