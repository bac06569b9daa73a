"""Functions and docstrings of installed Python code, and requests made from them.

The embedded default of the quickstart: real input that every machine with a Python has. Nothing is imported or run;
sources are only parsed.
"""

import ast
import builtins
import hashlib
import importlib.util
import random
import re
import symtable
import sysconfig
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from datagen.phrases import VERBS, ask
from soul.errors import UserError

HELD_OUT_SHARE = 0.2
MAX_FILE_BYTES = 64_000
MAX_PART_CHARS = 8_000
MAX_ALONE_CHARS = 600
# what code may import, or not name, that is run to see whether it works: the same result each time, and nothing outside
HARMLESS = {
    "math", "re", "itertools", "collections", "functools", "string", "json", "operator", "heapq", "bisect", "statistics", "fractions",
    "decimal", "typing", "dataclasses", "enum", "abc", "copy", "textwrap",
}  # fmt: skip
UNEVEN = {
    "open", "print", "eval", "exec", "input", "compile", "exit", "quit", "globals", "locals", "vars", "id", "hash", "__import__", "breakpoint",
}  # fmt: skip
UNFIT = (ast.While, ast.Yield, ast.YieldFrom, ast.With, ast.Global, ast.ClassDef)
SKIP_PARTS = {
    "test", "tests", "idlelib", "idle_test", "lib2to3", "encodings", "site-packages", "dist-packages", "__pycache__", "turtledemo",
    "ensurepip", "pydoc_data", "distutils", "node_modules", "build", "venv",
}  # fmt: skip


@dataclass(frozen=True)
class Module:
    """One source file: its dotted name, its path below the walked root, and its text; of a long file a part of whole statements.
    `imports` are those of the whole file, one name each."""

    name: str
    path: str
    text: str
    imports: tuple[str, ...] = ()


@dataclass(frozen=True)
class Function:
    """A function or method; `source` is dedented, `line`..`end_line` (1-based) are its place in the file. `doc` is the first
    sentence of its docstring. `alone`: the text of a small file that it can run in. One of the two may be ""."""

    module: Module
    qualname: str
    args: str
    doc: str
    source: str
    line: int
    end_line: int
    alone: str = ""

    @property
    def name(self) -> str:
        return self.qualname.rpartition(".")[2]

    @property
    def is_method(self) -> bool:
        return "." in self.qualname

    @property
    def id(self) -> str:
        return f"{self.module.name}.{self.qualname}"


def package_root(name: str) -> Path:
    """The directory (or single file) that holds an installed package's source, without importing it."""
    try:
        spec = importlib.util.find_spec(name.partition(".")[0])
    except (ImportError, ValueError):
        spec = None
    if spec is None or not (spec.submodule_search_locations or (spec.origin or "").endswith(".py")):
        raise UserError(f"no installed Python package called {name!r} has sources here", fix="name an installed package, e.g. json")
    return Path(spec.submodule_search_locations[0] if spec.submodule_search_locations else spec.origin)


def read_code(source: str) -> list[Function]:
    """The functions of `stdlib`, of a directory or file, or of `package:NAME`. Raises UserError when there are none."""
    prefix = source.removeprefix("package:") if source.startswith("package:") else ""
    root = package_root(prefix) if prefix else Path(sysconfig.get_path("stdlib") if source == "stdlib" else source)
    if not root.exists():
        raise UserError("no such file or directory", where=source, fix="give a directory of Python code, or `stdlib`")
    functions = list(walk(root, prefix))
    if not functions:
        raise UserError("no Python function with a docstring found", where=str(root), fix="give a directory of documented Python code")
    return functions


def walk(root: Path, prefix: str = "") -> Iterator[Function]:
    """Functions of all public modules below root, in a stable order; files that can't be read or parsed are passed over."""
    for path in [root] if root.is_file() else sorted(root.rglob("*.py"), key=lambda path: path.as_posix()):
        relative = Path(path.name) if root.is_file() else path.relative_to(root)
        parts = relative.with_suffix("").parts
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        if any(part in SKIP_PARTS or part.startswith(("_", ".", "test_")) or part.endswith("_test") for part in parts):
            continue
        name = ".".join(part for part in (prefix, *parts) if part) or relative.stem
        try:
            if path.stat().st_size > MAX_FILE_BYTES:
                continue
            text = path.read_bytes().decode("utf-8").replace("\r\n", "\n")
            yield from functions_of(Module(name, relative.as_posix(), text))
        except (OSError, UnicodeDecodeError, SyntaxError, ValueError, RecursionError):
            continue


def functions_of(module: Module) -> Iterator[Function]:
    """Public top-level functions, and methods of public top-level classes, without a decorator, that have a docstring or can run alone."""
    for part, nodes in parts_of(module):
        lines, known = part.text.splitlines(keepends=True), top_level(nodes)
        for node in nodes:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                prefix, items = f"{node.name}.", node.body
            else:
                prefix, items = "", [node]
            for item in items:
                if not isinstance(item, ast.FunctionDef) or item.name.startswith("_") or item.decorator_list:
                    continue
                doc, small = first_sentence(ast.get_docstring(item) or ""), "" if prefix else alone(item, known, lines)
                if doc or small:
                    source = dedent("".join(lines[item.lineno - 1 : item.end_lineno]), item.col_offset)
                    yield Function(part, prefix + item.name, ast.unparse(item.args), doc, source, item.lineno, item.end_lineno, small)


def top_level(nodes: Sequence[ast.stmt]) -> dict[str, ast.stmt]:
    """The statement at the top of a module that gives each name."""
    known: dict[str, ast.stmt] = {}
    for node in nodes:
        if isinstance(node, ast.Import | ast.ImportFrom):
            known |= {(alias.asname or alias.name).partition(".")[0]: node for alias in node.names}
        elif isinstance(node, ast.Assign):
            known |= {target.id: node for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            known[node.name] = node
    return known


def alone(function: ast.FunctionDef, known: dict[str, ast.stmt], lines: list[str]) -> str:
    """A file of `function` and the imports, constants and helpers that it needs; "" for one that takes no plain arguments, is long,
    or could do more than compute."""
    needed, todo, arguments = {function}, [function], function.args
    if not 1 <= len(arguments.args) - len(arguments.defaults) <= 3 or function.end_lineno - function.lineno > 24:
        return ""
    while todo:
        for node in ast.walk(todo.pop()):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module] if isinstance(node, ast.ImportFrom) else []
            name = node.id if isinstance(node, ast.Name) else ""
            if isinstance(node, UNFIT) or name in UNEVEN or not HARMLESS.issuperset(modules):
                return ""
            if name in known and known[name] not in needed:
                needed.add(known[name])
                todo.append(known[name])
    text = ""
    for node in sorted(needed, key=lambda node: node.lineno):
        gap = "\n\n" if text and (isinstance(node, ast.FunctionDef) or "\ndef " in f"\n{text}") else ""
        text += gap + dedent("".join(lines[node.lineno - 1 : node.end_lineno]), 0)
    fits = len(text) <= MAX_ALONE_CHARS and text.isascii() and "\t" not in text
    return text if fits and not outside(text) else ""  # of a long module a part is known


def parts_of(module: Module) -> list[tuple[Module, list[ast.stmt]]]:
    """A module cut between top-level statements into parts of about MAX_PART_CHARS, each parsed by itself (so that line
    numbers are its own). A rollout carries its files, so they must be short; a class longer than a part stays whole."""
    lines = module.text.splitlines(keepends=True)
    nodes = parse(module.text).body
    module, cuts, size = replace(module, imports=imports_of(nodes)), [0], 0
    for node in nodes[1:]:
        start = min([node.lineno, *(item.lineno for item in getattr(node, "decorator_list", []))]) - 1
        size = sum(map(len, lines[cuts[-1] : max(start, node.end_lineno)]))
        if size > MAX_PART_CHARS and start > cuts[-1] and not lines[start][:1].isspace():
            cuts.append(start)
    if len(cuts) == 1:
        return [(module, nodes)]
    texts = ["".join(lines[start:end]).strip("\n") + "\n" for start, end in zip(cuts, [*cuts[1:], len(lines)], strict=True)]
    return [(replace(module, text=text), parse(text).body) for text in texts]


def imports_of(nodes: Sequence[ast.stmt]) -> tuple[str, ...]:
    """The absolute imports among these statements, one name a line."""
    starts = [(f"from {node.module} ", node) for node in nodes if isinstance(node, ast.ImportFrom) and not node.level]
    starts += [("", node) for node in nodes if isinstance(node, ast.Import)]
    return tuple(f"{start}import {ast.unparse(alias)}" for start, node in starts for alias in node.names)


def outside(code: str) -> set[str]:
    """The names that code takes from around it, other than builtins; "?" for code that parses and yet is none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tables = [symtable.symtable(code, "<code>", "exec")]
    except SyntaxError:
        return {"?"}
    for table in tables:
        tables += table.get_children()
    own = {symbol.get_name() for symbol in tables[0].get_symbols() if symbol.is_assigned() or symbol.is_imported()}
    named = [symbol for table in tables for symbol in table.get_symbols() if symbol.is_global()]
    return {symbol.get_name() for symbol in named if symbol.is_referenced() or symbol.is_declared_global()} - own - {*dir(builtins)}


def parse(text: str) -> ast.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old sources have invalid escapes
        return ast.parse(text)


def tree_of(text: str) -> ast.Module | None:
    """Its syntax tree, None for what is no Python."""
    try:
        return parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def brief(function: Function) -> str:
    """The source with the docstring cut to its first sentence: short enough for a small model's context, and still real."""
    node = parse(function.source).body[0]
    lines, docstring = function.source.splitlines(), node.body[0]
    if docstring.lineno == node.lineno:
        return function.source
    indent = " " * docstring.col_offset
    kept = [*lines[: docstring.lineno - 1], f'{indent}"""{function.doc}."""', *lines[docstring.end_lineno :]]
    body = [line for i, line in enumerate(kept) if line.strip() or i > docstring.lineno]
    return "\n".join(body) + "\n"


def dedent(source: str, by: int) -> str:
    """Removes `by` leading blanks where a line has them (a string's continuation lines may not)."""
    lines = [line[by:] if not line[:by].strip() else line for line in source.splitlines()]
    return "\n".join(line.rstrip() for line in lines) + "\n"


def first_sentence(docstring: str) -> str:
    """The first sentence of a docstring as one line without its full stop, or "" when it isn't a plain short sentence."""
    paragraph = " ".join(docstring.strip().split("\n\n")[0].split())
    sentence = re.split(r"(?<=[a-z)\]'\"`])\.(?:\s|$)", paragraph)[0].strip().rstrip(".:")
    plain = sentence.isascii() and not re.search(r"[<>{}|\\]|--|->|\.\.\.|::|``|^\w*\(|\(c\)|http|>>>|[*?]|\be\.g|\bi\.e", sentence)
    balanced = sentence.count("(") == sentence.count(")") and not (sentence.count('"') % 2 or sentence.count("`") % 2)
    return sentence if plain and balanced and 3 <= len(sentence.split()) <= 18 and sentence[:1].isalpha() else ""


def is_held_out(module_name: str) -> bool:
    """Whether a module is kept for evals: a stable hash of its name, so the split is the same on every machine and run."""
    return int.from_bytes(hashlib.sha256(module_name.encode()).digest()[:4]) / 2**32 < HELD_OUT_SHARE


def split(functions: Iterable[Function]) -> tuple[list[Function], list[Function]]:
    """(train, held_out): the two share no module."""
    train, held_out = [], []
    for function in functions:
        (held_out if is_held_out(function.module.name) else train).append(function)
    return train, held_out


# ---- docstrings as words in a sentence

CODE_WORD = re.compile(
    r"(?<![\w`'\"])(?:[A-Za-z_]+[._][\w.]*\w(?:\(\)|\[[^\]\s]*\])?|\w+\(\)|[a-z]+[A-Z]\w*|[A-Z]\w*[a-z][A-Z]\w*|None|True|False)(?![\w`/'\"])"
)


def imperative(doc: str) -> str:
    """'Returns True if s is lowercase' -> 'return `True` if s is lowercase'; "" when it doesn't begin with a known verb."""
    first, _, rest = doc.partition(" ")
    word = first.lower()
    stems = [word, word.removesuffix("s"), word.removesuffix("es"), word.removesuffix("ies") + "y"]
    verb = next((stem for stem in stems if stem in VERBS), None)
    return f"{verb} {quoted(rest.replace(' and returns ', ' and return '))}" if verb and rest else ""


def third_person(doc: str) -> str:
    """'Return True if s is lowercase' -> 'returns `True` if s is lowercase'; "" when it doesn't begin with a known verb."""
    verb, _, rest = imperative(doc).replace(" and return ", " and returns ").replace(", return ", ", returns ").partition(" ")
    also = r"\band (\w+)(?= (?:the|an?|its?|them|their|all|whether|if)\b)"
    return verb and f"{inflected(verb)} {re.sub(also, lambda word: f'and {inflected(word[1])}' if word[1] in VERBS else word[0], rest)}"


def inflected(verb: str) -> str:
    if verb.endswith("y") and verb[-2] not in "aeou":
        return f"{verb[:-1]}ies"
    return f"{verb}{'es' if verb.endswith(('s', 'sh', 'ch', 'x', 'z', 'o')) else 's'}"


def quoted(text: str) -> str:
    """Puts identifiers in backticks, so that they count as code and keep their case."""
    return CODE_WORD.sub(lambda word: f"`{word[0]}`", text)


# ---- seeds for generate -> critique -> revise


def chat_seeds(functions: Sequence[Function], n: int, seed: int = 0) -> list[dict]:
    """n seed rows {id, prompt, source} in a varied mixture: what is X, how to write X, what does this code do."""
    rows: dict[str, dict] = {}
    modules = by_module(function for function in functions if imperative(function.doc))
    for attempt in range(8 * n if modules else 0):
        rng = random.Random(f"chat:{seed}:{attempt}")
        function = rng.choice(modules[rng.choice(list(modules))])
        prompt = chat_prompt(rng, function)
        rows.setdefault(prompt, {"id": f"chat-{seed}-{attempt}", "prompt": prompt, "source": f"code:{function.module.name}"})
        if len(rows) == n:
            break
    return list(rows.values())


def chat_prompt(rng: random.Random, function: Function) -> str:
    kind = rng.choice(["chat", "chat", "write", "code"])
    code = brief(function)
    if kind == "code" and len(code) <= 600:
        return f"{ask(rng, rng.choice(['code', 'discuss']))}\n```python\n{code}```"
    if kind == "write" and not function.is_method and len(f"{function.name}({function.args})") <= 60:
        return ask(rng, "write", sig=f"`{function.name}({function.args})`", doc=imperative(function.doc))
    return ask(rng, rng.choice(["chat", "chat", "use"]), id=rng.choice([function.id, f"`{function.id}`"]))


def by_module(items: Iterable) -> dict[str, list]:
    """Functions, or what has a `function`, by the names of their modules."""
    groups: dict[str, list] = {}
    for item in items:
        groups.setdefault(getattr(item, "function", item).module.name, []).append(item)
    return groups
