import json
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer as HF

from model.tokenizer import BYTE_ESCAPE, BYTE_OF, Tokenizer, added_token, adopt
from soul.errors import UserError
from soul.files import home
from soul.template import SPECIAL_TOKENS, Template

GOLDEN = Path(__file__).parents[1] / "golden"
REAL = home() / "models" / "smollm2-135m"
SPEC = json.loads((GOLDEN / "tiny_llama" / "tokenizer.json").read_text())
MISSING = bytes([0x04, 0x1D, 0x41 ^ 0x80, 0xF1, 0xFF])


def spec_without(data: bytes) -> dict:
    """The tiny tokenizer with merges, and without some bytes, as SmolLM2's is."""
    pieces = [piece for piece in SPEC["model"]["vocab"] if BYTE_OF[piece] not in data] + ["he", "Ġa", "<|", "im", "im_", "|>"]
    added = [added_token(token["content"], len(pieces) + n) for n, token in enumerate(SPEC["added_tokens"])]
    vocab, merges = {piece: n for n, piece in enumerate(pieces)}, ["h e", "Ġ a", "< |", "i m", "im _", "| >"]
    return {**SPEC, "added_tokens": added, "model": {**SPEC["model"], "vocab": vocab, "merges": merges}}


FULL, HOLED = Tokenizer(SPEC), adopt(Tokenizer(spec_without(MISSING)))
spelled = st.sampled_from([*SPECIAL_TOKENS, "<|im_end|>", "<|im_start|>", "<extra_3>", BYTE_ESCAPE])
fragments = st.lists(st.text(st.characters(exclude_categories=["Cs"])) | spelled).map("".join)


@given(fragments)
@example("a\x04b\x1dÁ\U00050000\x04\x04<|byte|>D")
def test_every_text_comes_back_and_never_as_a_control_id(text):
    for tokenizer in (FULL, HOLED):
        ids = tokenizer.encode(text)
        assert tokenizer.decode_bytes(ids) == text.encode() and tokenizer.decode(ids) == text
        assert not {*tokenizer.special.values(), *tokenizer.base_special.values()} - {tokenizer.byte_escape} & set(ids)


@given(fragments)
def test_template_round_trip_on_a_vocabulary_with_holes(text):
    template = Template(HOLED)
    messages = [{"role": "user", "content": text}, {"role": "assistant", "content": text}]
    parsed = template.parse(template.encode(messages).ids)
    assert parsed.problems == [] and [m["content"] for m in parsed.messages] == [text, text]


def test_merges_apply_but_none_reaches_a_control_name():
    assert HOLED.encode("he a") == [251, 252]
    hostile = spec_without(b"")
    end = next(token["id"] for token in hostile["added_tokens"] if token["content"] == "<|im_end|>")
    hostile["model"]["vocab"] |= {"im_e": 282, "im_en": 283, "im_end": 284, "im_end|>": 285, "<|im_end|>": end}
    hostile["model"]["merges"] = [*hostile["model"]["merges"], "im_ e", "im_e n", "im_en d", "im_end |>", "<| im_end|>"]
    whole = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    for ignore_merges, split in ((False, SPEC["pre_tokenizer"]), (True, SPEC["pre_tokenizer"]), (False, whole), (True, whole)):
        hostile["model"]["ignore_merges"], hostile["pre_tokenizer"] = ignore_merges, split
        for tokenizer in (Tokenizer(hostile), adopt(Tokenizer(hostile))):
            assert end not in tokenizer.encode("<|im_end|>") and tokenizer.decode(tokenizer.encode("<|im_end|>")) == "<|im_end|>"


def test_adoption_takes_the_bases_own_ids():
    special, base = HOLED.special, HOLED.base_special
    assert set(special) == set(SPECIAL_TOKENS) and len(set(special.values())) == 14
    assert special["<|assistant_end|>"] == base["<|im_end|>"] and special["<|assistant_start|>"] == base["<|im_start|>"]
    assert special["<|bos|>"] == base["<|endoftext|>"] and set(special.values()) <= set(base.values())
    assert HOLED.vocab_size == 277 and adopt(HOLED) is HOLED and FULL.special == {}
    assert HOLED.byte_escape in set(base.values()) - set(special.values()) and adopt(FULL).byte_escape is None


def test_too_few_control_ids_are_appended():
    few = {**SPEC, "added_tokens": [added_token("<|endoftext|>", 256), added_token("<|im_end|>", 257)]}
    tokenizer = adopt(Tokenizer(few))
    assert tokenizer.special["<|assistant_end|>"] == 257 and tokenizer.special["<|bos|>"] == 256
    assert set(tokenizer.special.values()) == set(range(256, 270)) and tokenizer.vocab_size == 270


def test_a_base_without_an_end_of_turn_is_refused():
    with pytest.raises(UserError, match="no end-of-turn token"):
        adopt(Tokenizer({**SPEC, "added_tokens": [added_token("<mystery>", 256)]}))


@pytest.mark.parametrize("tokenizer", [FULL, HOLED, adopt(FULL)], ids=["base", "holed", "adopted"])
def test_saved_file_reads_back_here_and_in_tokenizers(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer.json")
    again, theirs = Tokenizer.load(tmp_path), HF.from_file(str(tmp_path / "tokenizer.json"))
    for field in ("special", "base_special", "byte_escape", "vocab_size"):
        assert getattr(again, field) == getattr(tokenizer, field)
    text = "he said: a <b> 12"
    assert again.encode(text) == tokenizer.encode(text) == theirs.encode(text).ids
    for name, n in tokenizer.special.items() or tokenizer.base_special.items():
        assert theirs.token_to_id(name) == n and theirs.encode(f"he{name}a").ids[-2] == n


def test_control_ids_and_unknown_ids_decode_to_nothing():
    assert FULL.decode_bytes([FULL.base_special["<|im_end|>"], *FULL.encode("ok"), 10_000, -1]) == b"ok"
    assert FULL.decode(FULL.encode("😀")[:2]) == "\ufffd"


def test_lone_surrogate_is_a_clear_error():
    with pytest.raises(UserError, match=r"lone surrogate U\+D800 at character 1"):
        FULL.encode("a\ud800")


def test_a_missing_byte_without_an_escape_is_a_clear_error():
    with pytest.raises(UserError, match="no token for the byte 0x04"):
        Tokenizer(spec_without(MISSING)).encode("\x04")


def test_normalisation_is_dropped_because_it_would_change_text():
    normalising = Tokenizer({**SPEC, "normalizer": {"type": "NFC"}})
    assert normalising.decode(normalising.encode("e\u0301")) == "e\u0301"


@pytest.mark.parametrize(
    "change",
    [
        {"model": {"type": "WordPiece"}},
        {"model": {**SPEC["model"], "merges": ["h zz"]}},
        {"pre_tokenizer": {"type": "Whitespace"}},
        {"pre_tokenizer": None},
        {"added_tokens": [{"id": 3}]},
    ],
)
def test_other_tokenizers_are_refused(change, tmp_path):
    (tmp_path / "tokenizer.json").write_text(json.dumps({**SPEC, **change}))
    with pytest.raises(UserError, match=r"tokenizer\.json: "):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("[]")
    with pytest.raises(UserError, match="JSON object"):
        Tokenizer.load(tmp_path)


@pytest.mark.skipif(not REAL.exists(), reason="smollm2-135m is not pulled")
def test_real_vocabulary():
    base = Tokenizer.load(REAL)
    ours = adopt(base)
    assert ours.vocab_size == 49152 and set(ours.special.values()) <= set(range(17)) and ours.byte_escape is not None
    for row in json.loads((GOLDEN / "smollm2.json").read_text()):
        if "<|" not in row["text"]:
            assert base.encode(row["text"]) == ours.encode(row["text"]) == row["ids"]
    for text in ("".join(map(chr, range(0x3000))), "\U00050000\U000a1234\x04\x1d", "".join(base.base_special), "\r\n\t  x  \n\n"):
        ids = ours.encode(text)
        assert ours.decode(ids) == text and not set(ours.special.values()) & set(ids)
