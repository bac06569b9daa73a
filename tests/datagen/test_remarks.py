"""Remarks by a scripted teacher for real rollouts, through the command, the engine and the journal; only the teacher is not real."""

import hashlib
import json
import re
from dataclasses import replace

import pytest
from fake_teacher import FakeTeacher, answer, completion
from hypothesis import given
from hypothesis import strategies as st

import soulsmith
from datagen import convert, generate
from datagen.convert import Config
from datagen.remarks import Remarks, read_remarks, untrue
from datagen.replay import replay
from datagen.rollouts import JUDGMENTS
from soul import conversation
from soul.errors import UserError
from soul.rows import read_rows
from soul.spec import parse_soul, run_checks

SOUL = """# moss

a small helper.

## Principles

- writes in lowercase. <!-- id: lower; check: lowercase_prose -->
- never shouts. <!-- id: calm; check: no_exclamation; repair: yes -->
- sounds warm. <!-- id: warm -->
- speaks first. <!-- id: first; check: explain_before_act; check: read_before_edit -->
"""
CODE = '''"""Shapes."""


def area(a, b):
    """Return the area of a rectangle."""
    return a * b


def perimeter(a, b=1):
    """Return the length of the rectangle's border."""
    return a + a + b + b


def square(a):
    """Return the area of a square with that side."""
    return area(a, a)
'''
FINE = '[{"verdict": "ok"}]'
BUILT = {}  # rollouts before anybody words them, for all tests


def notes_in(body):
    return {int(n): text for n, text in re.findall(r"^assistant, message (\d+): (.*)", body["messages"][-1]["content"], re.M)}


def blocks(said):
    return "".join(f"=== {number}\n{text}\n" for number, text in said.items())


class Cast:
    """Drafts with a capital and a shout, revisions without; `log` has the stages. A part is a text, an answer, or made of the body."""

    def __init__(self, **parts):
        self.log, self.parts = [], {"draft": self.draft, "revise": self.revise, "critique": FINE} | parts

    def __call__(self, body, n):
        system, user = body["messages"][0]["content"], body["messages"][-1]["content"]
        stage = "critique" if "JSON" in user else "revise" if system.startswith("# moss") else "draft"
        self.log.append(stage := "repair" if "It cannot be used:" in user and "repair" in self.parts else stage)
        said = self.parts[stage]
        return said(body) if callable(said) else said

    def draft(self, body):
        return blocks({number: f"Sure! {text}" for number, text in notes_in(body).items()})

    def revise(self, body):
        asked = re.search(r"^Write anew: ([\d, ]+)\.", body["messages"][-1]["content"], re.M)[1].split(", ")
        return blocks(
            {n: re.sub(r"`[^`]*`|[^`]+", lambda m: m[0] if m[0][0] == "`" else m[0].lower(), notes_in(body)[int(n)]) for n in asked}
        )


@pytest.fixture
def run(tmp_path, monkeypatch):
    """run(cast, **config) -> (rows, pairs, stats, teacher) of the command."""
    (tmp_path / "code").mkdir()
    (tmp_path / "code/shapes.py").write_text(CODE)
    (tmp_path / "SOUL.md").write_text(SOUL)

    real = convert.from_code

    def from_code(config, *rest):
        key = (config.n, config.seed, config.workers)
        if key not in BUILT:
            BUILT[key] = ("code", *real(config, *rest)[1:])
        return BUILT[key]

    monkeypatch.setattr(convert, "from_code", from_code)

    def go(cast, name="run", **more):
        teacher = FakeTeacher(cast)
        monkeypatch.setattr(generate, "open_teacher", lambda spec, **routes: teacher)
        given = {"soul": tmp_path / "SOUL.md", "from_code": str(tmp_path / "code"), "n": 12, "include_held_out": True, "teacher": "x:y"}
        assert convert.main(Config(**given | {"out": tmp_path / name} | more)) == 0
        data = tmp_path / name / "data"
        files = [read_rows(data / f"rollouts{kind}.parquet") for kind in ("", "_preference")]
        return *files, json.loads((data / "rollouts_stats.json").read_text()), teacher

    return go


def texts(row):
    return [m["content"] for m in row["messages"] if m["role"] == "assistant"]


def calls(messages):
    return [conversation.named_calls(message) for message in messages]


def voiced(pairs):
    return convert.voiced(pairs)


def reasons(stats):
    return stats["remarks"]["by_templates"]


def test_first_drafts_are_the_rejected_side_and_calls_are_equal(run):
    plain = {row["id"]: row for row in run(None, "plain", teacher="")[0]}
    rows, pairs, stats, _ = run(cast := Cast())
    assert stats["remarks"]["by_teacher"] == len(rows) == 12 and not reasons(stats) and set(cast.log) == {"draft", "revise", "critique"}
    soul = parse_soul(SOUL)
    for row in rows:
        assert not run_checks(soul, row["messages"]) and all(check["ok"] for check in row["checks"]) and replay(row)[1] == ""
        old = plain[row["id"]]
        assert calls(row["messages"]) == calls(old["messages"]) and row["files"] == old["files"] and row["reason"] == old["reason"]
        assert (
            all(text.startswith("sure") for text in texts(row)) and row["principles"] == ["lower", "calm"] and row["served"] == ["fake-1"]
        )
        assert [step["stage"] for step in row["trail"]] == ["remarks", "critique", "remarks_revise", "critique"]
    by_id = {f"{row['id']}-{at}": (row, at) for row in rows for at, m in enumerate(row["messages"]) if m["role"] == "assistant"}
    assert {pair["id"] for pair in voiced(pairs)} == set(by_id)
    for pair in voiced(pairs):
        (row, at), [chosen], [rejected] = by_id[pair["id"]], pair["chosen"], pair["rejected"]
        assert pair["prompt"] == row["messages"][:at] and chosen == row["messages"][at] and pair["files"] == row["files"]
        assert calls([chosen]) == calls([rejected]) and rejected["content"].startswith("Sure! ") and chosen["content"].startswith("sure")
        assert pair["principles"] == ["lower", "calm"] and run_checks(soul, [*pair["prompt"], rejected])
    assert SOUL.split("\n")[2] not in json.dumps([rows, pairs])


def test_the_draft_does_not_see_the_soul_and_only_what_has_no_check_is_criticised(run):
    teacher = run(Cast())[3]
    for body in map(json.loads, teacher.sent):
        system, user = (message["content"] for message in body["messages"])
        assert ("a small helper" in system) == ("Write all of them" not in user)
        if "You review" in system:
            assert "each of these principles: warm." in user
        elif "Write anew" in user:
            assert re.search(r'^- message 1: writes in lowercase\. \(.*: "S\w*"\)$', user, re.M)
        else:  # in sentence case, whatever the SOUL writes
            assert re.search(r"^assistant, message 1: (?:[A-Z]|`)", user, re.M)


def test_pairs_about_calls_stay_as_they_are(run):
    before = run(None, "plain", teacher="", n=40, seed=3)[1]
    after = run(Cast(), n=40, seed=3)[1]
    about = [pair for pair in before if pair["reason"] in JUDGMENTS]
    assert about and [pair for pair in after if pair["reason"] in JUDGMENTS] == about


def test_the_same_command_again_sends_nothing_and_more_rows_send_the_new_ones(run):
    first = run(Cast(), n=6)
    again = run(Cast(), n=6)
    assert again[3].sent == [] and again[:3] == first[:3]
    more = run(Cast())
    assert more[0][:6] == first[0] and more[3].sent and not set(first[3].sent) & set(more[3].sent)


def test_killed_on_the_way_it_writes_what_is_done_and_ends_the_same(run, tmp_path):
    whole = run(Cast(), "whole", concurrency=1)
    cast, left = Cast(), iter(range(20))

    def dies(body, n):
        if next(left, None) is None:
            raise UserError("killed")
        return cast(body, n)

    with pytest.raises(UserError, match="killed"):
        run(dies, concurrency=1)
    stats = json.loads((tmp_path / "run/data/rollouts_stats.json").read_text())
    assert 0 < stats["rollouts"] < 12 and stats["remarks"]["unanswered"] == 12 - stats["rollouts"]
    rows, pairs, stats, teacher = run(cast, concurrency=1)
    assert (rows, pairs) == whole[:2] and len(teacher.sent) == len(whole[3].sent) - 20


def test_any_number_of_workers_and_calls_in_flight_gives_the_same_bytes(run, tmp_path):
    for name, more in (("a", {"workers": 1, "concurrency": 1}), ("b", {"workers": 2, "concurrency": 4})):
        run(Cast(), name, **more)
    one, two = (sorted((tmp_path / name / "data").iterdir()) for name in "ab")
    assert [hashlib.sha256(p.read_bytes()).hexdigest() for p in one] == [hashlib.sha256(p.read_bytes()).hexdigest() for p in two]
    assert len(one) == 4


# --- what cannot be used


def off_subject(body):
    said = "bananas ripen slowly under tropical sunshine near distant volcanic islands while turtles wander along sandy beaches at dawn. "
    return blocks({n: said + " ".join(re.findall(r"`[^`]+`|\d+", text)) for n, text in notes_in(body).items()})


@pytest.mark.parametrize(
    ("parts", "reason", "stages"),
    [
        ({"draft": "no idea"}, "remarks: each of", ["remarks", "remarks_repair"]),
        ({"draft": "=== 1\n\n=== 1\nhm"}, "remarks: each of", ["remarks", "remarks_repair"]),
        ({"draft": answer(completion("=== 1\nhm", finish="length"))}, "remarks: truncated", ["remarks"]),
        ({"draft": answer({"error": {"code": 400, "message": "no | <b>"}}, 400)}, "remarks: permanent", ["remarks"]),
        ({"draft": "=== 1\n<tool_call>{}</tool_call>"}, "remarks: it has <tool_call>", ["remarks", "remarks_repair"]),
        ({"revise": lambda body: blocks({n: "STILL LOUD." for n in notes_in(body)})}, "still at fault: ", ["remarks", "critique"] + ["remarks_revise", "critique"] * 2),
        ({"revise": lambda body: blocks({n: "sorry, here's my revised reply: ok." for n in notes_in(body)})}, "still at fault: facts", None),
        ({"draft": lambda body: blocks({n: "now `rm -rf /` it." for n in notes_in(body)}), "revise": lambda body: blocks({n: "see `/etc/passwd`." for n in notes_in(body)})}, "still at fault: facts", None),
        ({"draft": lambda body: blocks({n: text.lower() + " so" * 700 for n, text in notes_in(body).items()})}, "too long", ["remarks"]),
        ({"draft": off_subject, "revise": off_subject}, "still at fault: facts", None),
        ({"critique": "hm"}, "", ["remarks", "critique", "critique-unreadable"]),
    ],
)  # fmt: skip
def test_what_cannot_be_used_leaves_the_templates_and_is_counted(run, parts, reason, stages):
    plain = run(None, "plain", teacher="", n=4)
    rows, pairs, stats, _ = run(Cast(**parts), n=4)
    if not reason:  # a critique without a reading is no fault
        assert stats["remarks"]["by_teacher"] == 4
        return
    assert sum(reasons(stats).values()) == 4 and all(why.startswith(reason) for why in reasons(stats)), reasons(stats)
    for row, old in zip(rows, plain[0], strict=True):
        assert row | {"trail": []} == old and row["trail"][-1]["stage"] == "template"
        assert stages is None or [step["stage"] for step in row["trail"]][:-1] == stages
    assert pairs == plain[1] and "| phrase templates spoke since | rows |" in convert.card(parse_soul(SOUL), "x", stats)


def test_an_answer_that_cannot_be_read_is_mended_once(run):
    cast = Cast()
    cast.parts |= {"draft": "here they are", "repair": cast.draft}
    rows, *_, stats, _ = run(cast, n=3)
    assert stats["remarks"]["by_teacher"] == 3 and cast.log.count("repair") == 3
    assert {tuple(step["stage"] for step in row["trail"])[:2] for row in rows} == {("remarks", "remarks_repair")}


def test_the_critic_has_a_message_worded_again(run):
    def critique(body):
        return json.dumps(
            [{"principle": "warm", "quote": "cold", "why": "is cold", "verdict": "violates"}]
            if "cold" in str(body)
            else [{"verdict": "ok"}]
        )

    cast = Cast(critique=critique)
    cast.parts["draft"] = lambda body: blocks({n: f"{'cold' if n == 1 else 'okay'}: {text.lower()}" for n, text in notes_in(body).items()})
    cast.parts["revise"] = lambda body: blocks({1: notes_in(body)[1].replace("cold", "dear friend")})
    rows, pairs, *_ = run(cast, n=4)
    assert all(texts(row)[0].startswith("dear friend: ") for row in rows) and voiced(pairs) == []  # no check tells its sides apart
    assert max(map(len, map(texts, rows))) > 1 and all(text.startswith("okay: ") for row in rows for text in texts(row)[1:])
    assert "critique" not in (calm := Cast(), run(calm, "calm", n=4, remarks=Remarks(critic=False)))[0].log


def test_hostile_text_is_inert(run):
    odd = "<|im_end|> {{ 7 * 7 }} [/bold] ‮ </conversation> \x1b[2J"
    cast = Cast()
    cast.parts["draft"] = lambda body: blocks({n: f"{text.lower()} {odd}\n```python\nimport os\n```" for n, text in notes_in(body).items()})
    rows, _, stats, teacher = run(cast, n=6)
    assert stats["remarks"]["by_teacher"] == 6 and all(odd in text for row in rows for text in texts(row))
    assert not any("import os" in text for row in rows for text in texts(row)) and all(replay(row)[1] == "" for row in rows)
    assert "49" not in json.dumps([body for body in teacher.sent if "Write anew" in body])


def test_code_that_ends_a_message_stays(run, tmp_path):
    rows = run(Cast(), n=200)[0]
    with_code = [row for row in rows if "```" in texts(row)[-1]]
    plain = {row["id"]: texts(row)[-1] for row in run(None, "plain", teacher="", n=200)[0]}
    assert with_code and all(texts(row)[-1].partition("```")[2] == plain[row["id"]].partition("```")[2] for row in with_code)


# --- the parts


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("=== 1\na\n=== 2\nb", {1: "a", 2: "b"}),
        ("Sure:\n=== 2 ===\nb\n\n=== 1\na\n=== 3\nmore", {1: "a", 2: "b", 3: "more"}),
        ("=== message 1\na = b\n==== 2\r\nb ==== 3\n", {1: "a = b", 2: "b ==== 3"}),
        ("=== 1\na\n=== 2\nb\n=== 2\nc", {}), ("=== 1\na", {}), ("", {}), ("=== one\na", {}), ("=== 1\na\n=== 2\n<tool_call>", {}),
    ],
)  # fmt: skip
def test_what_is_read_of_an_answer(text, said):
    found, problem = read_remarks(text, [1, 2])
    assert found == said and bool(problem) == (not said)
    assert read_remarks("=== 1\n```\ncode\n```", [1])[1] == "message 1 is empty"


@given(st.text(alphabet="=12 \na`<|", max_size=60))
def test_no_text_breaks_the_reader(text):
    found, problem = read_remarks(text, [1, 2])
    assert problem or all(found[n] and not re.search(r"^={3,}[ \t]*\d+[ \t]*$", found[n], re.M) for n in (1, 2))


@pytest.mark.parametrize(
    ("text", "note", "why"),
    [
        ("it's in `lib/a.py`, line 42.", "`lib/a.py`, line 42.", ""), ("`load()` is on line 42", "", ""), ("2 files, `A`", "", ""),
        ("it's in `lib/b.py`.", "", "`lib/b.py` is not in the conversation"), ("line 43", "", "`43` is not in the conversation"),
        ("it's there.", "in `lib/a.py`", "leaves out `lib/a.py`"), ("in `lib/a.py`.", "`lib/a.py`, 42", "leaves out `42`"),
        ("`load` is there.", "it has `def load` now", ""),
    ],
)  # fmt: skip
def test_facts(text, note, why):
    assert untrue(text, note, "lib/a.py:42:def load(a):") == why


# --- the command


def test_a_directory_of_another_command_and_contradictions_are_refused(run, tmp_path):
    run(Cast(), n=2)
    with pytest.raises(UserError, match="contradict"):
        run(Cast(), no_teacher=True)
    with pytest.raises(UserError, match=r"--remarks.rounds at 0"):
        run(Cast(), remarks=Remarks(rounds=-1))
    from datagen.journal import Journal

    journal = Journal(tmp_path / "other")
    journal.note("run", {"id": "x", "setup": {}})
    journal.close()
    with pytest.raises(UserError, match="holds the run of another command"):
        run(Cast(), "other", n=2)
    assert not (tmp_path / "other/data").exists()


def test_what_decides_a_row_makes_another_run_and_settings_are_read_back(run, tmp_path, monkeypatch):
    from datagen.remarks import prepare

    monkeypatch.setattr(generate, "open_teacher", lambda spec, **routes: FakeTeacher(None))
    config = Config(soul=tmp_path / "SOUL.md", teacher="x:y", out=tmp_path / "run", dataset=("a.jsonl",))
    assert len({prepare(config, remarks, most).run_id for remarks in (Remarks(), Remarks(rounds=1)) for most in (1, 2)}) == 4
    saved = soulsmith.config_from_json(Config, json.loads(json.dumps(soulsmith.config_to_json(config))), "saved")
    assert saved == config and config.most == 12_000 and replace(config, dataset=(), max_chars=7).most == 7


def test_the_card_says_who_spoke_and_what_it_cost(run, tmp_path):
    run(Cast(), n=3)
    card = (tmp_path / "run/data/rollouts.md").read_text()
    assert "Remarks of 3 rows are by `x:y`" in card and "| fake-1 | 3 |" in card and "Total cost: $0.0120." in card
    assert "phrase templates and pass" in (run(None, "plain", teacher=""), (tmp_path / "plain/data/rollouts.md").read_text())[1]
