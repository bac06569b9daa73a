"""Money: a hard limit on what a run directory may cost, held by reserving the most that a call can cost before it is sent.

The bound on a prompt is its length in bytes: a byte-level tokenizer never makes more tokens than there are bytes. Sums are
whole picodollars, so that no rounding error ever lets a call through.
"""

import asyncio
import math
from collections import deque

from datagen.teachers import Price
from datagen.wire import Answer, Request, Verdict
from soul.errors import UserError

MESSAGE_TOKENS = 16  # what a chat template writes around one message, at most
PICO = 10**12


class Spent(UserError):
    """The next call may cost more than is left; nothing is in flight and everything answered is kept."""


def most_tokens(request: Request, messages: list[dict]) -> int:
    """The most tokens that the prompt of `request` can be. The whole body is counted: tools and schemas are prompt, too."""
    return len(request.body.encode("utf-8", "surrogatepass")) + MESSAGE_TOKENS * len(messages)


def most_usd(price: Price, prompt_tokens: int, max_tokens: int) -> float:
    """The most that one call can cost."""
    return prompt_tokens * price.prompt + max_tokens * price.completion + price.request


def charge(answer: Answer, verdict: Verdict, most: float | None) -> float | None:
    """What an attempt counts for, in USD: what it was billed, nothing where it failed, else `most`: unknown is not zero."""
    if verdict.cost is not None:
        return verdict.cost
    return 0.0 if answer.status >= 400 or not answer.reached else most


class Budget:
    """`limit_usd` for everything, of which `spent` is gone. What is spent and reserved never exceeds it, as long as no
    bill exceeds its reservation; when one does (the price list was wrong), later reservations grow by as much."""

    def __init__(self, limit_usd: float, spent: float = 0.0):
        self.limit_usd = limit_usd
        self._limit, self._spent, self._reserved = math.floor(limit_usd * PICO), math.ceil(spent * PICO), 0
        self._flying, self._factor, self._closed = 0, 1.0, False
        self._waiting: deque[tuple[int, asyncio.Future]] = deque()

    @property
    def spent(self) -> float:
        return self._spent / PICO

    @property
    def reserved(self) -> float:
        return self._reserved / PICO

    async def reserve(self, usd: float) -> int | None:
        """Set up to `usd` aside, in turn, when it fits; gives what `settle` takes back, None after `close`. Raises Spent when
        it does not fit and no call is in flight that could still settle for less."""
        future = asyncio.get_running_loop().create_future()
        self._waiting.append((math.ceil(usd * self._factor * PICO), future))
        self._pump()
        return await future

    def settle(self, reserved: int, usd: float) -> None:
        """Give a reservation back and spend `usd`."""
        cost = math.ceil(usd * PICO)
        if cost > reserved > 0:
            self._factor *= cost / reserved
        self._reserved -= reserved
        self._spent += cost
        self._flying -= 1
        self._pump()

    def close(self) -> None:
        """Nothing is reserved any more; who waits is let go."""
        self._closed = True
        self._pump()

    def _pump(self) -> None:
        while self._waiting:
            most, future = self._waiting[0]
            fits = most == 0 or self._spent + self._reserved + most <= self._limit
            if not (fits or self._closed or self._flying == 0):
                return
            self._waiting.popleft()
            if future.done():  # cancelled
                continue
            if self._closed:
                future.set_result(None)
            elif fits:
                self._reserved += most
                self._flying += 1
                future.set_result(most)
            else:
                what = f"${self.spent:,.4f} of ${self.limit_usd:,.2f} is spent, and the next call may cost ${most / PICO:,.4f}"
                future.set_exception(Spent(what, fix="Raise --max-usd and run the same command again; everything answered is kept."))
