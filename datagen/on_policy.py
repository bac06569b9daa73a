"""`soulsmith on-policy`: preference pairs from a tuned model's own replies, where it calls without need or tells without a look.

The pairs that `convert` writes are easy: their rejected sides come from templates, and the model hardly ever says such things. Here it
answers requests of rollouts itself; where it decides otherwise than they about calling at all, its reply is rejected and theirs chosen.
What it lacks of one kind of error beside the other is filled with pairs of `convert` about that: the kind with more pairs moves the line
between too many calls and too few.
"""

import itertools
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from soul.console import console, plain, progress
from soul.conversation import calls_of, validate
from soul.errors import UserError
from soul.files import write_json
from soul.rows import read_rows, write_rows
from soul.spec import Soul, check_table, load_soul
from soul.template import Parsed, Template

NEEDLESS, MISSING = "needless_call", "told_without_looking"
WITH_CALL = 0.6  # of the prompts: calls are missing less often than they are needless
MOST = 3  # times as many pairs of one reason as of the other: with 5 against a needless call for each missing one, DPO unlearned calls


@dataclass(frozen=True)
class Config:
    """Let a tuned model answer the requests of rollouts; where it errs about calling, write its reply against theirs."""

    out: Path = Path("runs/code")
    """The run directory; writes data/on_policy_preference.parquet there."""
    model: str = ""
    """The model that answers; without one, OUT/sft."""
    data: tuple[Path, ...] = ()
    """Rollouts to ask about; without any, OUT/data/rollouts.parquet."""
    soul: Path = Path("soul/SOUL.md")
    n: int = 200
    """Prompts, three in five of them (while there are so many) with a call in the rollout's own reply."""
    temperature: float = 0.8
    max_new: int = 96
    """Most tokens in a reply; what is longer makes no pair."""
    seed: int = 0
    batch: int = 16
    """Replies written at a time."""


def main(config: Config) -> int:
    """Run the command. Raises UserError for a model, a SOUL or rows that can't be used."""
    if config.n < 1 or config.max_new < 1 or config.batch < 1 or config.temperature < 0:
        raise UserError("--n, --max-new and --batch begin at 1, --temperature at 0")
    soul = load_soul(config.soul)
    rows = [row for path in config.data or (config.out / "data/rollouts.parquet",) for row in read_rows(path)]
    made = config.out / "data/rollouts_preference.parquet"
    spare = read_rows(made) if made.exists() else []
    judged = [judge(row, parsed, finished, soul) for row, parsed, finished in replies(choose(rows, config.n, config.seed), config)]
    pairs = balanced(own := [pair for _, pair in judged if pair], spare)
    verdicts = Counter(verdict for verdict, _ in judged)
    write_rows(config.out / "data/on_policy_preference.parquet", pairs, "preference")
    filled = sum(pair not in own for pair in pairs)
    stats = {"asked": len(judged), "pairs": len(pairs), "of_convert": filled, "verdicts": dict(sorted(verdicts.items()))}
    write_json(config.out / "data/on_policy_stats.json", stats)
    found = ", ".join(f"{n} {verdict}" for verdict, n in verdicts.most_common())
    console.print(plain(f"{len(pairs)} pairs, {filled} of them convert's, of {len(judged)} replies: {found}"))
    return 0


def replies(rows: list[dict], config: Config) -> list[tuple[dict, Parsed, bool]]:
    """(row, the model's reply in place of its last message, whether it ended by itself) of each row that leaves room for one."""
    from model.load import find, load_model
    from model.ops import enable_compile_cache
    from model.sampler import Sampler

    enable_compile_cache()
    loaded = load_model(find(config.model or config.out / "sft"))
    template, sampler = Template(loaded.tokenizer), Sampler(loaded.model, loaded.tokenizer, batch=config.batch)
    prompts = [template.encode(row["messages"][:-1], prompt=True).ids for row in rows]
    fits = [i for i, prompt in enumerate(prompts) if len(prompt) + config.max_new <= sampler.max_len]
    with progress("its own replies", len(fits), "replies") as update:
        count = itertools.count(1)
        done = sampler.generate(
            [prompts[i] for i in fits], max_new=config.max_new, temperature=config.temperature,
            seeds=[config.seed + i for i in range(len(fits))], stop_ids=template.stop_ids, on_done=lambda *_: update(next(count)),
        )  # fmt: skip
    return [(rows[i], template.parse_reply(reply.ids), reply.finish == "stop") for i, reply in zip(fits, done)]


def choose(rows: list[dict], n: int, seed: int) -> list[dict]:
    """n rows, each up to the first reply to a request of it, drawn where there are more; three in five of those replies have a call
    while there are so many. In random order."""
    rng, cut = random.Random(f"on-policy:{seed}"), []
    for row in rows:
        roles = [message["role"] for message in row.get("messages", ())]
        if places := [i for i, pair in enumerate(itertools.pairwise(roles)) if pair == ("user", "assistant")]:
            cut.append(row | {"messages": row["messages"][: rng.choice(places) + 2]})
    if not cut:
        raise UserError("no rollout has a request and a reply", fix="Name files of chat rows with --data; `soulsmith convert` makes some.")
    for row in cut:
        if problems := validate(row["messages"]):
            raise UserError(problems[0], where=f"row {row['id']}")
    rng.shuffle(cut)
    with_call = [row for row in cut if calls_of(row["messages"][-1])]
    without = [row for row in cut if not calls_of(row["messages"][-1])]
    most = max(n - len(without), min(len(with_call), round(WITH_CALL * n)))
    chosen = [*with_call[:most], *without[: n - most]]
    random.Random(f"on-policy:{seed}:order").shuffle(chosen)
    return chosen


def balanced(pairs: list[dict], spare: Sequence[dict] = ()) -> list[dict]:
    """The pairs, and of `spare` as many of the rarer reason as it lacks; of the more frequent one at most `MOST` times as many as of the
    other then (and three where there is none)."""
    counts = Counter(pair["reason"] for pair in pairs)
    frequent, rarer = sorted((NEEDLESS, MISSING), key=lambda reason: -counts[reason])
    pairs = [*pairs, *[pair for pair in spare if pair["reason"] == rarer][: counts[frequent] - counts[rarer]]]
    left = MOST * max(1, sum(pair["reason"] == rarer for pair in pairs))
    order = itertools.count(1)
    return [pair for pair in pairs if pair["reason"] != frequent or next(order) <= left]


def judge(row: dict, parsed: Parsed, finished: bool, soul: Soul) -> tuple[str, dict | None]:
    """(what the reply is, beside the rollout's own, its last message; a preference row where it errs about calling).

    A reply that is empty, cut or misplaces control tokens makes no pair: whether it called is not the question there. Nor does one whose chosen side
    would break the SOUL.
    """
    prompt, right, own = row["messages"][:-1], row["messages"][-1], parsed.messages[0]
    if not finished or parsed.problems or not (own["content"].strip() or calls_of(own)):
        return "unreadable", None
    if bool(calls_of(right)) == bool(calls_of(own)):
        return "agreed", None
    reason = NEEDLESS if calls_of(own) else MISSING
    if any(not check["ok"] for check in check_table(soul, [*prompt, right])):
        return f"{reason}, but the rollout breaks the SOUL", None
    table = check_table(soul, [*prompt, own])
    return reason, {
        "id": f"own-{row['id']}", "source": row["source"], "soul_hash": soul.hash, "files": row["files"], "prompt": prompt,
        "chosen": [right], "rejected": [own], "reason": reason, "checks": table,
        "principles": sorted({check["principle"] for check in table if not check["ok"]}),
    }  # fmt: skip
