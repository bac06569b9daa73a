"""Prompt templates to messages: sandboxed, strict in both directions, values never read as templates.

A template is one jinja file with the blocks `system` and `user` (either may be missing). A variable that the caller
does not give is an error, and so is one that the template does not use: a placeholder lost in an edit would otherwise
silently drop guidance from every prompt (it happened to the published pipelines).
"""

from pathlib import Path

from jinja2 import ChoiceLoader, FileSystemLoader, StrictUndefined, TemplateError, TemplateSyntaxError, meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from soul.errors import UserError
from soul.files import read_text, sha256_json

BUILT_IN = Path(__file__).resolve().parent.parent / "prompts"
BLOCKS = ("system", "user")


class Prompts:
    """The templates of `folder` (a path, or a built-in set such as `small`), each falling back to the built-in one of the
    same name. `hash` covers all sources."""

    def __init__(self, folder: str | Path | None = None):
        own = None if folder is None else Path(folder) if Path(folder).is_dir() else BUILT_IN / folder
        if own is not None and not own.is_dir():
            raise UserError("no such folder of prompts", where=folder)
        self.folders = [BUILT_IN] if own is None else [own, BUILT_IN]
        self._env = ImmutableSandboxedEnvironment(
            loader=ChoiceLoader([FileSystemLoader(place) for place in self.folders]), undefined=StrictUndefined,
            trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, autoescape=False,
        )  # fmt: skip
        names = sorted({path.name for place in self.folders for path in place.glob("*.j2")})
        self.hash = sha256_json([[name, read_text(self._path(name))] for name in names])
        self._wanted: dict[str, set[str]] = {}

    def render(self, name: str, /, **values: object) -> list[dict]:
        """The messages of template `name`.j2. Raises UserError, naming the template (and line, for a syntax error), when it is
        missing or broken, or when its variables are not exactly `values`."""
        path = self._path(f"{name}.j2")
        try:
            template = self._env.get_template(f"{name}.j2")
            self._check_names(name, path, set(values))
            context = template.new_context(values)
            parts = {role: "".join(template.blocks[role](context)).removesuffix("\n") for role in BLOCKS if role in template.blocks}
        except TemplateSyntaxError as error:
            raise UserError(f"template error: {error.message}", where=f"{path}:{error.lineno}") from None
        except (TemplateError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
            raise UserError(f"template error: {error}", where=path) from None
        if not parts:
            raise UserError("has neither a `system` nor a `user` block", where=path)
        return [{"role": role, "content": text} for role, text in parts.items() if text.strip()]

    def _check_names(self, name: str, path: Path, given: set[str]) -> None:
        if name not in self._wanted:
            self._wanted[name] = meta.find_undeclared_variables(self._env.parse(read_text(path)))
        if unused := given - self._wanted[name]:
            raise UserError(f"does not use {', '.join(sorted(unused))}", where=path, fix="Every variable must reach the teacher.")
        if unknown := self._wanted[name] - given:
            fix = f"It has {', '.join(sorted(given))}."
            raise UserError(f"uses {', '.join(sorted(unknown))}, which this stage does not have", where=path, fix=fix)

    def _path(self, file: str) -> Path:
        path = next((place / file for place in self.folders if (place / file).is_file()), None)
        if path is None:
            raise UserError(f"no prompt template {file}", where=self.folders[0])
        return path
