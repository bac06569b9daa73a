"""How near an untrained base's replies in our template are to those in its own: rows of the control ids before a reply, compared.

    .venv/bin/python bench/takeover.py [MODEL]

For each choice of rows: KL divergence, in nats, of the reply's tokens from the base's own in ChatML (its greedy reply of 12 tokens, fed to
both), over the questions of `datagen/questions.yaml` that it answers at that length. See docs/template.md.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from datagen.talk import QUESTIONS
from model.chatml import TURN_END, TURN_START, chatml_stops, encode_chatml
from model.load import NOISE, find, load_model, reply_header
from model.ops import enable_compile_cache
from model.sampler import Sampler
from soul.conversation import user
from soul.template import Template

LENGTH = 12  # tokens of a reply
WIDTH = 64  # of a prompt and its reply


@nnx.jit
def log_p(model, ids_bt, at_bn):
    x_bnd = jnp.take_along_axis(model.hidden(ids_bt), at_bn[..., None], axis=1)
    return jax.nn.log_softmax(model.logits(x_bnd).astype(jnp.float32), axis=-1)


def scores(model, prompts, replies):
    """log p of each of the replies' tokens, B×LENGTH×V."""
    ids_bt = np.zeros((len(prompts), WIDTH), np.int32)
    for row, prompt, reply in zip(ids_bt, prompts, replies, strict=True):
        row[: len(prompt) + LENGTH - 1] = [*prompt, *reply[:-1]]
    at_bn = np.array([[len(prompt) - 1 + i for i in range(LENGTH)] for prompt in prompts])
    return np.asarray(log_p(model, ids_bt, at_bn))


def main() -> None:
    enable_compile_cache()
    path = find(sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m")
    base, ours = load_model(path, raw=True), load_model(path)
    asked = [[user(text)] for text in QUESTIONS]
    prompts = [encode_chatml(base.tokenizer, messages) for messages in asked]
    done = Sampler(base.model, base.tokenizer).generate(
        prompts, max_new=LENGTH, temperature=0.0, seeds=[0] * len(prompts), stop_ids=tuple(chatml_stops(base.tokenizer))
    )
    whole = [i for i, reply in enumerate(done) if len(reply.ids) == LENGTH and len(prompts[i]) <= WIDTH - LENGTH][:64]
    replies = [done[i].ids for i in whole]
    want = scores(base.model, [prompts[i] for i in whole], replies)
    framed = [Template(ours.tokenizer).encode(asked[i], prompt=True).ids for i in whole]

    rows_vd, special = np.array(ours.model.embed[...]), ours.tokenizer.special
    before, last = reply_header(ours.tokenizer)
    start, end = (np.array(base.model.embed[base.tokenizer.base_special[name]]) for name in (TURN_START, TURN_END))
    noise = NOISE * end.std() * np.random.default_rng(0).standard_normal(end.shape).astype(end.dtype)
    choices = {
        "noisy turn end, turn start": (end + noise, start),
        "turn end, newline": (end, rows_vd[last]),
        "last of `assistant`, newline": (rows_vd[before], rows_vd[last]),
    }
    print(f"{len(whole)} replies of {path.name}; KL divergence in nats of\n{'':32}{'first':>8}{'second':>8}{'later':>8}")
    for name, (user_end, assistant_start) in choices.items():
        rows = rows_vd.copy()
        rows[special["<|user_end|>"]], rows[special["<|assistant_start|>"]] = user_end, assistant_start
        ours.model.embed[...] = jnp.asarray(rows)
        kl_bn = (np.exp(want) * (want - scores(ours.model, framed, replies))).sum(-1)
        print(f"{name:32}{kl_bn[:, 0].mean():8.2f}{kl_bn[:, 1].mean():8.2f}{kl_bn[:, 2:].mean():8.2f}", flush=True)


if __name__ == "__main__":
    main()
