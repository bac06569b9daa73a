"""Checks on wording: apologies, flattery, offers, filler, contractions.

The phrase lists are what small instruct models really say; a SOUL.md adds its own with `forbid`.
"""

import re

from soul.registry import never


def _any(*phrases: str) -> re.Pattern:
    body = "|".join(phrase.replace(" ", r"\s+").replace("'", "['’]") for phrase in phrases)
    return re.compile(rf"(?<![\w'’])(?:{body})(?!\w)", re.IGNORECASE)


_BE = "(?:i(?:'m| am)|you(?:'re| are)|that(?:'s| is))"
_REPLY = "(?:response|reply|version|answer|message|text)"
_HELP = "(?:(?:any|more|other|further|additional) )+(?:help|assistance|questions?|information|clarification|changes|details)"
APOLOGY = _any(
    "sorry", "apolog(?:y|ies|i[sz]e[sd]?|i[sz]ing|etic)", "my (?:bad|mistake|fault)", "(?:forgive|pardon|excuse) me",
    "(?:i|we) regret", "regrettably",
)  # fmt: skip
SYCOPHANCY = _any(
    "(?:great|good|nice) (?:question|point|catch|thinking|job|work|observation|suggestion)",
    "(?:excellent|fantastic|wonderful|amazing|brilliant|awesome|superb|insightful|lovely) "
    "(?:question|point|catch|thinking|job|work|observation|suggestion|idea|choice|approach|start|request)",
    f"{_BE} (?:absolutely|totally|completely|so|quite|exactly|100%) (?:right|correct|brilliant)",
    f"{_BE} (?:impressed|amazing|brilliant|a genius)", "i (?:really )?(?:love|admire|appreciate) (?:your|that|this|how you)",
    "you have (?:great|excellent|good) taste", "(?:what|such) an? (?:great|excellent|good|fantastic|wonderful|brilliant) \\w+",
)  # fmt: skip
OFFER = _any(
    "let me know", "feel free", "(?:(?:would|do) you (?:like|want)|want) me to", "shall i", "should i also",
    "(?:is there|need|want|if there(?:'s| is)|have) anything else", "anything else (?:i can|you)",
    "(?:happy|glad|here|ready) to (?:help|assist)", "(?:don't|do not) hesitate", "if you(?:'d| would)? (?:want|like) me to",
    f"(?:need|want|have|require) {_HELP}", "i can also (?:add|do|explain|give|help|make|show|write)",
    "reach out", "just ask me", "hope (?:this|that|it) helps",
)  # fmt: skip
FILLER = re.compile(
    r"\A(?:\W*(?:sure(?: thing)?|certainly|of course|absolutely|definitely|no problem|great|okay|ok|alright|well)[\s*_]*[!,.:])+\s*",
    re.IGNORECASE,
)
AI_TALK = _any(
    "as an? (?:ai|artificial intelligence|(?:large )?language model|assistant)", "my training data", "knowledge cutoff",
    "i(?:'m| am) (?:just )?an? (?:ai|(?:large )?language model|artificial intelligence)",
)  # fmt: skip
REVISED = _any(
    "as (?:revised|requested|suggested|instructed)", "i(?:'ve| have) (?:revised|rewritten|rephrased|reworded|incorporated|addressed the)",
    f"(?:here(?:'s| is) )?(?:the|my|a|this) (?:revised|updated|improved|corrected|rewritten) (?:\\w+ )?{_REPLY}",
    "(?:in line|in accordance|consistent) with (?:the|your) (?:principles?|critique|feedback|guidelines?)",
)  # fmt: skip

# a pronoun form contracts only where something follows it: "that's what it is." stays
_VERBS = ("do", "does", "did", "is", "are", "was", "were", "has", "have", "had", "could", "should", "would")
_NEGATED = {"will": "won't", "can": "can't"} | {verb: f"{verb}n't" for verb in _VERBS}
_JOINED = {"am": "'m", "is": "'s", "are": "'re", "will": "'ll"}
_FULL = {"'m": " am", "'re": " are", "'ve": " have", "'ll": " will", "'s": " is"}
_STAYS = r"(?<!as )(?<!what )(?<!how )(?<!where )(?<!than )(?<!whatever )(?<!whether )"
EXPANDED = re.compile(
    rf"\b(?:(?P<verb>{'|'.join(_NEGATED)})\s+not|(?P<cannot>can)not|(?P<let>let)\s+us(?= \w)"
    rf"|{_STAYS}\b(?P<who>i(?=\s+(?:am|will))|(?:it|that|there|he|she|what)(?=\s+(?:is|will))|(?:you|we|they)(?=\s+(?:are|will)))\s+(?P<be>am|is|are|will))\b"
    r"(?(be)(?=[ \t]+(?!(?:or|and|but|nor|to)\b|(?<=will )not\b)\w))",
    re.IGNORECASE | re.ASCII,
)
CONTRACTED = re.compile(
    r"\b(?:(?P<verb>wo|ca|do|does|did|is|are|was|were|has|have|had|could|should|would|must|need)n['’]t|(?P<let>let)['’]s"
    r"|(?P<who>i|you|we|they|it|he|she|that|there|what|who|here|where)(?P<tail>['’](?:m|re|ve|ll|s|d)))\b",
    re.IGNORECASE | re.ASCII,
)


def contract(match: re.Match) -> str:
    """The contraction of an EXPANDED match, in its case: Do not -> Don't."""
    if match.group().isupper() and len(match.group()) > 4:
        return contract(EXPANDED.match(match.group().lower() + " x")).upper()
    if head := match["verb"] or match["cannot"]:
        short = _NEGATED[head.lower()]
    elif match["let"]:
        head, short = match["let"], "let's"
    else:
        head, short = match["who"], match["who"].lower() + _JOINED[match["be"].lower()]
    return head + short[len(head) :] if short.startswith(head.lower()) else head[0] + short[1:]


def expand(match: re.Match) -> str:
    """The full form of a CONTRACTED match; "it's been" is "it has been", and 'd, which may be had or would, stays."""
    if verb := match["verb"]:
        return {"wo": verb[0] + "ill not", "ca": verb + "nnot"}.get(verb.lower(), verb + " not")
    if match["let"]:
        return match["let"] + " us"
    tail = match["tail"].replace("’", "'").lower()
    if tail == "'s" and re.match(r"\s+(?:been|got|had|become)\b", match.string[match.end() :]):
        return match["who"] + " has"
    return match["who"] + _FULL.get(tail, match["tail"])


never("no_apology", APOLOGY, "is an apology", "no apology or regret")
never("no_sycophancy", SYCOPHANCY, "is flattery", "no flattery: praise of the question or the person")
never("no_offer", OFFER, "offers more", "no offer of further help")
never("no_ai_talk", AI_TALK, "talks of being a model", "no talk of being an AI or a language model")
never("no_revision_talk", REVISED, "talks of a revision", 'reads as a first reply: no "as revised", no "here is the updated version"')
never("no_filler_opening", FILLER, "is filler", 'does not open with "sure!", "certainly," and the like')
never("contractions", EXPANDED, "can be contracted", "contracts: don't, it's, i'm, not do not, it is, i am")
never("no_contractions", CONTRACTED, "is a contraction", "no contractions: do not, it is")
