"""What preference tuning did to its pairs: the displacement guard, every pair's margins, and the ledger of those that need a look."""

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
from rich.table import Table

from soul.console import console, plain
from soul.files import write_atomic
from soul.records import json_lines
from soul.template import Template
from training.data import Packed, Pair

FALL = 0.02  # nats per token of chosen replies: less is the noise of a few dozen pairs
EXTREME = 2.0  # from this ratio of their lengths on, one reply counts as much longer than the other
CLASSES = ("contradictory", "length-biased", "flipped", "unlearned", "duplicate", "learned", "unseen")  # a pair's is the first that fits
SHOWN = 20


def displacement(lines: Sequence[dict], window: int) -> dict[str, float]:
    """How chosen replies have moved: `shift` (nats per token), `accuracy`, and `displaced`, 1 where they fell while accuracy rose.

    `lines` are those of metrics.jsonl; the last `window` steps are compared with the reference, or with the first steps for a loss that has
    none. Likelihood displacement: Pal et al. 2024 (DPOP, arXiv 2402.13228), Razin et al. 2024 (arXiv 2410.08847).
    """
    referred = "chosen_shift" in lines[0]
    name = "chosen_shift" if referred else "chosen_logp"
    before, now = lines[:window], lines[-window:]
    start, moved = (np.array([line[name] / line["chosen_length"] for line in part]) for part in (before, now))
    begun, accuracy = (float(np.mean([line["accuracy"] for line in part])) for part in (before, now))
    noise = moved.var() / len(moved)
    if referred:
        start, begun = np.zeros(1), 0.5  # what the starting weights have against themselves
    else:
        noise += start.var() / len(start)
    shift = float(moved.mean() - start.mean())
    fell = shift < -max(FALL, 2 * noise**0.5) and accuracy > begun
    return {"shift": shift, "accuracy": accuracy, "displaced": float(fell)}


class Sights:
    """A file with the margins of every micro-batch at the time that training met it. One that was done twice, after a crash, counts once."""

    def __init__(self, path: Path, packed: Packed, margins: Callable[[int, np.ndarray], np.ndarray]):
        """`margins(block, logp_n)` gives those of the block's pairs."""
        self.path, self.packed, self.margins = path, packed, margins
        self.next: int | None = None
        """The micro-batch whose log-probs come next."""
        self.waiting: Callable[[], Iterable[np.ndarray]] | None = None

    def add(self, fetch: Callable[[], Iterable[np.ndarray]]) -> None:
        """`fetch()` gives log-probs of the next micro-batches; it is called when more come, so that dispatching never waits for the device."""
        self.flush()
        self.waiting = fetch

    def flush(self) -> None:
        if self.waiting is None:
            return
        lines = [""]  # what a crash left of a line stays alone
        for logp_n in self.waiting():
            found = self.margins(self.packed.block_of(self.next), logp_n)
            lines.append(json.dumps({"batch": self.next, "margins": [round(float(m), 6) for m in found]}))
            self.next += 1
        self.waiting = None
        with self.path.open("a", encoding="utf-8") as file:
            file.write("\n".join(lines))

    def read(self) -> dict[int, list[float]]:
        """The margins of each pair (its number in `packed.items`) in the order of training."""
        self.flush()
        seen = defaultdict(list)
        for k, margins in {line["batch"]: line["margins"] for line in json_lines(self.path)}.items():
            for i, margin in zip(slots(self.packed, self.packed.block_of(k)), margins, strict=True):
                seen[i].append(margin)
        return seen


def slots(packed: Packed, block: int) -> list[int]:
    """The numbers in `packed.items` of a block's pairs, in the order of its slots."""
    return [i for unit in packed.blocks[block] for i in unit]


def ledger(pairs: Sequence[Pair], seen: dict[int, list[float]], after: dict[int, float], start: dict[int, np.ndarray]) -> list[dict]:
    """A dict per pair, the worst first. Margins are the loss's own, with β; `last` is the one after training where `after` has it.

    `start[i]` is the starting weights' mean log p per token of (chosen, rejected). A pair's class is the first of CLASSES that fits:
    contradictory: another pair with its prompt rejects what it chooses, or chooses what it rejects; length-biased: one reply is at least
    twice as long, and the starting weights prefer the shorter, but not per token; flipped: right at an earlier sight, wrong at last; unlearned:
    wrong (a margin of 0 or less) at last; duplicate: prompt and replies of an earlier pair; learned; unseen.
    """
    neighbours, entries = _neighbours(pairs), []
    for i, pair in enumerate(pairs):
        history = seen.get(i, [])
        last = after.get(i, history[-1] if history else None)
        state = "unseen" if last is None else "learned" if last > 0 else "flipped" if max(history, default=0) > 0 else "unlearned"
        long, short = pair.chosen.trained, pair.rejected.trained
        prefers = None
        if i in start:
            chosen, rejected = map(float, start[i])
            prefers = {"sum": chosen * long - rejected * short, "per_token": chosen - rejected}
        flags = {name: pairs[j].chosen.row for name, j in neighbours[i].items()}
        if prefers and max(long, short) >= EXTREME * min(long, short):
            toward = np.sign(short - long)  # what length alone would prefer
            if prefers["sum"] * toward > 0 >= prefers["per_token"] * toward:
                flags["length-biased"] = None
        entries.append({
            "id": pair.chosen.row, "class": min([*flags, state], key=CLASSES.index), "state": state, "flags": flags,
            "first": history[0] if history else None, "middle": history[len(history) // 2] if history else None, "last": last,
            "sights": len(history), "after_training": i in after, "start": prefers, "chosen_tokens": long, "rejected_tokens": short,
            "pair": i})  # fmt: skip
    return sorted(entries, key=lambda e: (CLASSES.index(e["class"]), np.inf if e["last"] is None else e["last"]))


def _neighbours(pairs: Sequence[Pair]) -> list[dict[str, int]]:
    """For each pair: the pair that it contradicts and the earlier one that it repeats, by their kind."""
    split = ((p.chosen.ids[: p.prompt], p.chosen.ids[p.prompt :], p.rejected.ids[p.prompt :]) for p in pairs)
    parts = [tuple(ids.tobytes() for ids in ids_of) for ids_of in split]
    chooses, rejects, whole = {}, {}, {}
    for i, (prompt, chosen, rejected) in enumerate(parts):
        chooses.setdefault((prompt, chosen), i)
        rejects.setdefault((prompt, rejected), i)
        whole.setdefault((prompt, chosen, rejected), i)
    found = []
    for i, (prompt, chosen, rejected) in enumerate(parts):
        against = rejects.get((prompt, chosen), chooses.get((prompt, rejected)))
        same = whole[prompt, chosen, rejected]
        found.append({name: j for name, j in (("contradictory", against), ("duplicate", same)) if j not in (None, i)})
    return found


def report(path: Path, entries: list[dict], pairs: Sequence[Pair], template: Template) -> dict[str, float]:
    """Write pairs.jsonl and print the ledger; gives the number of pairs in each class."""
    write_atomic(path, "".join(json.dumps(entry) + "\n" for entry in entries))
    count = Counter(entry["class"] for entry in entries)
    console.print(plain(f"{len(entries)} pairs: " + ", ".join(f"{count[name]} {name}" for name in CLASSES if count[name])))
    worst = [entry for entry in entries if entry["class"] not in ("learned", "unseen")][:SHOWN]
    if worst:
        title = f"fix these {len(worst)} (all pairs: {path})"
        table = Table("row", "class", "margin", "tokens", "prompt", title=title, title_justify="left")
        for entry in worst:
            margin = " → ".join(f"{entry[name]:+.2f}" for name in ("first", "last") if entry[name] is not None)
            said = _prompt(template, pairs[entry["pair"]])
            table.add_row(plain(entry["id"]), entry["class"], margin, f"{entry['chosen_tokens']} / {entry['rejected_tokens']}", plain(said))
        console.print(table)
    return {name: float(count[name]) for name in CLASSES if count[name]}


def _prompt(template: Template, pair: Pair) -> str:
    """The last 40 characters of what was asked, on one line."""
    ids = [i for i in pair.chosen.ids[: pair.prompt].tolist() if i not in template.token]
    return " ".join(template.tokenizer.decode_bytes(ids[-160:]).decode("utf-8", "replace").split())[-40:]
