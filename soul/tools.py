"""The four tools: one spec, used by rollouts, evals, the template's hash and the agent (workspace/ implements them)."""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Param:
    name: str
    doc: str
    required: bool = False
    type: str = "string"  # string | integer | boolean; on the wire and in the template every value is text


@dataclass(frozen=True)
class ToolSpec:
    name: str
    doc: str
    params: tuple[Param, ...]


TOOLS: dict[str, ToolSpec] = {spec.name: spec for spec in (
    ToolSpec("Read", "read a file with line numbers", (
        Param("file_path", "file to read", required=True),
        Param("offset", "first line, from 1", type="integer"),
        Param("limit", "number of lines", type="integer"),
    )),
    ToolSpec("Edit", "replace old_string, which must occur exactly once, by new_string; without old_string, create the file", (
        Param("file_path", "file to change", required=True),
        Param("old_string", "text to replace, exactly as in the file"),
        Param("new_string", "text to put there", required=True),
        Param("replace_all", "true: replace every occurrence", type="boolean"),
    )),
    ToolSpec("Grep", "search files for a regular expression", (
        Param("pattern", "regular expression", required=True),
        Param("path", "file or directory, default ."),
        Param("-A", "lines to show after a match", type="integer"),
        Param("-B", "lines to show before a match", type="integer"),
        Param("mode", "content, files or count"),
    )),
    ToolSpec("Bash", "run a shell command", (
        Param("command", "the command", required=True),
        Param("timeout", "seconds", type="integer"),
    )),
)}  # fmt: skip


def problem(name: str, args: dict[str, str]) -> str | None:
    """What is wrong with a call, in the words the tool itself would use; None when it may be executed."""
    spec = TOOLS.get(name)
    if spec is None:
        return f"unknown tool {name}; the tools are {', '.join(TOOLS)}"
    params = {param.name: param for param in spec.params}
    for key, value in args.items():
        if key not in params:
            return f"{name} has no argument {key}"
        if not isinstance(value, str):
            return f"{name}: {key} must be text"
        if params[key].type == "integer" and not re.fullmatch(r"\s*\+?[0-9]{1,9}\s*", value, re.ASCII):
            return f"{name}: {key} must be a whole number"
        if params[key].type == "boolean" and value.strip().lower() not in ("true", "false"):
            return f"{name}: {key} must be true or false"
    return next((f"{name} needs {param.name}" for param in spec.params if param.required and param.name not in args), None)


def openai_schema(names: tuple[str, ...] | None = None) -> list[dict]:
    """The specs as the `tools` of an OpenAI-compatible request (and of chat templates that take tools)."""

    def schema(spec: ToolSpec) -> dict:
        properties = {param.name: {"type": param.type, "description": param.doc} for param in spec.params}
        parameters = {"type": "object", "properties": properties, "required": [param.name for param in spec.params if param.required]}
        return {"type": "function", "function": {"name": spec.name, "description": spec.doc, "parameters": parameters}}

    return [schema(spec) for name, spec in TOOLS.items() if names is None or name in names]
