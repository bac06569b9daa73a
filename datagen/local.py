"""The embedded teacher: a small model on the project's own sampler, speaking its base chat template.

One thread owns the model. Requests join the sampler's running batch as they come and leave it as they end, and a
shared beginning (the SOUL) is computed once, by the sampler. A request's seed comes from its key, and no row of a batch
influences another, so a run is repeatable whatever the order of its calls.
"""

import asyncio
import json
import queue
import threading
from pathlib import Path

from datagen.teachers import FREE
from datagen.wire import Answer, Request, make_request
from soul.errors import UserError
from soul.files import sha256_file, sha256_json

MAX_LEN = 2048
WEIGHTS = (".json", ".safetensors", ".gguf")  # and the suffixless files of a checkpoint


class LocalTeacher:
    """The model `name` as a teacher; it is loaded at the first call that the journal does not have."""

    deadline = False  # it cannot hang on a network, and a full queue is no fault
    price = FREE

    def __init__(self, name: str, *, batch: int = 16):
        self.name, self.batch = name, batch
        self.concurrency = 2 * batch  # a second batch waits, so that no row of the first idles
        self.base_url = f"local:{identity(name)}"
        self._inbox: queue.SimpleQueue = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def request(self, messages: list[dict], *, replicate: int, temperature: float, top_p: float, max_tokens: int, **_: object) -> Request:
        """A frozen request; the sampler has no grammar for a schema, gives no logprobs and knows no tools: they are left out."""
        body = {"model": self.name, "messages": messages, "temperature": temperature, "top_p": top_p, "max_tokens": max_tokens}
        return make_request(self.base_url, body, replicate)

    async def send(self, request: Request) -> Answer:
        if self._thread is None:
            self._thread = threading.Thread(target=self._serve, name="local teacher", daemon=True)
            self._thread.start()
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        self._inbox.put((request, future, loop))
        return await future

    async def close(self) -> None:
        if self._thread is not None:
            self._inbox.put(None)
            await asyncio.to_thread(self._thread.join)

    # --- the thread that owns the model

    def _serve(self) -> None:
        waiting: dict[int, tuple] = {}  # sampler handle -> (future, loop, prompt length)
        try:
            from model.load import load_model
            from model.sampler import Sampler

            loaded = load_model(self.name, raw=True)
            tokenizer, sampler = loaded.tokenizer, Sampler(loaded.model, loaded.tokenizer, max_len=MAX_LEN, batch=self.batch)
            open_ = True
            while open_ or waiting:
                while open_ and (not waiting or not self._inbox.empty()):
                    job = self._inbox.get()
                    if job is None:
                        open_ = False
                    else:
                        self._admit(job, tokenizer, sampler, waiting)
                for handle in [handle for handle, (future, *_) in waiting.items() if future.cancelled()]:
                    sampler.cancel(handle)
                    del waiting[handle]
                for handle, completion in sampler.step() if waiting else ():
                    future, loop, length = waiting.pop(handle)
                    _deliver(loop, future, self._answer(tokenizer, completion, length))
        except BaseException as error:  # whatever ends this thread must reach the rows that wait for it
            self._fail(error, waiting)

    def _admit(self, job, tokenizer, sampler, waiting) -> None:
        from model.chatml import chatml_stops, encode_chatml
        from model.sampler import Request as SampleRequest

        request, future, loop = job
        if future.cancelled():
            return
        body = json.loads(request.body)
        prompt = encode_chatml(tokenizer, body["messages"])
        if len(prompt) + body["max_tokens"] > sampler.max_len:
            why = f"{len(prompt)} prompt tokens and {body['max_tokens']} to generate exceed {sampler.max_len}"
            _deliver(loop, future, Answer(400, json.dumps({"error": {"code": "context_length_exceeded", "message": why}})))
            return
        handle = sampler.submit(SampleRequest(
            prompt, body["max_tokens"], body["temperature"], body["top_p"], int(request.key[:8], 16), frozenset(chatml_stops(tokenizer))
        ))  # fmt: skip
        waiting[handle] = (future, loop, len(prompt))

    def _answer(self, tokenizer, completion, prompt_tokens: int) -> Answer:
        """A chat completion as an OpenAI-compatible server writes it."""
        ids = completion.ids[:-1] if completion.finish == "stop" else completion.ids
        text = tokenizer.decode_bytes(ids).decode("utf-8", "replace")
        usage = {"prompt_tokens": prompt_tokens, "completion_tokens": len(completion.ids), "cost": 0.0}
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": completion.finish}
        body = {"object": "chat.completion", "model": self.name, "choices": [choice], "usage": usage}
        return Answer(200, json.dumps(body, ensure_ascii=False))

    def _fail(self, error: BaseException, waiting: dict) -> None:
        known = error
        if not isinstance(error, UserError):
            known = UserError(f"the embedded model failed: {type(error).__name__}: {error}", where=self.name)
        for future, loop, _ in waiting.values():
            _deliver(loop, future, known)
        while (job := self._inbox.get()) is not None:
            _deliver(job[2], job[1], known)


def _deliver(loop, future, result: Answer | UserError) -> None:
    def settle():
        if not future.done():
            (future.set_exception if isinstance(result, UserError) else future.set_result)(result)

    if not loop.is_closed():
        loop.call_soon_threadsafe(settle)


def identity(name: str) -> str:
    """What decides the weights: a published model's name (its file is pinned by sha256), else the hash of the files given."""
    path = Path(name)
    if not path.exists():
        return name
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    return sha256_json([[file.name, sha256_file(file)] for file in files if file.suffix in WEIGHTS or not file.suffix])[:16]
