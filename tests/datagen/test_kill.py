"""Kill -9 at random points of the engine, until a hundred kills: the same dataset, and only calls in flight are paid again.

The lives run in forks of one process that has the imports (this file as a script): a fork takes milliseconds.
"""

import asyncio
import importlib
import json
import os
import random
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

HERE = Path(__file__).resolve().parent
KILLS, ROWS, WIDE = 100, 30, 4


def test_a_hundred_kills_pay_only_calls_in_flight_again_and_end_the_same(tmp_path):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parents[1])])}
    done = subprocess.run([sys.executable, __file__, str(tmp_path)], capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["kills"] >= KILLS and told["whole"]["rows"] == ROWS
    for run in told["runs"]:
        assert run["dataset"] == told["whole"]["dataset"]
        assert run["again"] <= WIDE, "a life that was killed had more at risk than was in flight"
        assert run["charged"] >= run["paid"] - 0.001 * WIDE * run["kills"]  # what a kill cut off before its note was on disk
    assert told["whole"]["again"] == 0 < max(run["again"] for run in told["runs"])
    assert set(told["where"]) == {"send", "answer", "record", "commit", "finish"}, "not every place was hit"


def life(folder: str, fuse: int | None) -> None:
    """One run of the engine in this process; it kills itself when `fuse` events have come by."""
    from fake_teacher import FakeTeacher, answer, completion

    from datagen.budget import Budget
    from datagen.engine import Engine, Policy
    from datagen.journal import Journal
    from datagen.seeds import Seed
    from datagen.teachers import Price

    log = os.open(f"{folder}/log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def event(where: str) -> None:
        nonlocal fuse
        if fuse is not None:
            fuse -= 1
            if fuse <= 0:
                os.write(log, f"kill {where}\n".encode())
                os.kill(os.getpid(), signal.SIGKILL)

    def watched(name: str, where: str, own):
        def wrapper(*args, **more):
            event(where)
            result = own(*args, **more)
            event(where)
            return result

        setattr(journal, name, wrapper)

    async def reply(body, n):
        event("send")
        digest = random.Random(json.dumps(body))
        seconds, luck, said = (digest.random() for _ in range(3))
        await asyncio.sleep(0.003 * seconds)
        fails = n == 1 and luck < 0.15
        if not fails:
            os.write(log, f"paid {os.getpid()} {json.dumps(body)}\n".encode())
        event("answer")
        return answer("", 500) if fails else answer(completion(f"{said} to {body['messages'][-1]['content']}"))

    async def recipe(seed, call):
        first = await call("draft", seed.messages)
        second = await asyncio.gather(*(call("revise", [{"role": "user", "content": first.text}], temperature=n / 2) for n in range(2)))
        return [["sft", {"id": seed.id, "messages": [{"role": "assistant", "content": reply.text} for reply in second]}]]

    journal = Journal(folder)
    watched("record", "record", journal.record)
    watched("commit", "commit", journal.commit)
    watched("finish", "finish", journal.finish)
    journal.plan(f"row{n}" for n in range(ROWS))
    teacher = FakeTeacher(reply, price=Price(0.0, 0.01 / 64, 0.0))
    seeds = (Seed(f"row{n}", [{"role": "user", "content": f"q{n}"}], "s", "s") for n in range(ROWS))

    async def go() -> None:
        policy = Policy(concurrency=WIDE, backoff=0.001)
        sampling = {"temperature": 1.0, "top_p": 1.0, "max_tokens": 64}
        await Engine(teacher, journal, "run", sampling, policy, budget=Budget(1000.0, journal.spent())).run(seeds, recipe)

    asyncio.run(go())
    journal.close()


def result(folder: str) -> dict:
    """What a finished directory holds, and what each life paid for that a later one paid for again."""
    from datagen.journal import Journal

    journal = Journal(folder)
    rows = [[row.row_id, row.status, row.results] for row in journal.rows("run")]
    charged = journal.spent()
    journal.close()
    lines = Path(folder, "log").read_text().splitlines()
    paid = [line.split(" ", 2)[1:] for line in lines if line.startswith("paid")]
    last = {body: life for life, body in paid}
    again = Counter(life for life, body in paid if last[body] != life)
    kills = [line.split()[1] for line in lines if line.startswith("kill")]
    return {
        "dataset": rows,
        "rows": len(rows),
        "again": max(again.values(), default=0),
        "charged": charged,
        "paid": 0.001 * len(paid),
        "kills": len(kills),
        "where": kills,
    }


def main(base: Path) -> None:
    rng, runs, kills = random.Random(11), [], 0

    def lived(folder: str, fuse: int | None) -> bool:
        child = os.fork()
        if child == 0:
            life(folder, fuse)
            os._exit(0)
        return os.waitpid(child, 0)[1] == 0

    for name in ("fake_teacher", "datagen.engine"):  # before the forks
        importlib.import_module(name)
    (base / "whole").mkdir(parents=True)
    assert lived(str(base / "whole"), None)
    while kills < KILLS:
        folder = base / f"killed{len(runs)}"
        folder.mkdir()
        while not lived(str(folder), rng.randint(1, 60)):
            pass
        runs.append(result(str(folder)))
        kills += runs[-1]["kills"]
    where = sorted({place for run in runs for place in run["where"]})
    print(json.dumps({"kills": kills, "runs": runs, "whole": result(str(base / "whole")), "where": where}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
