"""Batched KV-cache sampling with continuous batching and prefix reuse.

Each of the B rows of the cache holds one sequence. A finished row takes the next request at once; a new prompt starts from the row
that shares its longest beginning, so a common system prompt, or the previous turn of a chat, is computed once.
"""

import functools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from model.ops import exact
from model.transformer import Decoder
from soul.errors import UserError

CHUNK, LONG = 64, 256  # prompt tokens per prefill dispatch: two compiled shapes serve every length (880 and 1,300 tokens/s)
STEPS = 8  # most tokens per row and dispatch
MAX_STOPS = 16


@dataclass(frozen=True)
class Request:
    """One prompt and how to continue it. `seed` alone decides the draws: the rest of the batch has no influence."""

    prompt: Sequence[int]
    max_new: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop_ids: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Completion:
    """Generated ids (a stop id that ended it included) and why it ended: "stop" or "length"."""

    ids: list[int]
    finish: str


@dataclass
class _Slot:
    held: list[int]  # the tokens whose keys and values are in the row
    request: Request | None = None
    handle: int = -1
    new: list[int] | None = None


class Sampler:
    """Generates with `batch` rows at a time (at least 4: products of fewer rows are far slower than products of 4).

    Weights are held in bf16 where `model.compute` is "bf16". Ids at or above `tokenizer.vocab_size` are never drawn.
    """

    def __init__(self, model: Decoder, tokenizer=None, *, max_len: int = 2048, batch: int = 16):
        self.max_len, self.batch = min(max_len, model.config.max_len), max(batch, 4)
        self.vocab = min(model.config.vocab_size, tokenizer.vocab_size if tokenizer else model.config.vocab_size)
        self.dtype = jnp.bfloat16 if model.compute == "bf16" else jnp.float32
        self.graph, params = nnx.split(model)
        self.params = jax.tree.map(lambda p: p.astype(self.dtype if p.ndim > 1 else jnp.float32), params)
        self.bits = _bits(self.params["embed"][...])
        self.slots = [_Slot([]) for _ in range(self.batch)]
        self.queue: deque[tuple[int, Request]] = deque()
        self.handles, self.size, c = 0, 256, model.config
        self.cache = [jnp.zeros((self.batch, c.n_kv_heads, self.size, c.d_head), self.dtype) for _ in range(2 * c.n_layers)]
        self.rows = {  # per-row state on the host, sent with each dispatch
            "token": np.zeros(self.batch, np.int32),
            "at": np.zeros(self.batch, np.int32),
            "left": np.zeros(self.batch, np.int32),
            "seed": np.zeros(self.batch, np.uint32),
            "temperature": np.zeros(self.batch, np.float32),
            "top_p": np.ones(self.batch, np.float32),
            "stops": np.full((self.batch, MAX_STOPS), -1, np.int32),
        }

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seeds: Sequence[int] | None = None,
        stop_ids: Sequence[int] = (),
        on_done: Callable[[int, Completion], None] | None = None,
    ) -> list[Completion]:
        """Continue every prompt; results in the order of `prompts`. `on_done(index, completion)` is called as each one ends.

        Seeds default to the prompt's index. Raises UserError for an empty prompt or one that fills max_len.
        """
        seeds = range(len(prompts)) if seeds is None else seeds
        index: dict[int, int] = {}
        done: dict[int, Completion] = {}
        try:
            for i, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
                index[self.submit(Request(prompt, max_new, temperature, top_p, seed, frozenset(stop_ids)))] = i
            while len(done) < len(prompts):
                for handle, completion in self.step():
                    done[index[handle]] = completion
                    if on_done:
                        on_done(index[handle], completion)
        finally:  # after an error or Ctrl-C nothing stays behind for the next call
            for handle, i in index.items():
                if i not in done:
                    self.cancel(handle)
        return [done[i] for i in range(len(prompts))]

    def stream(self, prompt: Sequence[int], *, max_new: int, temperature: float = 0.0, top_p: float = 1.0, seed: int = 0,
               stop_ids: Sequence[int] = ()) -> Iterator[int]:  # fmt: skip
        """Yield the ids that `generate` would return for this prompt, as they come. Closing the iterator stops the work."""
        handle = self.submit(Request(prompt, max_new, temperature, top_p, seed, frozenset(stop_ids)))
        sent, done = 0, None
        try:
            while done is None:
                done = dict(self.step(steps=2)).get(handle)
                ids = done.ids if done else next(s.new for s in self.slots if s.handle == handle)
                yield from ids[sent:]
                sent = len(ids)
        finally:
            if done is None:
                self.cancel(handle)

    def submit(self, request: Request) -> int:
        """Queue a request and return its handle; `step` does the work. Raises UserError for a prompt that cannot be continued."""
        if not len(request.prompt) or len(request.prompt) >= self.max_len or request.max_new < 1:
            what = f"a prompt of {len(request.prompt)} tokens with {request.max_new} to generate does not fit"
            raise UserError(what, fix=f"prompts need 1 to {self.max_len - 1} tokens, and at least 1 to generate")
        if len(request.stop_ids) > MAX_STOPS:
            raise UserError(f"{len(request.stop_ids)} stop ids", fix=f"give at most {MAX_STOPS}")
        self.handles += 1
        self.queue.append((self.handles, request))
        return self.handles

    def cancel(self, handle: int) -> None:
        """Forget a request, queued or running."""
        self.queue = deque(q for q in self.queue if q[0] != handle)
        for row, slot in enumerate(self.slots):
            if slot.handle == handle:
                self._release(row)

    def step(self, steps: int = STEPS) -> list[tuple[int, Completion]]:
        """Start queued requests in free rows, decode up to `steps` tokens per row, and return what finished."""
        self.admit()
        busy = [row for row, slot in enumerate(self.slots) if slot.request]
        if not busy:
            return []
        self._resize(int(max(self.rows["at"][busy])) + STEPS)
        fresh, state, out = _decode(self.graph, self.params, self.bits, self.cache, self.rows, min(steps, STEPS), self.vocab)
        self.cache = _join(self.cache, fresh, self.rows["at"])
        self.rows |= {name: np.array(value) for name, value in state.items()}
        return self._collect(busy, np.asarray(out))

    def admit(self) -> None:
        """Give queued requests the free rows and read their prompts; `step` does it by itself."""
        while self.queue and any(slot.request is None for slot in self.slots):
            self._admit(*self.queue.popleft())

    def _collect(self, busy, out_bn):
        finished = []
        for row in busy:
            slot = self.slots[row]
            new = [int(t) for t in out_bn[row] if t >= 0]
            slot.held += [slot.request.prompt[-1] if not slot.new else slot.new[-1], *new[:-1]]
            slot.new += new
            if not self.rows["left"][row]:
                finished.append((slot.handle, Completion(slot.new, "stop" if slot.new[-1] in slot.request.stop_ids else "length")))
                self._release(row)
        return finished

    def _release(self, row):
        self.slots[row] = _Slot(self.slots[row].held)
        self.rows["left"][row] = 0

    def _admit(self, handle, request):
        prompt = [int(t) for t in request.prompt]
        free = {row for row, slot in enumerate(self.slots) if slot.request is None}
        shared = [_common(slot.held, prompt[:-1]) // CHUNK * CHUNK for slot in self.slots]
        source = max(range(self.batch), key=lambda row: (shared[row], row in free))
        start = shared[source]  # without a shared beginning, the row that holds least is given up: another chat may come back to its own
        row = source if start and source in free else min(free, key=lambda row: len(self.slots[row].held))
        self._resize(-(-len(prompt) // CHUNK) * CHUNK)
        if start and source != row:
            self.cache = _copy_row(self.cache, source, row)
        self._prefill(row, prompt[:-1], start)
        self.slots[row] = _Slot(prompt[:-1], request, handle, [])
        stops = sorted(request.stop_ids)
        for name, value in {
            "token": prompt[-1],
            "at": len(prompt) - 1,
            "seed": request.seed & 0xFFFFFFFF,
            "left": min(request.max_new, self.max_len - len(prompt)),
            "top_p": request.top_p,
            "temperature": request.temperature,
            "stops": stops + [-1] * (MAX_STOPS - len(stops)),
        }.items():
            self.rows[name][row] = value

    def _prefill(self, row, prompt, at):
        """Compute keys and values of prompt[at:] into a row."""
        while at < len(prompt):
            width = LONG if len(prompt) - at > 2 * CHUNK and at + LONG <= self.size else CHUNK
            ids = np.zeros((1, width), np.int32)  # padding writes places that later tokens overwrite before anyone sees them
            ids[0, : len(prompt) - at] = prompt[at : at + width]
            self.cache = _prefill(self.graph, self.params, self.bits, self.cache, ids, row, at)
            at += width

    def _resize(self, need):
        """Grow the cache to a power of two that holds `need`; shrink it when a quarter would do: attention costs by its length."""
        busy = [len(slot.held) + 1 for slot in self.slots if slot.request]
        size = 256
        while size < max([need, *busy]):
            size *= 2
        if size > self.size or size * 4 <= self.size:
            self.cache = [_fit(a, size) for a in self.cache]
            self.size = size
        for row, slot in enumerate(self.slots):
            if slot.request is None:  # each dispatch writes STEPS places after `at` in every row, busy or not
                del slot.held[self.size - STEPS :]
                self.rows["at"][row] = len(slot.held)


def _bits(table_vd):
    """The table's bf16 bits, sharing its memory: gathering bf16 rows on CPU first converts all V of them to fp32 (35 ms)."""
    if table_vd.dtype != jnp.bfloat16:
        return table_vd
    return jax.device_put(np.asarray(table_vd).view(np.uint16), may_alias=True)


def _rows_of(bits_vd, ids):
    rows = bits_vd[ids]
    return rows if rows.dtype == jnp.float32 else lax.bitcast_convert_type(rows, jnp.bfloat16).astype(jnp.float32)


def _common(a, b) -> int:
    n = min(len(a), len(b))
    return next((i for i in range(n) if a[i] != b[i]), n)


@functools.partial(jax.jit, static_argnums=1)
def _fit(a_bksh, size):
    have = a_bksh.shape[2]
    return a_bksh[:, :, :size] if size <= have else jnp.pad(a_bksh, ((0, 0), (0, 0), (0, size - have), (0, 0)))


@functools.partial(jax.jit, donate_argnums=0)
def _copy_row(cache, source, target):
    return [lax.dynamic_update_slice_in_dim(a, lax.dynamic_slice_in_dim(a, source, 1), target, 0) for a in cache]


def _put(a, new, at):
    """lax.dynamic_update_slice for a cache. In bf16, XLA's CPU back end would convert all of `a` to fp32 and back; bits it just moves."""
    if a.dtype != jnp.bfloat16:
        return lax.dynamic_update_slice(a, new.astype(a.dtype), at)
    bits = [lax.bitcast_convert_type(x.astype(a.dtype), jnp.uint16) for x in (a, new)]
    return lax.bitcast_convert_type(lax.dynamic_update_slice(*bits, at), a.dtype)


def _scores(q_bktgh, k_bksh, seen_bts):
    """Masked fp32 scores b,K,T·G,S. The cache is K-major, so both operands of the product are contiguous."""
    b, kv, t, g, h = q_bktgh.shape
    q = (q_bktgh * h**-0.5).astype(k_bksh.dtype).reshape(b, kv, t * g, h)
    scores = lax.dot_general(q, k_bksh, (((3,), (3,)), ((0, 1), (0, 1))), exact(q), jnp.float32)
    seen = jnp.broadcast_to(seen_bts[:, None, :, None], (b, 1, t, g, k_bksh.shape[2])).reshape(b, 1, t * g, -1)
    return jnp.where(seen, scores, -1e30)


def _mix(p_bkts, v_bksh):
    return lax.dot_general(p_bkts.astype(v_bksh.dtype), v_bksh, (((3,), (2,)), ((0, 1), (0, 1))), exact(v_bksh), jnp.float32)


def _grouped(q_bthk, kv):
    b, t, heads, h = q_bthk.shape
    return q_bthk.reshape(b, t, kv, heads // kv, h).transpose(0, 2, 1, 3, 4)


def _ungrouped(x_bkth, like_bthk):
    b, t, heads, h = like_bthk.shape
    return x_bkth.reshape(b, x_bkth.shape[1], t, -1, h).transpose(0, 2, 1, 3, 4).reshape(b, t, heads, h)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=3)
def _prefill(graph, params, bits_vd, cache, ids_1t, row, at):
    """Write one chunk of one prompt into its row."""
    at_1t = at + jnp.arange(ids_1t.shape[1])[None]
    cache = list(cache)

    def attend(i, q, k, v):
        for j, new in ((2 * i, k), (2 * i + 1, v)):
            cache[j] = _put(cache[j], new.transpose(0, 2, 1, 3), (row, 0, at, 0))
        k_row, v_row = (lax.dynamic_slice_in_dim(cache[j], row, 1) for j in (2 * i, 2 * i + 1))
        seen = jnp.arange(k_row.shape[2])[None, None] <= at_1t[:, :, None]
        p = jax.nn.softmax(_scores(_grouped(q, k.shape[2]), k_row, seen), axis=-1)
        return _ungrouped(_mix(p, v_row), q)

    nnx.merge(graph, params).hidden(ids_1t, at_1t, attend=attend, x_btd=_rows_of(bits_vd, ids_1t))
    return cache


@functools.partial(jax.jit, static_argnums=(0, 6))
def _decode(graph, params, bits_vd, cache, rows, steps, vocab):
    """Up to `steps` tokens for every row that has some left; `out_bn` is -1 where nothing was drawn.

    New keys and values go to a small buffer at one index shared by all rows and join the cache after the loop: writing each row's
    own position inside the loop made XLA convert and copy the whole cache at every layer (60 ms a step against 5).
    """
    model, b = nnx.merge(graph, params), rows["token"].shape[0]
    fresh = [jnp.zeros((b, a.shape[1], STEPS, a.shape[3]), jnp.float32) for a in cache]
    old_bs = jnp.broadcast_to(jnp.arange(cache[0].shape[2])[None, None] < rows["at"][:, None, None], (b, 1, cache[0].shape[2]))

    def one(carry):
        n, fresh, token, at, left, out = carry
        fresh = list(fresh)
        new_bs = jnp.broadcast_to((jnp.arange(STEPS) <= n)[None, None], (b, 1, STEPS))

        def attend(i, q, k, v):
            for j, new in ((2 * i, k), (2 * i + 1, v)):
                fresh[j] = lax.dynamic_update_slice(fresh[j], new.transpose(0, 2, 1, 3), (0, 0, n, 0))
            grouped = _grouped(q, k.shape[2])
            scores = [_scores(grouped, cache[2 * i], old_bs), _scores(grouped, fresh[2 * i], new_bs)]
            p = jax.nn.softmax(jnp.concatenate(scores, axis=-1), axis=-1)
            return _ungrouped(_mix(p[..., :-STEPS], cache[2 * i + 1]) + _mix(p[..., -STEPS:], fresh[2 * i + 1]), q)

        x_bd = model.hidden(token[:, None], at[:, None], attend=attend, x_btd=_rows_of(bits_vd, token[:, None]))[:, 0]
        drawn = sample(model.logits(x_bd)[:, :vocab], rows["seed"], at, rows["temperature"], rows["top_p"])
        live = left > 0
        stopped = jnp.any(drawn[:, None] == rows["stops"], axis=1)
        out = lax.dynamic_update_slice(out, jnp.where(live, drawn, -1)[:, None], (0, n))
        left = jnp.where(live & ~stopped, left - 1, 0)
        return n + 1, fresh, jnp.where(live, drawn, token), jnp.where(live, at + 1, at), left, out

    start = (jnp.int32(0), fresh, rows["token"], rows["at"], rows["left"], jnp.full((b, STEPS), -1, jnp.int32))
    _, fresh, token, at, left, out = lax.while_loop(lambda c: (c[0] < steps) & jnp.any(c[4] > 0), one, start)

    return fresh, {"token": token, "at": at, "left": left}, out


@functools.partial(jax.jit, donate_argnums=0)
def _join(cache, fresh, at_b):
    """Write every row's new keys and values at its own place. A dispatch of its own: inside _decode the donated cache was copied."""

    def join(row, cache):
        return [_put(a, lax.dynamic_slice_in_dim(f, row, 1), (row, 0, at_b[row], 0)) for a, f in zip(cache, fresh, strict=True)]

    return lax.fori_loop(0, at_b.shape[0], join, list(cache))


def sample(logits_bv, seed_b, at_b, temperature_b, top_p_b) -> jax.Array:
    """One token per row: the largest logit at temperature 0, else a draw from the smallest set of tokens with mass >= top_p.

    One uniform per row, from (seed, position), inverted through the cumulative sum: no V random numbers, no sort.
    """
    greedy = jnp.argmax(logits_bv, axis=-1).astype(jnp.int32)
    return lax.cond(
        jnp.any(temperature_b > 0),
        lambda: jnp.where(temperature_b > 0, _draw(logits_bv, seed_b, at_b, temperature_b, top_p_b), greedy),
        lambda: greedy,
    )


def _draw(logits_bv, seed_b, at_b, temperature_b, top_p_b):
    logits = logits_bv / jnp.maximum(temperature_b, 1e-6)[:, None]
    p_bv = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
    p_bv = lax.cond(jnp.any(top_p_b < 1), lambda: _nucleus(p_bv, top_p_b), lambda: p_bv)
    u_b = jax.vmap(lambda s, t: jax.random.uniform(jax.random.fold_in(jax.random.key(s), t)))(seed_b, at_b)
    b, v = p_bv.shape
    blocks = jnp.pad(p_bv, ((0, 0), (0, -v % 256))).reshape(b, -1, 256)  # two levels: a cumulative sum over V is slow on CPU
    ends = jnp.cumsum(blocks.sum(-1), axis=1)
    goal = u_b * ends[:, -1]
    block = jnp.minimum((ends <= goal[:, None]).sum(1), blocks.shape[1] - 1)
    before = jnp.where(block > 0, jnp.take_along_axis(ends, jnp.maximum(block - 1, 0)[:, None], axis=1)[:, 0], 0.0)
    inner = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    within = (jnp.cumsum(inner, axis=1) <= (goal - before)[:, None]).sum(1)
    last = 255 - jnp.argmax(inner[:, ::-1] > 0, axis=1)  # rounding must not push the draw beyond the last possible token
    return (block * 256 + jnp.minimum(within, last)).astype(jnp.int32)


def _nucleus(p_bv, top_p_b):
    """Zero all but the likeliest tokens whose mass reaches top_p: the cut is found by bisection, each pass one sum over V."""
    goal = top_p_b * p_bv.sum(-1)

    def halve(_, bounds):
        low, high = bounds
        mid = (low + high) / 2
        enough = jnp.where(p_bv >= mid[:, None], p_bv, 0.0).sum(-1) >= goal
        return jnp.where(enough, mid, low), jnp.where(enough, high, mid)

    low, _ = lax.fori_loop(0, 30, halve, (jnp.zeros_like(goal), jnp.ones_like(goal)))  # the likeliest token has p = 1 and always stays
    return jnp.where((p_bv >= low[:, None]) | (top_p_b >= 1)[:, None], p_bv, 0.0)
