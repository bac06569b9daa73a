"""The front door: dispatches a command to the room that does it, and turns a person's mistakes into one clear line.

Nothing but wiring. A command is a module with a frozen dataclass `Config` (the only place its defaults live) and
`main(config) -> int`; it is imported only when it is called, so `soulsmith --help` needs neither JAX nor tyro.
"""

import importlib
import os
import shlex
import signal
import sys
from contextlib import contextmanager
from pathlib import Path

from soul.errors import UserError
from soul.files import disk_error, read_json, read_text, write_json
from soul.machine import suit_malloc
from soul.settings import config_from_json, config_to_json

COMMANDS = {  # name: (module, help)
    "quickstart": ("quickstart", "SOUL.md to data, tuned model, evals and report, on this machine, with no key"),
    "soul check": ("soul.check_cmd", "print a SOUL.md's principles, checks, conflicts and what is unverified"),
    "pull": ("model.pull", "fetch a small open model into the cache"),
    "generate": ("datagen.generate", "generate, critique, revise: SFT and preference rows from a SOUL and seeds"),
    "plan": ("datagen.plan", "price a run by a pilot of a few rows; --since RUN: what an edit of the SOUL touches"),
    "status": ("datagen.status", "how a run stands, from another terminal"),
    "seeds": ("datagen.seed_writer", "have a teacher write requests for each principle of a SOUL"),
    "chaos": ("datagen.chaos", "a pretend teacher on loopback that fails as told, to try a run without paying"),
    "convert": ("datagen.convert", "executed tool rollouts from code, instruct datasets or edits"),
    "rollouts": ("datagen.long_rollouts", "a teacher plays agent and user on projects that it wrote, tools really executed"),
    "on-policy": ("datagen.on_policy", "preference pairs from a tuned model's own needless and missing calls"),
    "replay": ("datagen.replay", "execute every call of a dataset again and compare byte for byte"),
    "show": ("datagen.show", "print rows of a dataset readably"),
    "tokenizer": ("training.tokenizer", "train a byte-level BPE tokenizer, and measure how it compresses"),
    "data": ("training.data_cmd", "documents to token shards with a held-out part and a card, for pretraining"),
    "plan-train": ("training.planner", "measure this machine: what fits, how fast, how long each stage of training will take"),
    "pretrain": ("training.pretrain", "train a model from scratch; depth is the one dial"),
    "sft": ("training.sft", "fine-tune a model on conversations"),
    "dpo": ("training.dpo", "preference-tune a model on chosen/rejected pairs"),
    "eval": ("evals.run", "measure SOUL adherence and tool use on held-out prompts"),
    "report": ("evals.report", "write report.md and report.html of a run"),
    "chat": ("agent.chat", "talk to a model that can Read, Edit, Grep and Bash, with your permission"),
}
VERSION = "0.1.0"
USES_MODEL = (
    "quickstart", "generate", "plan", "seeds", "rollouts", "convert", "on-policy", "plan-train", "pretrain", "sft", "dpo", "eval", "chat",
)  # fmt: skip


def entry() -> int:
    """The console script: `main`, in a process whose malloc suits XLA's CPU client (see soul/machine.py) where a model runs."""
    if len(sys.argv) > 1 and sys.argv[1] in USES_MODEL:
        suit_malloc()
    return main()


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_usage())
        return 0
    if argv[0] in ("-V", "--version"):
        print(f"soulsmith {VERSION}")
        return 0
    try:
        name, rest = _command(argv)
        return _run(name, rest)
    except UserError as error:
        print(f"soulsmith: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\nstopped. Go on with: soulsmith {shlex.join(argv)}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `soulsmith show … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except OSError as error:
        print(f"soulsmith: {disk_error(error, error.filename or Path.cwd())}", file=sys.stderr)
        return 2


def _usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(
        [
            "soulsmith: write a SOUL.md, get a dataset, a tuned model and an agent that behave like it.",
            "",
            "usage: soulsmith COMMAND [--help] …",
            "",
        ]
        + lines
        + ["", "Every command that writes to --out saves its resolved settings there; --config FILE reads such a file back."]
    )


def _command(argv: list[str]) -> tuple[str, list[str]]:
    for words in (2, 1):
        if (name := " ".join(argv[:words])) in COMMANDS:
            return name, argv[words:]
    import difflib

    near = difflib.get_close_matches(argv[0], COMMANDS, n=1)
    raise UserError(f"no command {argv[0]!r}", fix=f"Did you mean `soulsmith {near[0]}`?" if near else "See `soulsmith --help`.")


def _run(name: str, argv: list[str]) -> int:
    import tyro

    module = importlib.import_module(COMMANDS[name][0])
    argv, default = _saved_config(module.Config, argv)
    config = tyro.cli(
        module.Config, args=argv, default=default, prog=f"soulsmith {name}", description=module.Config.__doc__ or module.__doc__
    )
    return run_command(name, config)


def run_command(name: str, config: object) -> int:
    """Run a command with a config at hand, its settings saved in OUT as if it had been typed; gives the exit code."""
    with _config_file(name, config):
        return importlib.import_module(COMMANDS[name][0]).main(config)


def _saved_config(cls: type, argv: list[str]) -> tuple[list[str], object | None]:
    """Take `--config FILE` out of `argv`; its values become the defaults that flags may still change."""
    if "--config" not in argv:
        return argv, None
    at = argv.index("--config")
    if at + 1 == len(argv):
        raise UserError("--config needs a file")
    path = argv[at + 1]
    return argv[:at] + argv[at + 2 :], config_from_json(cls, read_json(path), path)


@contextmanager
def _config_file(name: str, config: object):
    """Save the resolved config as OUT/COMMAND.json; when the command refuses its input and has made nothing, leave the directory as it was.
    (After a full disk, say, there is something to go on with, and --config must find its settings.)"""
    out = getattr(config, "out", None)
    if out is None:
        yield
        return
    path = Path(out) / f"{name.replace(' ', '_')}.json"
    before, new_directory = (read_text(path) if path.exists() else None), not Path(out).exists()
    write_json(path, config_to_json(config))
    there = set(path.parent.iterdir())
    try:
        yield
    except UserError:
        if set(path.parent.iterdir()) - there:
            raise
        if before is None:
            path.unlink(missing_ok=True)
        else:
            path.write_text(before, encoding="utf-8")
        if new_directory and not any(Path(out).iterdir()):
            Path(out).rmdir()
        raise


if __name__ == "__main__":
    sys.exit(entry())
