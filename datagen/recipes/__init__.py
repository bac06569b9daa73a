"""Recipes: coroutines `recipe(seed, call) -> [[kind, row], …]`, with kinds and rows as in soul/rows.py.

A recipe asks with `await call(stage, messages, replicate=0, …)`, gets a Reply whatever happened, and returns what its row
came to: "sft", "preference", "docs" and "rejected" rows. It keeps no state between rows, so any row can be computed again.
The built-in ones are coroutines of a row's Workings and their options.
"""

import importlib.util
import inspect
from collections.abc import Callable
from pathlib import Path

from datagen.engine import Recipe
from datagen.prompting import Prompts
from datagen.recipes.best_of import BestOf, best_of
from datagen.recipes.cai import Cai, cai
from datagen.recipes.common import Workings
from datagen.recipes.critique_revise import CritiqueRevise, critique_revise
from datagen.recipes.distill import Distill, distill
from datagen.recipes.docs import Docs, docs
from datagen.recipes.introspect import Introspect, introspect
from soul import conversation
from soul.errors import UserError
from soul.files import canonical_json, sha256_file
from soul.rows import KINDS, columns
from soul.spec import Soul

RECIPES: dict[str, tuple[type, Callable]] = {
    "critique-revise": (CritiqueRevise, critique_revise),
    "distill": (Distill, distill),
    "best-of": (BestOf, best_of),
    "cai": (Cai, cai),
    "introspect": (Introspect, introspect),
    "docs": (Docs, docs),
}


def load(name_or_file: str, options: object, soul: Soul, prompts: Prompts) -> Recipe:
    """A built-in recipe, or the `recipe(seed, call, soul, prompts)` of a Python file, which is run: it is the person's own.

    `options` are those of the built-in recipe (None: its defaults); a file has none. Raises UserError for an unknown name, or a
    file that is missing, broken or without such a coroutine. The recipe of a file raises it, too, for what is no row.
    """
    name = name_or_file.replace("_", "-")
    if name in RECIPES:
        cls, made = RECIPES[name]
        options = cls() if options is None else options
        options.check(soul)
        return lambda seed, call: made(Workings(soul, prompts, seed, call), options)
    if not name_or_file.endswith(".py"):
        raise UserError(f"no recipe {name_or_file!r}", fix=f"The recipes are {', '.join(RECIPES)}, or give a .py file.")
    own = _coroutine(Path(name_or_file))

    async def recipe(seed, call) -> list:
        results = await own(seed, call, soul, prompts)
        if problem := what_is_wrong(results):
            raise UserError(f"the recipe returned {problem}", where=name_or_file, fix="See docs/recipes.md for what a row must hold.")
        return results

    return recipe


def fingerprint(name_or_file: str) -> str:
    """What names a recipe in a run's id: its name, or the hash of the file, so that an edit computes its rows again."""
    return sha256_file(name_or_file) if name_or_file.endswith(".py") and Path(name_or_file).is_file() else name_or_file.replace("_", "-")


def what_is_wrong(results: object) -> str:
    """Why `results` cannot go into the journal and the dataset ("" when they can)."""
    import pyarrow as pa

    if not isinstance(results, list):
        return f"{type(results).__name__}, not a list of [kind, row]"
    for result in results:
        if not isinstance(result, list | tuple) or len(result) != 2 or result[0] not in KINDS or not isinstance(result[1], dict):
            return f"{str(result)[:60]!r}, which is no [kind, row] with a kind of {', '.join(KINDS)}"
        kind, row = result
        known = columns(kind)
        if unknown := sorted(set(row) - set(known)):
            return f"a {kind} row with the unknown column {unknown[0]!r}"
        needed = ["id", *[name for name in known if name in ("messages", "prompt", "chosen", "rejected", "text")]]
        if missing := [name for name in needed if not row.get(name)]:
            return f"a {kind} row without {missing[0]!r}"
        if problems := [p for name in needed if isinstance(row[name], list) for p in conversation.validate(row[name])]:
            return f"a {kind} row in which {problems[0]}"
        try:
            canonical_json(row)
            for name, value in row.items():  # a table of one row takes four times as long
                pa.array([value], type=known[name])
        except (TypeError, ValueError, pa.ArrowException) as error:
            return f"a {kind} row that cannot be stored ({str(error).splitlines()[0][:80]})"
    return ""


def _coroutine(path: Path) -> Callable:
    if not path.is_file():
        raise UserError("no such recipe", where=path)
    spec = importlib.util.spec_from_file_location(f"soulsmith_recipe_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        line = next((frame.lineno for frame in reversed(inspect.getinnerframes(error.__traceback__)) if frame.filename == str(path)), None)
        line = error.lineno if isinstance(error, SyntaxError) else line
        raise UserError(f"{type(error).__name__}: {error}", where=f"{path}:{line}" if line else path) from error
    own = getattr(module, "recipe", None)
    if not inspect.iscoroutinefunction(own) or len(inspect.signature(own).parameters) != 4:
        raise UserError("has no `async def recipe(seed, call, soul, prompts)`", where=path)
    return own
