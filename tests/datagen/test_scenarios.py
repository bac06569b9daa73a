"""Scenarios are drawn without repeats, and what a teacher makes of one is read strictly."""

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from datagen.scenarios import Project, Script, Unusable, from_seed, languages, read_project, read_script, scenarios, table
from soul.errors import UserError

DOMAINS = [f"a shop of {name}" for name in ("hats", "bread", "clocks", "seeds", "tea", "wool", "maps", "lamps")]
PROJECT = "sure!\n=== a.sh\necho a\n=== data/b.txt\n```text\nb\n```\n=== accept\nbash a.sh\n"


def draw(n, seed=0, domains=DOMAINS):
    return list(scenarios(domains, ["Bash", "Python", "C"], [], n, seed))


def test_no_two_scenarios_are_alike_and_more_of_them_begin_the_same():
    few, many = draw(100), draw(700)
    assert many[:100] == few and draw(100) == few and draw(100, seed=1) != few
    assert len({(s.domain, s.language, s.difficulty, s.trouble) for s in many}) == 700
    assert len({s.seed.id for s in many}) == 700
    for values in (
        {s.domain for s in few},
        {s.trouble for s in few},
        {tuple(s.talk) for s in few},
        {s.person for s in few},
        {s.difficulty for s in few},
    ):
        assert len(values) >= 3


def test_two_thousand_scenarios_come_from_the_domains_that_are_shipped():
    from datagen.long_rollouts import DOMAINS as shipped
    from datagen.seeds import read_seeds

    names = [seed.messages[0]["content"] for seed in read_seeds(shipped)]
    assert len(names) == len(set(names)) == 80
    assert len({s.seed.id for s in scenarios(names, ["Bash"], [], 2000)}) == 2000


def test_a_scenario_survives_its_seed_and_tells_templates_words():
    for scenario in draw(50):
        seed = scenario.seed
        assert from_seed(seed) == scenario and seed.source.startswith("scenario:")
        assert scenario.told["trouble"] == table()["troubles"][scenario.trouble]["says"]
        assert len(scenario.told["turns"]) == len(scenario.talk)
        few, many = table()["difficulties"][scenario.difficulty]["files"]
        assert few <= scenario.files <= many
    assert {s.fails for s in draw(50)} == {True, False}


def test_the_table_is_sound():
    known = table()
    assert {kind for talk in known["talks"] for kind in talk} == set(known["kinds"])
    assert all(not r or (r[0] in ("Edit", "Bash") and r[1] > 0) for r in known["refusals"])


def test_what_cannot_be_drawn_is_one_clear_line(monkeypatch):
    with pytest.raises(UserError, match="only 720 different"):
        draw(721)
    with pytest.raises(UserError, match="no difficulty 'brutal'"):
        list(scenarios(DOMAINS, ["Bash"], ["brutal"], 1))
    with pytest.raises(UserError, match="no language 'Klingon'"):
        languages(["Klingon"])
    assert languages(["bash"]) == ["Bash"]
    monkeypatch.setattr("shutil.which", lambda program: None)
    with pytest.raises(UserError, match="Bash needs bash, which is not installed"):
        languages(["Bash"])
    with pytest.raises(UserError, match="only 0 different"):
        list(scenarios(DOMAINS, languages(), [], 1))


def test_a_script_has_every_turn():
    text = "=== request ===\nfix it\n=== turn 1\nmore\n=== done\nit works\n"
    assert read_script(text, 1) == Script("fix it", ("more",), "it works")
    for broken, turns, why in ((text, 2, "no turn 2"), ("=== request\n\n=== done\nx", 0, "no request"), ("hello", 0, "no request")):
        with pytest.raises(Unusable, match=why):
            read_script(broken, turns)


def test_a_project_is_its_files_and_its_command():
    assert read_project(PROJECT) == Project({"a.sh": "echo a\n", "data/b.txt": "b\n"}, "bash a.sh")
    assert read_project(PROJECT.replace("\n", "\r\n")).files["a.sh"] == "echo a\n"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("=== a\nx\n=== b\ny\n", "no acceptance"),
        ("=== a\nx\n=== accept\ntrue\n", "1 files"),
        ("".join(f"=== f{n}\nx\n" for n in range(17)) + "=== accept\ntrue\n", "17 files"),
        (PROJECT.replace("a.sh", "../a.sh", 1), "no plain file name"),
        (PROJECT.replace("a.sh", "/etc/passwd", 1), "no plain file name"),
        (PROJECT.replace("a.sh", "x/../../a.sh", 1), "no plain file name"),
        (PROJECT.replace("a.sh", ".bashrc", 1), "no plain file name"),
        (PROJECT.replace("a.sh", "-rf", 1), "no plain file name"),
        (PROJECT.replace("a.sh", "a b", 1), "no plain file name"),
        (PROJECT.replace("a.sh", "a/b/c/d/e", 1), "no plain file name"),
        (PROJECT.replace("a.sh", "data", 1), "collide"),
        (PROJECT.replace("a.sh", "DATA/B.txt", 1), "collide"),
        (PROJECT.replace("a.sh", "data/b.txt", 1), "two blocks"),
        (PROJECT.replace("echo a", "echo \0"), "not text"),
        (PROJECT.replace("echo a", "x" * 20_001), "too long"),
        (PROJECT.replace("bash a.sh", "x" * 8_001), "too long"),
    ],
)
def test_a_project_that_cannot_be_used_says_why(text, why):
    with pytest.raises(Unusable, match=why):
        read_project(text)


@given(st.text(alphabet="=ab/. \n`\r\0ä", max_size=300))
def test_no_text_breaks_the_readers(text):
    for read in (read_project, lambda text: read_script(text, 1)):
        with suppress(Unusable):
            read(text)
