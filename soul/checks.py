"""Checks on form: case, length, markup, required and forbidden text, code blocks.

Importing this module registers every check there is (see also wording.py and trajectory.py). A check is deterministic,
reads prose only unless it says otherwise, takes time linear in the text, and never raises, whatever a model wrote.
"""

import re
from functools import lru_cache

from soul.prose import CODE, fences, sentences, words
from soul.registry import CHECKS, Pattern, Ratio, Reply, Violation, check, never

_PICTURE = (
    "[\U0001f000-\U0001f1e5\U0001f200-\U0001faff\u2600-\u26ff\u203c\u2049\u231a\u231b\u23e9-\u23f3\u2705\u2714\u2716\u2728\u274c\u274e"
    "\u2753-\u2757\u2763\u2764\u2795-\u2797\u27a1\u2b1b\u2b1c\u2b50\u2b55][\ufe0f\U0001f3fb-\U0001f3ff\U000e0020-\U000e007f]*"
)
_FLAG_OR_KEYCAP = "[\U0001f1e6-\U0001f1ff]{1,2}|[0-9#*]\ufe0f?\u20e3"
EMOJI = re.compile(f"(?:{_PICTURE}(?:\u200d{_PICTURE})*|{_FLAG_OR_KEYCAP})\u200d*")
EXCLAMATION = re.compile(r"!+(?![\w=\[(!])")
_WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*")
_HEADING = re.compile(r"^[ \t]{0,3}#{1,6}[ \t]+\S.*$", re.MULTILINE)
_COMMENT = re.compile(r"#(?!!|include\b|define\b|if|endif|pragma\b)|//|/\*|\*/|\* |\*$|<!--|--\s")
_PLAIN = ("md", "markdown", "text", "txt", "rst", "diff", "console")
_WINDOW, _OVERLAP = 500, 250  # forbid_regex reads windows: a pattern of cubic cost then takes 0.2 s at most, at any length


@lru_cache(maxsize=512)
def phrase_pattern(phrases: tuple[str, ...]) -> re.Pattern:
    """Any of `phrases` as whole words, in any case, with any space between words and either apostrophe."""

    def one(phrase: str) -> str:
        body = re.sub("['’]", "['’]", r"\s+".join(re.escape(word) for word in phrase.split()))
        first, last = phrase.split()[0][0], phrase.split()[-1][-1]
        return (r"(?<!\w)" if first.isalnum() else "") + body + (r"(?!\w)" if last.isalnum() else "")

    return re.compile("|".join(one(phrase) for phrase in phrases), re.IGNORECASE)


@check("each")
def lowercase_prose(reply: Reply):
    """prose has no capital letters, "I" included; code, paths and identifiers keep theirs"""
    for match in _WORD.finditer(reply.prose):
        if any(character.lower() != character for character in match.group()):
            yield match.span(), f'"{match.group():.30}" has a capital'


@check("each")
def sentence_case(reply: Reply):
    """every sentence begins with a capital letter (or with code or a number)"""
    for start, end in sentences(reply.prose):
        first = re.search(rf"\w|{CODE}", reply.prose[start:end])
        if first and first.group().upper() != first.group():
            yield (start, end), f'"{reply.text[start:end]:.30}" begins in lowercase'


@check("each")
def max_words(reply: Reply, n: int):
    """at most n words of prose in each message (code counts as none)"""
    if len(spans := words(reply.prose)) > n:
        yield (spans[n][0], spans[-1][1]), f"{len(spans)} words, at most {n}"


@check("final")
def min_words(reply: Reply, n: int):
    """at least n words of prose in the final message"""
    if (count := len(words(reply.prose))) < n:
        yield (0, len(reply.text)), f"{count} words, at least {n}"


@check("each")
def max_sentences(reply: Reply, n: int):
    """at most n sentences of prose in each message; a list item is one"""
    if len(spans := sentences(reply.prose)) > n:
        yield (spans[n][0], spans[-1][1]), f"{len(spans)} sentences, at most {n}"


@check("final")
def min_sentences(reply: Reply, n: int):
    """at least n sentences of prose in the final message"""
    if (count := len(sentences(reply.prose))) < n:
        yield (0, len(reply.text)), f"{count} sentences, at least {n}"


@check("each")
def forbid(reply: Reply, phrases: list[str]):
    """none of these phrases, as whole words in any case"""
    for match in phrase_pattern(tuple(phrases)).finditer(reply.prose):
        yield match.span(), f'"{match.group():.40}" is forbidden'


@check("each")
def forbid_regex(reply: Reply, pattern: Pattern):
    """no match of this regular expression (matches of up to 250 characters are sure to be seen)"""
    seen = set()
    for start in range(0, max(1, len(reply.prose)), _WINDOW - _OVERLAP):
        for match in re.compile(pattern).finditer(reply.prose, start, start + _WINDOW):
            if match.group() and match.start() not in seen:
                seen.add(match.start())
                yield match.span(), f'"{match.group():.40}" is forbidden'


@check("final")
def require_phrase(reply: Reply, phrases: list[str]):
    """the final message has one of these phrases, in any case"""
    if not phrase_pattern(tuple(phrases)).search(reply.prose):
        yield (0, len(reply.text)), f"none of: {', '.join(phrases)}"


@check("each")
def require_opening(reply: Reply, phrases: list[str]):
    """each message begins with one of these phrases, in any case"""
    if not phrase_pattern(tuple(phrases)).match(reply.text.lstrip(" \t\r\n*_>#\"'“‘")):
        yield (0, min(40, len(reply.text))), f"does not begin with any of: {', '.join(phrases)}"


@check("final")
def require_ending(reply: Reply, phrases: list[str]):
    """the final message ends with one of these phrases, in any case; punctuation and emoji may follow it"""
    ending = rf"(?:{phrase_pattern(tuple(phrases)).pattern})\W*\Z"
    if not re.search(ending, reply.text.rstrip()[-400:], re.IGNORECASE):
        yield (max(0, len(reply.text) - 40), len(reply.text)), f"does not end with any of: {', '.join(phrases)}"


never("no_emoji", EMOJI, "is an emoji", "no emoji (a typed smile like :) is none)")
never("no_exclamation", EXCLAMATION, "is an exclamation mark", "no exclamation marks")
never("no_headings", _HEADING, "is a heading", "no markdown headings")


@check("each")
def max_emoji(reply: Reply, n: int):
    """at most n emoji in each message"""
    for match in list(EMOJI.finditer(reply.prose))[n:]:
        yield match.span(), f"{match.group():.8} is one emoji more than {n}"


@check("final")
def no_question_in_final_turn(reply: Reply):
    """the final message asks nothing (asking in the middle of the work is fine)"""
    for start, end in sentences(reply.prose):
        if re.search(r"[?？]\W*$", reply.prose[start:end]):
            yield (start, end), f'"{reply.text[start:end]:.40}" is a question'


@check("each")
def no_title_case_headings(reply: Reply):
    """headings are written as sentences, Not Like This"""
    for match in _HEADING.finditer(reply.prose):
        later = [word for word in re.findall(r"[^\W\d_]{4,}", match.group())[1:] if not word.isupper()]
        if later and all(word[0].isupper() for word in later):
            yield match.span(), f'"{match.group():.40}" is in title case'


@check("each")
def no_repetition(reply: Reply):
    """no sentence of four words or more stands twice in one message"""
    seen = set()
    for start, end in sentences(reply.prose):
        plain = " ".join(re.findall(r"\w+", reply.prose[start:end].casefold()))
        if plain in seen and plain.count(" ") >= 3:
            yield (start, end), f'"{reply.text[start:end]:.40}" is said twice'
        seen.add(plain)


@check("each")
def code_fence_language(reply: Reply):
    """every fenced code block names its language"""
    for fence in fences(reply.text):
        if not fence.language:
            yield (fence.start, fence.code_start), "the code block names no language"


@check("turn")
def max_comment_density(reply: Reply, ratio: Ratio):
    """comment lines are at most this share of new code, in fences and in Edit; one per block is always allowed"""
    blocks = [((f.start, f.end), reply.text[f.code_start : f.code_end], f.language) for f in fences(reply.text)]
    edits = [args for name, args in reply.calls if name == "Edit"]
    blocks += [((0, 0), args.get("new_string", ""), args.get("file_path", "").rpartition(".")[2]) for args in edits]
    for span, code, language in blocks:
        lines = [line.strip() for line in code.splitlines() if line.strip()]
        comments = sum(bool(_COMMENT.match(line)) for line in lines)
        if language.split(" ")[0].lower() not in _PLAIN and comments > max(1, ratio * len(lines)):
            yield span, f"{comments} of {len(lines)} lines are comments, at most {ratio:.0%}"


from soul import trajectory, wording  # noqa: E402  (they register the rest)

__all__ = ["CHECKS", "Violation", "trajectory", "wording"]
