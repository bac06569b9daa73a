"""Byte-level BPE in which text can never become a control token, and every string comes back exactly.

The Rust core is built *without* added tokens and with the control names taken out of its vocabulary, so text that spells
`<|im_end|>` is cut into ordinary pieces like any other text. The saved `tokenizer.json` has them as added tokens again, so
`tokenizers` and `transformers` read it; the base's own name of an adopted token is kept beside ours as the field `base`.
"""

import itertools
import json
import re
from pathlib import Path

from tokenizers import Tokenizer as Core
from tokenizers.pre_tokenizers import ByteLevel

from soul.errors import UserError
from soul.files import read_json, write_atomic
from soul.template import SPECIAL_TOKENS

BYTE_ESCAPE = "<|byte|>"
TURN_END = ("<|im_end|>", "<|eot_id|>", "<|endoftext|>", "<|end_of_text|>", "</s>")
TURN_START = ("<|im_start|>", "<|start_header_id|>")
DOCUMENT_START = ("<|begin_of_text|>", "<|endoftext|>", "<s>")


def _byte_characters() -> dict[str, int]:
    """GPT-2's table: printable Latin-1 stands for itself, the other 68 bytes are moved to U+0100 and up, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    moved = [b for b in range(256) if b not in set(printable)]
    return {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(moved)}


BYTE_OF = _byte_characters()
assert set(BYTE_OF) == set(ByteLevel.alphabet())


class Tokenizer:
    """A byte-level BPE tokenizer made from the content of a `tokenizer.json`.

    special: our control tokens by name ({} before `adopt`). base_special: the base model's own control names and ids.
    vocab_size: one more than the largest id. byte_escape: see `encode`.
    Raises UserError if the file is not a byte-level BPE tokenizer, or would lose text.
    """

    def __init__(self, spec: dict, where: object = "tokenizer.json"):
        self.where = where
        try:
            model, added = spec["model"], spec["added_tokens"]
            self.special = {t["content"]: t["id"] for t in added if t["content"] in SPECIAL_TOKENS}
            self.base_special = {t.get("base", t["content"]): t["id"] for t in added if "base" in t or t["content"] not in SPECIAL_TOKENS}
            self.byte_escape = next((t["id"] for t in added if t["content"] == BYTE_ESCAPE), None)
            names = {t["content"] for t in added} | set(self.base_special)
            self._vocab = {piece: n for piece, n in model["vocab"].items() if piece not in names}
            self.vocab_size = max([*self._vocab.values(), *(t["id"] for t in added)]) + 1
            pairs = (tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in model["merges"])
            merges = [(a, b) for a, b in pairs if a not in names and b not in names and a + b not in names]
            # NFC and the like would change the text; templates and limits are ours to apply
            blank = dict.fromkeys(("normalizer", "truncation", "padding", "post_processor"))
            self.spec = {**spec, **blank, "model": {**model, "merges": merges, "unk_token": None}}
            core = {**self.spec, "added_tokens": [], "model": {**self.spec["model"], "vocab": self._vocab}}
            self._core = Core.from_str(json.dumps(core))
            self._bytes_of = {n: bytes(map(BYTE_OF.__getitem__, piece)) for piece, n in self._vocab.items()}
        except KeyError as missing:
            raise UserError(f"is not a byte-level BPE tokenizer ({missing} is unknown or missing)", where=where) from None
        except Exception as error:  # `tokenizers` raises bare Exception for a file that it cannot use
            raise UserError(f"is not a tokenizer that can be used: {error}", where=where) from None
        self._byte_ids = {BYTE_OF[piece]: n for piece, n in self._vocab.items() if len(piece) == 1}
        absent = bytes(b for c, b in BYTE_OF.items() if c not in self._vocab)
        self.lacks_bytes = bool(absent)
        self._absent = re.compile(b"[" + re.escape(absent) + b"]") if absent else None
        probe = "A  b\n\n\tc 12,345 ça 😀 don't\r\n <|x|>"
        if self.decode_bytes(self.encode(probe)) != probe.encode():
            raise UserError("loses text: encode and decode are not inverse", where=where, fix="Use a byte-level BPE tokenizer.")

    def encode(self, text: str) -> list[int]:
        """Ids of ordinary text; never a control id. `decode_bytes` gives the same text back for every Unicode string.

        SmolLM2's vocabulary lacks 21 bytes, 8 of which occur in UTF-8 (HF `tokenizers` drops them silently). Each is written as two
        ids, the byte escape and the piece of (byte XOR 0x40), like ^D for 0x04. Raises UserError for lone surrogates, which are not text.
        """
        try:
            data = text.encode("utf-8")
        except UnicodeEncodeError as error:
            code = ord(text[error.start])
            raise UserError(f"text has a lone surrogate U+{code:04X} at character {error.start}", fix="Read it as UTF-8.") from None
        if self._absent is None or not self._absent.search(data):
            return self._core.encode(text, add_special_tokens=False).ids
        ids: list[int] = []
        for spelled, run in itertools.groupby(text, lambda c: bool(self._absent.search(c.encode()))):
            part = "".join(run)
            ids += self._spell(part.encode()) if spelled else self._core.encode(part, add_special_tokens=False).ids
        return ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """`encode` of each text, in parallel in the Rust core. Raises UserError as `encode` does."""
        try:
            odd = {n for n, text in enumerate(texts) if self._absent is not None and self._absent.search(text.encode())}
            plain = [text for n, text in enumerate(texts) if n not in odd]
            found = iter(self._core.encode_batch_fast(plain, add_special_tokens=False))
        except (TypeError, UnicodeEncodeError):  # a lone surrogate: `encode` says where
            return [self.encode(text) for text in texts]
        return [self.encode(text) if n in odd else next(found).ids for n, text in enumerate(texts)]

    def _spell(self, data: bytes) -> list[int]:
        ids: list[int] = []
        for byte in data:
            if byte in self._byte_ids:
                ids.append(self._byte_ids[byte])
            elif self.byte_escape is not None and byte ^ 0x40 in self._byte_ids:
                ids += [self.byte_escape, self._byte_ids[byte ^ 0x40]]
            else:
                raise UserError(f"has no token for the byte 0x{byte:02X}", where=self.where)
        return ids

    def decode_bytes(self, ids: list[int]) -> bytes:
        """The bytes of ordinary ids, in order; control ids and ids without a piece give none."""
        if self.byte_escape is None or self.byte_escape not in ids:
            return b"".join(self._bytes_of.get(int(n), b"") for n in ids)
        out, escaped = bytearray(), False
        for n in ids:
            piece = self._bytes_of.get(int(n), b"")
            out += bytes([piece[0] ^ 0x40]) + piece[1:] if escaped and piece else piece
            escaped = int(n) == self.byte_escape
        return bytes(out)

    def decode(self, ids: list[int]) -> str:
        """The text of ordinary ids; bytes that are not UTF-8 (a character cut in two) show as U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Read a `tokenizer.json`, or the one inside a directory."""
        path = Path(path)
        path = path / "tokenizer.json" if path.is_dir() else path
        spec = read_json(path)
        if not isinstance(spec, dict):
            raise UserError("must hold a JSON object", where=path)
        return cls(spec, where=path)

    def save(self, path: str | Path) -> None:
        write_atomic(path, json.dumps(self.spec, ensure_ascii=False, separators=(",", ":")))


def added_token(content: str, number: int, **more: str) -> dict:
    """One entry of `added_tokens` in a tokenizer.json."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": number, "content": content, **flags, **more}


def adopt(tokenizer: Tokenizer) -> Tokenizer:
    """Give our special tokens the base's own control ids, so none of the base's is left to compete (see DESIGN.md).

    `<|assistant_end|>` is the base's end of turn, `<|assistant_start|>` its start of turn, `<|bos|>` its start of document; the others
    take the remaining ids in order. Only when the base has too few are ids appended, on the model's padding rows if it has some.
    A tokenizer that has our tokens already comes back as it is. Raises UserError if the base has no end-of-turn token that we know.
    """
    if tokenizer.special:
        return tokenizer
    base, ours = tokenizer.base_special, {}
    free = sorted(base.values())
    for name, candidates in (("<|assistant_end|>", TURN_END), ("<|assistant_start|>", TURN_START), ("<|bos|>", DOCUMENT_START)):
        number = next((base[c] for c in candidates if base.get(c) in free), None)
        if number is not None:
            ours[name] = number
            free.remove(number)
    if "<|assistant_end|>" not in ours:
        raise UserError("has no end-of-turn token that soulsmith knows", where=tokenizer.where, fix=f"Known are {', '.join(TURN_END)}.")
    wanted = [name for name in SPECIAL_TOKENS if name not in ours]
    if tokenizer.lacks_bytes:
        wanted.append(BYTE_ESCAPE)
    free += range(tokenizer.vocab_size, tokenizer.vocab_size + len(wanted) - len(free))
    ours |= dict(zip(wanted, free))
    old_name = {n: name for name, n in base.items()}
    entries = {n: added_token(name, n, base=name) for n, name in old_name.items()}
    entries |= {n: added_token(name, n, **({"base": old_name[n]} if n in old_name else {})) for name, n in ours.items()}
    model = tokenizer.spec["model"]
    in_model = {n: piece for piece, n in model["vocab"].items()}
    vocab = {entries[n]["content"] if n in entries else piece: n for n, piece in in_model.items()}
    spec = {**tokenizer.spec, "model": {**model, "vocab": vocab}, "added_tokens": [entries[n] for n in sorted(entries)]}
    return Tokenizer(spec, where=tokenizer.where)
