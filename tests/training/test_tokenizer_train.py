"""A trained tokenizer: the same file for the same texts, every string back, control ids last."""

import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Core

from model.tokenizer import Tokenizer
from soul.errors import UserError
from soul.template import SPECIAL_TOKENS, Template
from training import tokenizer as t
from training.sources import Document

TEXTS = [f"def f{i}(x):\n    return x + {i * 37}  # the value of number {i}, and the sum of it\n" for i in range(300)]
SMALL = t.train_tokenizer(TEXTS, 400)


def test_control_tokens_come_after_the_merges_and_every_byte_has_a_piece():
    assert SMALL.vocab_size == 400 and not SMALL.lacks_bytes
    assert [SMALL.special[token] for token in SPECIAL_TOKENS] == list(range(386, 400))


def test_the_same_texts_give_the_same_file(tmp_path):
    paths = [tmp_path / name for name in "ab"]
    for path in paths:
        t.train_tokenizer(iter(TEXTS), 400).save(path)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert t.tokenizer_hash(Tokenizer.load(paths[0])) == t.tokenizer_hash(SMALL)
    assert t.tokenizer_hash(t.train_tokenizer(["quite another text"] * 9, 400)) != t.tokenizer_hash(SMALL)


@given(st.text())
def test_every_string_comes_back_and_never_holds_a_control_id(text):
    ids = SMALL.encode(text)
    assert SMALL.decode_bytes(ids) == text.encode()
    assert SMALL.encode_batch([text, "x", text]) == [ids, SMALL.encode("x"), ids]
    assert not set(ids) & set(SMALL.special.values())


def test_a_batch_with_a_lone_surrogate_says_so():
    with pytest.raises(UserError, match=r"surrogate U\+D800"):
        SMALL.encode_batch(["fine", "a\ud800"])


def test_digits_are_grouped_by_two_and_words_keep_their_space():
    pieces = [SMALL.decode([n]) for n in SMALL.encode("x 12345")]
    assert all(sum(c.isdigit() for c in piece) <= 2 for piece in pieces)
    assert SMALL.decode([max(SMALL.encode(" the"), key=lambda n: len(SMALL.decode([n])))]) == " the"


def test_the_file_is_read_by_the_library_and_the_template(tmp_path):
    SMALL.save(tmp_path / "tokenizer.json")
    core = Core.from_file(str(tmp_path / "tokenizer.json"))
    text = "def f(x):\n    return 1234 ça 😀"
    assert core.encode(text).ids == SMALL.encode(text) and core.decode(core.encode(text).ids) == text
    assert core.encode("<|bos|>").ids == [SMALL.special["<|bos|>"]] and core.get_vocab_size() == 400
    template = Template(t.load_tokenizer(tmp_path))
    assert template.parse(template.encode(t.EXAMPLE).ids).messages == t.EXAMPLE


def test_token_bytes_are_counted_on_raw_bytes():
    counts = t.token_bytes(SMALL)
    assert counts.shape == (400,) and (counts[386:] == 0).all() and (counts[:256] == 1).all()
    text = "the café 😀 of number 12"
    assert counts[SMALL.encode(text)].sum() == len(text.encode())


def test_too_little_data_gives_fewer_ids_and_a_tiny_vocabulary_is_refused(capsys):
    few = t.train_tokenizer(["abc abc"], 32768)
    assert few.vocab_size < 300 and few.decode(few.encode("abc")) == "abc"
    t.say(few, 32768)
    assert "no 32,768 pieces" in capsys.readouterr().err
    with pytest.raises(UserError, match="need 270"):
        t.train_tokenizer(TEXTS, 269)


def test_held_out_documents_are_not_trained_on_and_long_ones_are_capped():
    kept = {"s": []}
    stream = [Document("s", "a" * 20_000, "1", 20_000), Document("s", "held", "2", 4, True)]
    assert list(t.capped(stream, kept)) == ["a" * 10_000] and kept == {"s": ["held"]}


def test_command_trains_evaluates_and_says_what_is_missing(tmp_path, capsys, monkeypatch):
    (tmp_path / "texts").mkdir()
    for i, text in enumerate(TEXTS):
        (tmp_path / "texts" / f"{i}.txt").write_text(text)
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    assert t.main(t.Config(tmp_path / "out", vocab_size=300, data=(str(tmp_path / "texts"),), eval=True)) == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["tokenizer.json"]
    said = capsys.readouterr()
    assert "texts" in said.out and "rollouts" in said.out and "tiktoken is not installed" in said.err


def test_peers_are_measured_or_left_out_in_one_line(monkeypatch, capsys):
    class Encoding:
        encode_ordinary_batch = staticmethod(lambda texts: [list(text) for text in texts])

    fake = type(sys)("tiktoken")
    fake.get_encoding = lambda name: Encoding
    monkeypatch.setitem(sys.modules, "tiktoken", fake)
    assert set(t.peers()) == {"gpt2", "cl100k_base"}
    table = t.compression({"this": SMALL.encode_batch, **t.peers()}, {"prose": ["aé"] * 3})
    assert [list(column.cells) for column in table.columns] == [["prose"], ["1.000"], ["1.500"], ["1.500"]]

    def fails(name):
        raise ConnectionError("no route\nto host")

    fake.get_encoding = fails
    assert t.peers() == {} and "cannot fetch" in capsys.readouterr().err


def test_a_tokenizer_is_found_by_file_directory_or_refused(tmp_path):
    SMALL.save(tmp_path / "tokenizer.json")
    assert t.load_tokenizer(tmp_path / "tokenizer.json").spec == t.load_tokenizer(tmp_path).spec
    with pytest.raises(UserError, match="no model 'nothing'"):
        t.load_tokenizer("nothing")
