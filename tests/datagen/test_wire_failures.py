"""Every way that a teacher is known to fail on the wire, through the real engine, journal and HTTP client, on loopback.

Each case is a row of the list of wire failures. In each, one row of six (or all) meets scripted faults, and always holds:
no row is lost or there twice; what is exported is the whole reply of that row, never a part and never nothing; attempts and
costs are in the ledger; a run that stopped goes on and pays nothing twice; running again sends nothing.

Rows about other things than the bytes of an answer have their tests elsewhere, see ELSEWHERE. We ask for no stream and no
batch, so of rows 30 and 31 is left that such bytes do no harm.
"""

import asyncio
import re
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from fake_teacher import Clock

from datagen.chaos import Chaos, Config
from datagen.chaos_faults import FAULTS
from datagen.critique import ask_critic
from datagen.engine import Engine, Policy
from datagen.journal import Journal
from datagen.prompting import Prompts
from datagen.seeds import Seed
from datagen.teachers import HttpTeacher, Provider
from soul.errors import UserError
from soul.tools import openai_schema

SAMPLING = {"temperature": 1.0, "top_p": 0.9, "max_tokens": 256}
COUNT, ILL = 6, "row2"
PLAIN, FOUR, ONE = Config(), Policy(concurrency=4), Policy(concurrency=1)
TOOLS = openai_schema(("Read", "Grep"))


async def draft(seed, call):
    reply = await call("draft", seed.messages)
    return row(seed, reply.text if reply.ok else "", reply)


async def use_tools(seed, call):
    reply = await call("draft", seed.messages, tools=TOOLS)
    said = [[made["function"]["name"], made["function"]["arguments"]] for made in reply.tool_calls]
    return row(seed, str(said) if reply.ok else "", reply)


async def criticise(seed, call):
    """The critic's part of a row: every fault here is one of the critic's answer or of its repair."""
    told = {"soul": "be warm.", "request": seed.messages[0]["content"], "known": []}
    findings, step = await ask_critic(call, Prompts(), max_tokens=512, reply="hello.", principles=["warm", "short"], **told)
    kind = "rejected" if findings is None else "sft"
    return [[kind, {"id": seed.id, "messages": [*seed.messages, {"role": "assistant", "content": str(findings)}], "reason": step["stage"]}]]


def row(seed, text, reply):
    messages = [*seed.messages, {"role": "assistant", "content": text}]
    values = {"id": seed.id, "messages": messages, "reason": "" if reply.ok else reply.outcome, "why": reply.why}
    return [["sft" if text else "rejected", values]]


@dataclass
class Run:
    """What one run over the same directory and server came to."""

    error: UserError | None
    rows: dict  # id -> (status, kind, text, reason)
    ledger: list
    sent: int  # requests that reached the server
    slept: float  # seconds of the injected clock
    routes: dict = field(default_factory=dict)
    limit: dict = field(default_factory=dict)

    def sum(self, name):
        return sum(entry[name] or 0 for entry in self.ledger)


async def one_run(folder, chaos, recipe, policy) -> Run:
    clock = Clock()
    start, before = clock.now, chaos.counts["requests"]
    teacher = HttpTeacher(Provider(chaos.url), "chaos", "none", poll=0.01, patience=10.0)
    journal = Journal(folder)
    seeds = [Seed(f"row{n}", [{"role": "user", "content": f"how do i sort list number {n}?"}], f"s:{n}", f"s:{n}") for n in range(COUNT)]
    journal.plan(seed.id for seed in seeds)
    engine, error = Engine(teacher, journal, "run", SAMPLING, policy, clock=clock, wall=time.time, sleep=clock.sleep), None
    try:
        await engine.run(iter(seeds), recipe)
    except UserError as raised:
        error = raised
    finally:
        await teacher.close()
        rows, routes = {}, {}
        for kept in journal.rows("run"):
            [[kind, values]] = kept.results
            assert kept.row_id not in rows and values["id"] == kept.row_id
            rows[kept.row_id] = (kept.status, kind, values["messages"][-1]["content"], values["reason"])
            routes[kept.row_id] = values.get("served")
        ledger, limit = journal.ledger(), engine.snapshot()["limit"]
        journal.close()
    return Run(error, rows, ledger, chaos.counts["requests"] - before, clock.now - start, routes, limit)


def play(folder, script, recipe=draft, policy=FOUR, config=PLAIN, runs=2):
    """`runs` runs over one server, then one more that must send nothing; after the first run the trouble is over, if it
    stopped the run. `script(body, n, total)` names the fault of the n-th try of a body, the total-th request of all."""
    trouble, total = [True], Counter()

    def fault(body, n):
        total["requests"] += 1
        return script(body, n, total["requests"]) if trouble[0] else None

    async def go():
        async with Chaos(config, fault) as chaos:
            played = []
            for _ in range(runs):
                played.append(await one_run(folder, chaos, recipe, policy))
                if played[-1].error:
                    trouble[0] = False
            last = await one_run(folder, chaos, recipe, policy)
            return played, last, chaos.stats()

    return asyncio.run(go())


@pytest.fixture(scope="module")
def honest(tmp_path_factory):
    """recipe -> what each row says when nothing fails."""
    said = {}
    for recipe in (draft, use_tools, criticise):
        [first, _], _, _ = play(tmp_path_factory.mktemp("honest"), lambda body, n, total: None, recipe)
        said[recipe] = {name: text for name, (_, _, text, _) in first.rows.items()}
        assert len(set(said[draft].values())) == COUNT and all(said[recipe].values())
    return said


def ill(body):
    text = "".join(message["content"] for message in body["messages"])
    return "number 2?" in text or "This should be JSON" in text  # only row2's critique is ever repaired


@dataclass
class Case:
    """`faults`: of the tries of row2's calls, in order. Its row ends `ends` ("ok", or the reason why it is rejected), after
    `sent` requests of which `free` spent no attempt. `all`: every row meets them. `waits`: seconds at least."""

    name: str
    faults: tuple[str, ...]
    ends: str = "ok"
    free: int = 0
    waits: float = 0.0
    all: bool = False
    recipe: object = draft
    text: str | None = None  # of the row, where it is not the honest one
    sent: int | None = None
    config: Config = PLAIN
    policy: Policy = FOUR

    def __post_init__(self):
        self.sent = len(self.faults) + (self.ends == "ok" and self.text is None) if self.sent is None else self.sent


WAIT20, FIVE = Config(retry_after=20.0), 5
QUICK = Policy(concurrency=4, deadline=0.5)


def calls(*made):
    return str([list(pair) for pair in made])


READ = ("Read", '{"file_path": "a.py"}')
CASES = [
    Case("1 rate limit", ("rate_limit",), free=1, waits=20, config=WAIT20),
    Case("1 rate limit for all", ("rate_limit",), free=1, waits=20, config=WAIT20, all=True, policy=Policy(concurrency=COUNT)),
    Case("1 more rate limits than attempts", ("rate_limit",) * 9, free=9, waits=180, config=WAIT20),
    Case("2 rate limit with a date", ("rate_limit_date",), free=1, waits=18, config=WAIT20),
    Case("2 rate limit with a reset in ms", ("rate_limit_reset",), free=1, waits=18, config=WAIT20),
    Case("5 a 429 inside a 200", ("error_200",), free=1),
    Case("6 an error beside choices", ("error_choices",), free=1),
    Case("7 an error under the choice", ("error_finish",)),
    Case("7 it stays so", ("error_finish",) * FIVE, "transient"),
    Case("8 the code is a word", ("error_word",)),
    Case("8 the error is a string", ("error_string",)),
    Case("8 no code at all", ("error_typed",), free=1),
    Case("9 thought signature", ("thought_signature",), "permanent"),
    Case("10 blank", ("blank",)),
    Case("11 reasoning ate the tokens", ("reasoning_cut",)),
    Case("11 and again", ("reasoning_cut", "reasoning_cut"), "truncated"),
    Case("12 only reasoning", ("reasoning_only",)),
    Case("12 it stays so", ("reasoning_only",) * FIVE, "empty"),
    Case("13 think tags", ("think",), sent=1),
    Case("13 a think tag left open", ("think_open", "think_open"), "truncated"),
    Case("14 cut text", ("length",), "truncated"),
    Case("15 cut arguments", ("tool_cut",), "truncated", recipe=use_tools),
    Case("15 arguments end with the tokens", ("tool_limit",), "truncated", recipe=use_tools),
    Case("16 arguments as an object", ("tool_dict",), recipe=use_tools, text=calls(("Read", '{"file_path": "a.py", "offset": "4"}'))),
    Case("16 arguments null", ("tool_null",), recipe=use_tools, text=calls(("Read", "{}"))),
    Case("16 arguments empty", ("tool_empty",), recipe=use_tools, text=calls(("Read", "{}"))),
    Case("16 arguments that are no JSON", ("tool_bad",), recipe=use_tools),
    Case("16 the same call twice without ids", ("tool_ids",), recipe=use_tools, text=calls(READ, READ)),
    Case("16 an unknown tool", ("tool_unknown",), recipe=use_tools, text=calls(("launch_rocket", "{}"))),
    Case("16 two calls at once", ("tool_parallel",), recipe=use_tools, text=calls(READ, ("Grep", '{"pattern": "x"}'))),
    Case(
        "35 a call left in the text", ("tool_text",), text='<tool_call>\n{"name": "Read", "arguments": {"file_path": "a.py"}}\n</tool_call>'
    ),
    Case("16 calls that nobody offered", ("tool_parallel",)),
    Case("17 JSON in prose", ("json_prose",), recipe=criticise, sent=1),
    Case("17 JSON in a fence", ("json_fenced",), recipe=criticise, sent=1),
    Case("17 a trailing comma", ("json_comma",), recipe=criticise, sent=1),
    Case("17 no JSON, twice", ("json_broken", "json_broken"), "critique-unreadable", recipe=criticise),
    Case("20 unavailable, with a time in the body", ("unavailable",), waits=20, config=WAIT20),
    Case("22 money in flight", ("in_flight_budget",) * 7, free=7, waits=140, config=WAIT20),
    Case("23 moderation", ("moderation",), "refused"),
    Case("23 guardrail", ("guardrail",), "refused"),
    Case("25 too long", ("too_long",), "permanent"),
    Case("25 too large", ("too_large",), "permanent"),
    Case("27 no usage", ("no_usage",), sent=1),
    Case("27 no cost", ("no_cost",), sent=1),
    Case("28 whitespace for ever", ("trickle",), policy=QUICK),
    Case("29 HTML", ("html",)),
    Case("29 no body", ("no_body",)),
    Case("29 cut JSON", ("cut",)),
    Case("29 shorter than told", ("short",)),
    Case("29 reset in the body", ("reset",)),
    Case("29 524", ("error_524",)),
    Case("29 529", ("error_529",)),
    Case("29 it stays so", ("html", "no_body", "cut", "reset", "error_524"), "transient"),
    Case("30 comments before the answer", ("comments",), sent=1),
    Case("30 a whole answer in a stream", ("sse_whole",), sent=1),
    Case("30 an error in a stream", ("sse_error",)),
    Case("30 pieces of a stream", ("sse_pieces",)),
    Case("31 a batch was accepted", ("batch",)),
    Case("32 too long for vLLM", ("vllm_long",), "permanent"),
    Case("32 the older form", ("vllm_flat",), "permanent"),
    Case("36 a 500 without a body", ("error_500",)),
    Case("37 no answer", ("hang", "hang"), policy=QUICK),
    Case("39 still loading", ("loading",)),
    Case("40 reasoning_content", ("reasoning_content",), sent=1),
    Case("40 cut thinking as content", ("thinking_cut",), "truncated"),
    Case("43 no choices", ("no_choice",)),
    Case("43 abort", ("abort",)),
]


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_a_failure_costs_at_most_its_row(tmp_path, honest, case):
    seen = Counter()

    def script(body, n, total):
        if not case.all and not ill(body):
            return None
        which = case.all and body["messages"][-1]["content"]
        seen[which] += 1
        return case.faults[seen[which] - 1] if seen[which] <= len(case.faults) else None

    [first, again], last, stats = play(tmp_path, script, case.recipe, case.policy, case.config)
    assert first.error is None, first.error
    assert set(first.rows) == {f"row{n}" for n in range(COUNT)}
    for name, (_, kind, text, reason) in first.rows.items():
        if name == ILL and case.ends != "ok":
            assert (kind, reason) == ("rejected", case.ends)
            assert text in ("", "None")
        else:
            assert (kind, text) == ("sft", case.text if name == ILL and case.text else honest[case.recipe][name])
    others = 0 if case.all else COUNT - 1
    times = COUNT if case.all else 1
    assert first.sent == others + times * case.sent
    assert first.sum("attempts") == first.sent - times * case.free
    assert first.sum("cost") == pytest.approx(stats["usd"])
    assert first.sum("calls") == len({entry for entry in first.rows}) + _more_calls(case)
    assert first.slept >= case.waits
    if case.waits == 20:
        assert first.limit["teacher"] >= int(case.policy.concurrency * 0.75), "one burst, one cut"
        assert first.slept < 60, "one burst, one wait"
    assert again.sent == last.sent == 0 and first.rows == again.rows == last.rows and last.ledger == first.ledger
    assert stats["repeats"] == 0


def _more_calls(case):
    """Keys beside one for each row: the escalated request of row 11, and the repair of row 17."""
    return sum(case.name.startswith(name) for name in ("11 ", "13 a think tag", "17 no JSON"))


@dataclass
class Stop:
    """A fault that ends the run, from the fifth request on: `says` is found in the message."""

    name: str
    fault: str
    says: str
    config: Config = PLAIN
    policy: Policy = ONE


STOPS = [
    Stop("3 daily quota", "daily_quota", "asks to wait 3,600 s.*Rate limit exceeded"),
    Stop("4 rate limit for ever", "rate_limit", "has not answered for 6.. s.*Rate limit exceeded.*limit", WAIT20),
    Stop("4 without a time", "rate_limit", "has not answered for 6.. s.*Rate limit exceeded.*limit", Config(retry_after=None)),
    Stop("18 constraint", "constraint", "No endpoints match.*quantizations"),
    Stop("19 no endpoints", "no_endpoints", "No endpoints found"),
    Stop("19 deprecated", "deprecated", "deprecated.*Models served instead: chaos-2"),
    Stop("21 no credit", "no_credit", "can only afford 2666.*credit"),
    Stop("24 the key", "bad_key", "No auth credentials.*Check the API key"),
    Stop("26 another model", "other_model", "chaos@Chaos and now from chaos-2@Chaos"),
    Stop("26 another provider", "other_provider", "chaos@Chaos and now from chaos@Elsewhere.*--provider.*--allow-mixed"),
    Stop("33 no such model", "vllm_no_model", "does not exist"),
    Stop("37 stuck for ever", "hang", "has not answered for.*no whole answer", policy=Policy(concurrency=1, deadline=0.25, breaker=10.0)),
]


@pytest.mark.parametrize("stop", STOPS, ids=[stop.name for stop in STOPS])
def test_a_failure_that_ends_the_run_keeps_what_was_paid(tmp_path, honest, stop):
    [first, second], last, stats = play(
        tmp_path, lambda body, n, total: stop.fault if total > 4 else None, policy=stop.policy, config=stop.config
    )
    assert first.error is not None and re.search(stop.says, str(first.error)), first.error
    assert {name: text for name, (_, _, text, _) in first.rows.items()} == {f"row{n}": honest[draft][f"row{n}"] for n in range(4)}
    expected = honest[draft]
    if stop.fault.startswith("other_"):  # the answer that showed the change is kept, and it goes on changing the route
        assert second.error is not None and second.sent == last.sent == 0 and stats["repeats"] == 0
        return
    assert second.error is None and {name: text for name, (_, _, text, _) in second.rows.items()} == expected
    assert second.sent == COUNT - 4, "paid once"
    assert second.sum("cost") == pytest.approx(stats["usd"])
    assert last.sent == 0 and last.rows == second.rows and stats["repeats"] == 0
    if stop.fault in ("bad_key", "no_credit", "constraint", "no_endpoints", "deprecated", "vllm_no_model", "daily_quota"):
        assert first.sent == 5, "asked once, not again and again"


def test_19_a_model_that_never_was_stops_after_a_few_rows(tmp_path):
    """As a 400 it may be about one row, so it takes a row of them, and no answer in between."""
    [first], last, _ = play(tmp_path, lambda body, n, total: "no_model", runs=1)
    assert first.error is None and {reason for _, _, _, reason in first.rows.values()} == {"permanent"}
    assert first.sent == COUNT and last.sent == 0


def test_26_mixed_routes_are_recorded_where_they_are_allowed(tmp_path, honest):
    policy = Policy(concurrency=4, allow_mixed=True)
    [first], last, _ = play(tmp_path, lambda body, n, total: "other_provider" if ill(body) else None, policy=policy, runs=1)
    assert first.error is None and last.sent == 0
    assert first.routes == {f"row{n}": ["chaos@Elsewhere" if n == 2 else "chaos@Chaos"] for n in range(COUNT)}
    assert {(entry["provider"], entry["calls"]) for entry in first.ledger} == {("Chaos", 5), ("Elsewhere", 1)}


def test_14_only_what_was_cut_is_asked_again_with_more_tokens(tmp_path, honest):
    def script(body, n, total):
        return "length" if ill(body) and body["max_tokens"] == SAMPLING["max_tokens"] else None

    async def go():
        async with Chaos(Config(), lambda body, n: script(body, n, 0)) as chaos:
            first = await one_run(tmp_path, chaos, draft, Policy(concurrency=4))
            journal = Journal(tmp_path)
            assert journal.redo_truncated("run") == 1
            journal.close()
            more = Policy(concurrency=4, redo_truncated=1024)
            return first, await one_run(tmp_path, chaos, draft, more), await one_run(tmp_path, chaos, draft, more)

    first, second, last = asyncio.run(go())
    assert first.rows[ILL][1] == "rejected" and first.sent == COUNT
    assert second.sent == 1 and last.sent == 0
    assert {name: text for name, (_, _, text, _) in last.rows.items()} == honest[draft]


def test_27_an_unknown_cost_is_not_nothing(tmp_path):
    [first], _, _ = play(tmp_path, lambda body, n, total: "no_cost", runs=1)
    [entry] = first.ledger
    assert entry["cost"] is None and entry["prompt_tokens"] == 9 * COUNT


def test_28_a_call_that_never_ends_gives_its_place_back(tmp_path, honest):
    policy = Policy(concurrency=1, deadline=0.5)
    [first], last, stats = play(tmp_path, lambda body, n, total: "trickle" if n == 1 and ill(body) else None, policy=policy, runs=1)
    assert {name: text for name, (_, _, text, _) in first.rows.items()} == honest[draft]
    assert stats["most_in_flight"] == 1 and last.sent == 0


def test_36_an_engine_that_dies_and_comes_back_fails_no_row(tmp_path, honest):
    config = Config(latency_ms=5.0, downtime=0.1)
    [first, again], last, stats = play(tmp_path, lambda body, n, total: "die" if total == 3 else None, config=config)
    assert first.error is None and {name: text for name, (_, _, text, _) in first.rows.items()} == honest[draft]
    assert {status for status, *_ in first.rows.values()} == {"finished"}
    assert again.sent == last.sent == 0 and stats["repeats"] == 0


def test_38_a_deadline_counts_from_the_sending(tmp_path):
    policy = Policy(concurrency=1, deadline=0.8)
    [first], _, stats = play(tmp_path, lambda body, n, total: None, config=Config(latency_ms=150.0), policy=policy, runs=1)
    assert first.sent == COUNT and first.sum("attempts") == COUNT and stats["most_in_flight"] == 1


def test_41_sampling_is_always_said(tmp_path):
    bodies = []

    def script(body, n, total):
        bodies.append(body)

    play(tmp_path, script, runs=1)
    assert all(body["temperature"] == 1.0 and body["top_p"] == 0.9 and body["top_k"] == -1 and body["max_tokens"] == 256 for body in bodies)


def test_42_the_pool_is_as_wide_as_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr("test_wire_failures.COUNT", 256)
    config, policy = Config(latency_ms=1500.0), Policy(concurrency=256)
    [first], last, stats = play(tmp_path, lambda body, n, total: None, config=config, policy=policy, runs=1)
    assert stats["most_in_flight"] == 256 and len(first.rows) == 256 and last.sent == 0


ELSEWHERE = {  # row -> (file, test); 18 to 20, 26, 36 and 39 are also met above
    18: ("datagen/test_openrouter.py", "test_every_parameter_that_is_sent_must_be_taken"),
    19: ("datagen/test_openrouter.py", "test_an_unknown_model_gets_the_nearest_names"),
    26: ("datagen/test_service.py", "test_a_second_route_stops_the_run_is_kept_and_not_used"),
    32: ("datagen/test_teachers.py", "test_a_reply_that_cannot_fit_is_refused_before_it_is_sent"),
    33: ("datagen/test_teachers.py", "test_a_model_that_is_not_served_is_named_with_those_that_are"),
    34: ("datagen/test_teachers.py", "test_the_body_of_each_service_is_golden"),
    35: ("datagen/test_teachers.py", "test_a_tool_parser_lets_vllm_choose"),
    36: ("datagen/test_vllm.py", "test_a_death_in_flight_is_one_restart_and_the_second_ends_the_run"),
    37: ("datagen/test_vllm.py", "test_a_blip_restarts_nothing_and_a_stuck_server_is_replaced"),
    39: ("datagen/test_vllm.py", "test_a_server_that_never_gets_healthy_has_a_limit_and_is_heard_meanwhile"),
    41: ("datagen/test_teachers.py", "test_a_server_that_is_known_is_told_all_its_sampling_and_takes_schemas"),
    44: ("datagen/test_kill.py", "test_a_hundred_kills_pay_only_calls_in_flight_again_and_end_the_same"),
    45: ("datagen/test_wire.py", "test_every_byte_that_reaches_the_wire_changes_the_key"),
    46: ("datagen/test_wire.py", "test_key_ignores_order_of_fields_and_is_stable"),
    47: ("datagen/test_journal.py", "test_full_disk_is_one_line_and_loses_nothing"),
    48: ("datagen/test_journal.py", "test_second_process_is_refused_and_named"),
    49: ("datagen/test_engine.py", "test_one_failure_in_a_hundred_costs_next_to_no_time"),
    50: ("datagen/test_engine.py", "test_a_call_that_can_never_fit_the_tokens_a_minute_stops_the_run"),
    51: ("datagen/test_engine.py", "test_memory_does_not_grow_with_the_number_of_rows"),
    52: ("datagen/test_budget.py", "test_a_limit_of_one_dollar_is_never_passed_64_wide"),
    53: ("datagen/test_generate.py", "test_interrupt_drains_exits_130_and_names_the_resume_command"),
    54: ("datagen/test_critique_revise.py", "test_no_pair_is_made_and_the_reason_kept"),
    55: ("datagen/test_prompting.py", "test_values_are_inert_and_arrive_whole"),
    56: ("workspace/test_read_edit.py", "test_diagnosis"),
}


def test_every_row_of_the_list_has_its_test():
    here = {int(item.name.split()[0]) for item in (*CASES, *STOPS)} | {
        int(n) for n in re.findall(r"\ndef test_(\d+)_", Path(__file__).read_text())
    }
    assert here | set(ELSEWHERE) == set(range(1, 57))
    for file, test in ELSEWHERE.values():
        assert f"\ndef {test}(" in (Path(__file__).parent.parent / file).read_text(), f"{file} has no {test}"


def test_every_fault_of_the_server_is_met_here():
    met = {name for case in CASES for name in case.faults} | {stop.fault for stop in STOPS}
    assert set(FAULTS) - met == {"die", "no_model"}  # they have tests of their own
