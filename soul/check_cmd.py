"""`soulsmith soul check FILE`: what a SOUL.md means to soulsmith, before any money or time is spent on it."""

from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.table import Column, Table

from soul.checks import CHECKS
from soul.console import output, plain
from soul.files import read_text
from soul.spec import Soul, conflicts, load_soul, run_checks

DEFAULT_SOUL = Path(__file__).with_name("SOUL.md")


@dataclass(frozen=True)
class Config:
    """Print a SOUL.md's principles and checks, what is unverified, visible conflicts, and hashes."""

    file: tyro.conf.Positional[Path] = DEFAULT_SOUL
    """The SOUL.md to check; the default soul when left out."""
    reply: Path | None = None
    """A text file with one reply, held against the checks."""


def main(config: Config) -> int:
    """Exit code 0, or 1 when `reply` breaks a principle; UserError for a SOUL.md that cannot be read."""
    soul = load_soul(config.file)
    _print_soul(soul)
    if config.reply is None:
        return 0
    found = run_checks(soul, [{"role": "assistant", "content": read_text(config.reply)}])
    for violation in found:
        start, end = violation.span
        output.print(plain(f"[{violation.principle}] {violation.check} at {start}:{end}: {violation.why}", "red"))
    output.print(plain("the reply passes every check" if not found else f"{len(found)} violations"))
    return int(bool(found))


def _print_soul(soul: Soul) -> None:
    output.print(plain(f"{soul.name}  {soul.version}  tools: {', '.join(soul.tools)}  {len(soul.text.split())} words in a prompt", "bold"))
    table = Table(Column("line", justify="right"), "id", "check", "principle", box=None, pad_edge=False)
    for principle in soul.principles:
        checks = "\n".join(f"{call}{'  (repaired)' if call.repair else ''}" for call in principle.checks)
        shown = plain(checks) if checks else plain("unverified", "yellow")
        table.add_row(str(principle.line), plain(principle.id), shown, plain(principle.text))
    output.print(table)
    for name in sorted({call.name for principle in soul.principles for call in principle.checks}):
        output.print(plain(f"  {name}: {CHECKS[name].doc}", "dim"))
    output.print(plain(f"verified by checks: {len(soul.verified)} of {len(soul.principles)}"))
    if soul.unverified:
        output.print(plain(f"only a critic can judge: {', '.join(principle.id for principle in soul.unverified)}"))
    for conflict in conflicts(soul):
        output.print(plain(f"conflict: {conflict}", "red"))
    output.print(plain(f"soul {soul.hash[:16]}  voice {soul.voice_hash[:16]}", "dim"))
