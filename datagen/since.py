"""What an edit of SOUL.md touches in an earlier run, so that the rest can be kept.

A principle with checks is judged by its checks, so an edit of it touches the rows in which it was broken on the way and
those whose final now fails; one that only a critic can judge touches every row in which a critic judged it. Name, voice and
tools are in every prompt and decide every word, so a change there touches everything.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from datagen.journal import Row
from soul.errors import UserError
from soul.spec import Soul, run_checks


@dataclass(frozen=True)
class Edit:
    """The ids of principles that differ between two versions of a SOUL."""

    voice: bool
    changed: frozenset[str]
    added: frozenset[str]
    removed: frozenset[str]

    def __bool__(self) -> bool:
        return bool(self.voice or self.changed or self.added or self.removed)

    def __str__(self) -> str:
        parts = [
            f"{what}: {', '.join(sorted(ids))}"
            for what, ids in (("changed", self.changed), ("added", self.added), ("removed", self.removed))
            if ids
        ]
        return "; ".join([*(["voice, name or tools changed"] if self.voice else []), *parts]) or "nothing changed"


def soul_facts(soul: Soul) -> dict:
    """What a later edit is compared with; kept in the journal of every run."""
    return {"hash": soul.hash, "voice": soul.voice_hash, "principles": {principle.id: principle.hash for principle in soul.principles}}


def edit_of(before: dict, soul: Soul) -> Edit:
    """How `soul` differs from the SOUL of an earlier run, given by its `soul_facts`."""
    old, new = before["principles"], soul_facts(soul)["principles"]
    return Edit(
        before["voice"] != soul.voice_hash,
        frozenset(name for name in old.keys() & new.keys() if old[name] != new[name]),
        frozenset(new.keys() - old.keys()), frozenset(old.keys() - new.keys()),
    )  # fmt: skip


def touched(row: Row, edit: Edit, soul: Soul) -> str:
    """Why a finished row must be made again under the edited SOUL, or "" when it stands."""
    if edit.voice:
        return "voice"
    if row.status != "finished":
        return "not finished"
    results = [result for _, result in row.results]
    involved = {name for result in results for name in result.get("principles", ())}
    involved |= {name for result in results for name in str(result.get("reason", "")).partition(": ")[2].split(", ")}
    if hit := sorted(involved & (edit.changed | edit.removed)):
        return f"revised for {hit[0]}"
    fresh = edit.changed | edit.added
    finals = [result["messages"] for result in results if result.get("messages")]
    finals += [[*result["prompt"], *result["chosen"]] for result in results if result.get("chosen")]
    if broken := sorted({fault.principle for messages in finals for fault in run_checks(soul, messages)} & fresh):
        return f"now fails {broken[0]}"
    critiques = [step["text"] for result in results for step in result.get("trail", ()) if step["stage"].startswith("critique")]
    unverified = fresh & {principle.id for principle in soul.unverified}
    judged = sorted(name for name in unverified if critiques and (name in edit.added or any(f'"{name}"' in text for text in critiques)))
    return f"critic must judge {judged[0]}" if judged else ""


def split(rows: Iterable[Row], edit: Edit, soul: Soul) -> tuple[list[str], dict[str, str]]:
    """(ids of the rows that stand, why each of the others does not)."""
    kept, again = [], {}
    for row in rows:
        if why := touched(row, edit, soul):
            again[row.row_id] = why
        else:
            kept.append(row.row_id)
    return kept, again


def counted(again: dict[str, str]) -> list[str]:
    return [f"{count:,} rows: {why}" for why, count in Counter(again.values()).most_common()]


def check_same_setup(before: dict, now: dict, where: object) -> None:
    """Raises UserError unless the earlier run differs from this one in its SOUL alone."""
    if changed := sorted(name for name in now if before.get(name) != now[name]):
        fix = "Keep rows only under the same settings, or leave --since out and generate all of them."
        raise UserError(f"that run was made with another {', '.join(changed)}", where=where, fix=fix)


def marked(row: Row, run: object, soul_hash: str) -> list:
    """The results of a kept row, each with a step in its trail that says where it came from."""
    step = {"stage": "kept", "text": f"from {run}, made under SOUL {soul_hash[:12]}", "key": ""}
    return [[kind, result | {"trail": [*result.get("trail", ()), step]}] for kind, result in row.results]
