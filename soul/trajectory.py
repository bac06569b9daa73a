"""Checks on what is done, not said: calls, their order and their results."""

import posixpath
import re

from soul.prose import words
from soul.registry import Reply, assistants, calls_of, check

_NOT_UNIQUE = re.compile(r"error: old_string (?:not found|occurs) ")  # the words of the Edit tool
_REFUSED = ("error:", "rejected by user")


@check("turn")
def explain_before_act(reply: Reply):
    """says something before each call"""
    if reply.calls and not words(reply.prose):
        yield (0, 0), f"calls {reply.calls[0][0]} without a word"


@check("turn")
def one_call_per_turn(reply: Reply):
    """at most one call in each message"""
    if len(reply.calls) > 1:
        yield (0, 0), f"{len(reply.calls)} calls in one message"


@check("turn")
def max_edit_lines(reply: Reply, n: int):
    """an edit of a file that exists replaces by at most n lines"""
    for name, args in reply.calls:
        lines = args.get("new_string", "").count("\n") + 1
        if name == "Edit" and args.get("old_string") and lines > n:
            yield (0, 0), f"an edit of {lines} lines, at most {n}"


@check("conversation")
def read_before_edit(messages: list[dict]):
    """reads a file before editing it (a new file needs no reading)"""
    known = set()
    for index, calls in _turns(messages):
        for name, args, _ in calls:
            if name == "Edit" and args.get("old_string") and _path(args) not in known:
                yield index, (0, 0), f"edits {_path(args):.60} without reading it first"
        opened = [(args, result) for name, args, result in calls if name == "Read" or (name == "Edit" and not args.get("old_string"))]
        known |= {_path(args) for args, result in opened if not result.startswith(_REFUSED)}


@check("conversation")
def unique_old_string(messages: list[dict]):
    """no edit fails because old_string is missing from the file or stands there more than once"""
    for index, calls in _turns(messages):
        for name, args, result in calls:
            if name == "Edit" and _NOT_UNIQUE.match(result):
                yield index, (0, 0), f"edit of {_path(args):.60} failed: {result.splitlines()[0]:.80}"


@check("conversation")
def max_failed_edits(messages: list[dict], n: int):
    """at most n edits of a file in a row fail on old_string (see unique_old_string), and none is left so: a later one works"""
    failed = {}
    for index, calls in _turns(messages):
        for name, args, result in calls:
            if name != "Edit" or (result.startswith("error:") and not _NOT_UNIQUE.match(result)):
                continue
            failed[_path(args)] = failed.get(_path(args), 0) + 1 if _NOT_UNIQUE.match(result) else 0
            if failed[_path(args)] > n:
                yield index, (0, 0), f"edit of {_path(args):.60} failed again: {result.splitlines()[0]:.80}"
            if "; new_string is already there" in result.partition("\n")[0]:  # then nothing is left to do
                del failed[_path(args)]
        for path in [path for path, times in failed.items() if times and not calls]:
            yield index, (0, 0), f"stops where an edit of {path:.60} has failed"
            del failed[path]


@check("conversation")
def no_repeated_call(messages: list[dict]):
    """never makes the same call twice in a row"""
    last = None
    for index, calls in _turns(messages):
        for name, args, _ in calls:
            if (name, args) == last:
                yield index, (0, 0), f"the same {name} call again"
            last = (name, args)


def _path(args: dict[str, str]) -> str:
    return posixpath.normpath(args.get("file_path", "").strip() or ".")


def _turns(messages: list[dict]):
    """(message index, [(tool, arguments, result)]) per assistant message; a call whose result is not there has ""."""
    for index in assistants(messages):
        calls, results = calls_of(messages[index]), []
        for message in messages[index + 1 :]:
            if message.get("role") != "tool" or len(results) == len(calls):
                break
            results.append(str(message.get("content") or ""))
        results += [""] * (len(calls) - len(results))
        yield index, [(name, args, result) for (name, args), result in zip(calls, results, strict=True)]
