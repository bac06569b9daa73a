"""Rollouts per second and core, without a teacher: from code, and from a data set with and without Bash.

    python -m bench.convert --dataset FILE [FILE …]

Per core: by the processor time of the process and of the commands that it runs, the best of a few rounds. All cores: by the wall
clock of the command's own pool.
"""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import islice

import tyro

from datagen.code_seeds import read_code, split
from datagen.convert import Converter, build_rollouts, convert_rows
from datagen.instruct import Columns, Mixture, read_items, small_project
from soul.spec import load_soul
from workspace.launched import stop


@dataclass(frozen=True)
class Config:
    """Measure `soulsmith convert`."""

    dataset: tuple[str, ...] = ()
    rows: int = 1000
    rounds: int = 3
    soul: str = "soul/SOUL.md"


def best(rounds: int, make: Callable[[], int]) -> float:
    rates = []
    for _ in range(rounds):
        began = sum(os.times()[:4])
        made = make()
        stop()  # the sandbox's launcher, whose time and whose commands' then count
        rates.append(made / (sum(os.times()[:4]) - began))
    return max(rates)


def main(config: Config) -> None:
    soul, cores = load_soul(config.soul), len(os.sched_getaffinity(0))
    functions = split(read_code("stdlib"))[0]
    without = replace(soul, tools=tuple(tool for tool in soul.tools if tool != "Bash"))
    for kinds, spec in (("all kinds", soul), ("those without Bash", without)):
        rate = best(config.rounds, lambda spec=spec: len(build_rollouts(spec, functions, config.rows)[0]))
        print(f"from code, {kinds}: {rate:,.0f} rollouts/s per core")
    for name in config.dataset:
        items = list(islice(read_items(name, Columns()), config.rows * 2))
        for bash in (0.0, 1.0):
            mixture = Mixture(frozenset(soul.tools), bash)
            maker = Converter(soul, small_project(items), mixture, 0, 12_000, "row")
            part = items if not bash else items[:60]
            found = [item for item in part if (row := maker.build(item)[2]) and (not bash or str(row["messages"]).count('"command"') == 1)]
            rate = best(config.rounds, lambda maker=maker, found=found: sum(maker.build(item)[2] is not None for item in found))
            print(f"{name}, {'one Bash in every row' if bash else 'no Bash'}: {rate:,.0f} rollouts/s per core")
        many = items * max(1, 4000 // len(items))
        began = time.perf_counter()
        tried = convert_rows(soul, many, 0, workers=cores, mixture=Mixture(frozenset(soul.tools), 0.0))[2]["attempts"]
        print(f"{name}, all {cores} cores: {tried / (time.perf_counter() - began):,.0f} rows/s, start of the workers included")


if __name__ == "__main__":
    main(tyro.cli(Config))
