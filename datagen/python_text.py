"""The Python in a text: found, tidied, and looked at by its syntax tree. Texts are untrusted: code is parsed, never imported."""

import ast
import builtins
import io
import re
import textwrap
import tokenize
from functools import lru_cache

from datagen.code_seeds import tree_of
from soul.prose import fences

DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
IMPORTS = (ast.Import, ast.ImportFrom)
QUIET = (*DEFINITIONS, *IMPORTS)  # what shows nothing when it runs
# without one of these it is a number, a word or a line of another language that happens to parse
STATEMENTS = (*DEFINITIONS, *IMPORTS, ast.Assign, ast.AugAssign, ast.For, ast.While, ast.If, ast.With, ast.Try, ast.Call, ast.Lambda)
CODE_LINE = re.compile(
    r"^[ \t]*(?:(?:async )?def |class \w|@\w|import \w|from [\w.]+ import |(?:for|while|if|with|try)\b.*:|print ?\(|return\b)", re.M
)


def is_python(code: str) -> bool:
    tree = tree_of(code)
    return bool(tree) and any(isinstance(node, STATEMENTS) for node in ast.walk(tree))


def tidy(code: str) -> str:
    """`code` without blank lines around it and without a common indent, one line break at its end; otherwise as it is."""
    return textwrap.dedent(code.replace("\r\n", "\n")).strip("\n").rstrip() + "\n"


def python_in(text: str) -> str:
    """The Python of a response, or "": the fenced block that defines most, else the text, else its longest stretch that parses."""
    blocks = [(fence.language.lower(), tidy(text[fence.code_start : fence.code_end])) for fence in fences(text)]
    if blocks:
        found = [code for language, code in blocks if language.split(" ")[0] in ("", "python", "py", "python3") and is_python(code)]
        return max(found, key=lambda code: (len(defined(code)), len(code)), default="")
    if is_python(tidy(text)):
        return tidy(text)
    if not (start := CODE_LINE.search(text)):
        return ""
    ends = [match.start() for match in re.finditer(r"\n[ \t]*\n|\Z", text) if match.start() > start.start()][::-1]
    stretches = (tidy(text[start.start() : end]) for end in ends[:12])
    return next((code for code in stretches if defined(code)), "")


@lru_cache(maxsize=512)
def defined(code: str) -> tuple[str, ...]:
    """Names of the public functions and classes at the top of `code`."""
    tree = tree_of(code)
    return tuple(node.name for node in tree.body if isinstance(node, DEFINITIONS) and not node.name.startswith("_")) if tree else ()


def trimmed(code: str) -> str:
    """`code` without blanks at the ends of its lines, where the program stays the same."""
    bare = re.sub(r"[ \t]+$", "", code, flags=re.M)
    if bare == code or not (before := tree_of(code)) or not (after := tree_of(bare)):
        return code
    return bare if ast.dump(before) == ast.dump(after) else code


def without_comments(code: str) -> str:
    """`code` without the lines that hold nothing but a comment; the program is the same."""
    lines = code.splitlines(keepends=True)
    try:
        for token in tokenize.generate_tokens(io.StringIO(code).readline):
            if token.type == tokenize.COMMENT and not token.line[: token.start[1]].strip() and not token.string.startswith("#!"):
                lines[token.start[0] - 1] = ""
    except (tokenize.TokenError, SyntaxError, IndexError):
        return code
    thinned = tidy(re.sub(r"\n(?:[ \t]*\n){3,}", "\n\n\n", "".join(lines)))
    before, after = tree_of(code), tree_of(thinned)
    return thinned if before and after and ast.dump(before) == ast.dump(after) else code


def with_data(code: str, data: str) -> str:
    """`code` with the request's values before the first line that runs, where it uses them and would stop for lack of them."""
    tree, given = tree_of(code), tree_of(tidy(data))
    if not tree or not given or not all(isinstance(node, ast.Assign) for node in given.body):
        return code
    runs = [node for node in tree.body[ast.get_docstring(tree) is not None :] if not isinstance(node, QUIET)]

    def names(part: ast.AST, use: type) -> set[str]:
        return {node.id for node in ast.walk(part) if isinstance(node, ast.Name) and isinstance(node.ctx, use)}

    values, kept, used = names(given, ast.Store), names(tree, ast.Store), names(ast.Module(runs, []), ast.Load)
    if not (values & used) - kept - set(dir(builtins)) or not values.isdisjoint(kept):
        return code
    lines = code.splitlines(keepends=True)
    return "".join([*lines[: runs[0].lineno - 1], trimmed(tidy(data)), *lines[runs[0].lineno - 1 :]])
