"""OpenRouter: a preflight that knows every route before a cent is spent, and requests that cannot stray from them.

One model name stands for many endpoints: other hosts, other quantizations, other prices, other parameters. `open` reads
them all, keeps those that the requests can reach, and refuses what would silently mix two models into one dataset.
"""

import difflib
import hashlib
import json
from collections.abc import Sequence
from math import inf

from datagen.teachers import HttpTeacher, Price, Provider, data_of, listed
from datagen.wire import Answer, classify
from soul.console import console, plain
from soul.errors import UserError

URL = "https://openrouter.ai/api/v1"
ALWAYS = ("temperature", "top_p", "max_tokens")  # what every request says
WANTED = {"schema": ("structured_outputs",), "logprobs": ("logprobs", "top_logprobs")}  # where a route takes it


class OpenRouterTeacher(HttpTeacher):
    """`model` through OpenRouter.

    pins: providers, or single endpoints such as deepinfra/fp8, that may serve; all others are excluded.
    mixed: accept endpoints of different quantization. distillable: only models whose authors allow training on their output.
    price: instead of the dearest route's.
    After `open`, `quantization` maps each provider to what it serves; the engine writes it into the rows.
    """

    def __init__(self, model: str, key: str, *, pins: Sequence[str] = (), mixed: bool = False, distillable: bool = True,
                 price: Price | None = None, url: str = URL, **more):  # fmt: skip
        self.pins, self.mixed, self.distillable = sorted({pin.lower() for pin in pins}), mixed, distillable
        # without require_parameters a route may ignore sampling settings and schemas
        routing: dict = {"require_parameters": True}
        if distillable:
            routing["enforce_distillable_text"] = True
        if self.pins:
            # `only` and not `order`: an order switches off the stickiness that prompt caches need
            routing |= {"only": self.pins, "allow_fallbacks": False}
        # compression would cut the SOUL out of the middle of a long prompt
        extra = {"provider": routing, "plugins": [{"id": "context-compression", "enabled": False}]}
        # One session for all calls keeps them on one endpoint while it is up: its prompt cache has the SOUL, and the rows
        # one origin. It goes as a header, which the service takes for the same as the body's `session_id`, because it
        # does not change what a reply says and so has no place in a key.
        session = hashlib.sha256(json.dumps([model, self.pins]).encode()).hexdigest()[:32]
        headers = {"X-Session-Id": f"soulsmith-{session}"}
        provider = Provider(url, "/key", extra=extra, headers=headers, can=frozenset(WANTED), top_logprobs=5)  # some hosts give no more
        super().__init__(provider, model, key, price=price, **more)
        self.quantization: dict[str, str] = {}

    async def open(self) -> None:
        """Check key, credit, model, licence, routes, parameters and quantization; learn the price. Raises UserError, with what
        to change, when the run could not work or would mix models."""
        left = self._data(await self.get("/key")).get("limit_remaining")
        if isinstance(left, (int, float)) and left <= 0:
            raise UserError("the OpenRouter key has spent its limit", where=self.name, fix="Raise the key's limit or use another key.")
        found = (await self._endpoints()).get("endpoints")
        endpoints = [endpoint for endpoint in found or () if isinstance(endpoint, dict)]
        if not endpoints:
            raise UserError("has no endpoint at the moment", where=self.name, fix="Try later, or another model.")
        await self._check_licence()
        routes = self._routes(endpoints)
        self._one_quantization(routes)
        dearest = [max(column) for column in zip(*map(_price, routes))]
        self.price = self.price or (None if inf in dearest else Price(*dearest))
        rooms = [_room(route) for route in routes]
        self.max_reply = max(rooms) if all(rooms) else None
        self._can = frozenset(name for name, fields in WANTED.items() if any(_supports(route, fields) for route in routes))
        for route in routes:
            name, served = route.get("provider_name") or _tag(route), _quantization(route)
            known = self.quantization.setdefault(name, served)
            self.quantization[name] = known if served in known.split(" or ") else f"{known} or {served}"
        served = ", ".join(_line(route) for route in routes[:4]) + (f" and {len(routes) - 4} more" if len(routes) > 4 else "")
        credit = f"; ${left:,.2f} left on the key" if isinstance(left, (int, float)) else ""
        console.print(plain(f"openrouter: {self.name} from {served}{credit}"))
        for name in sorted(WANTED.keys() - self._can):
            console.print(plain(f"openrouter: no route takes {' and '.join(WANTED[name])}; requests go without"))

    async def _endpoints(self) -> dict:
        answer = await self.get(f"/models/{self.name}/endpoints")
        if answer.status == 404:
            known = listed(await self.get("/models"))
            near = difflib.get_close_matches(self.name, known, n=5, cutoff=0.4)
            fix = f"Did you mean {', '.join(near)}?" if near else "See openrouter.ai/models."
            raise UserError(f"OpenRouter has no model {self.name!r}", fix=fix)
        return self._data(answer)

    async def _check_licence(self) -> None:
        if not self.distillable:
            return
        allowed = listed(await self.get("/models?distillable=true"))
        if allowed and not {self.name, self.name.partition(":")[0]} & allowed.keys():
            what = "its authors have not allowed training on its output, says OpenRouter"
            raise UserError(what, where=self.name, fix="Choose another model, or read its licence and give --any-text.")

    def _routes(self, endpoints: list[dict]) -> list[dict]:
        """The endpoints that a request can reach: pinned, and with every parameter that it must carry."""
        pinned = [endpoint for endpoint in endpoints if not self.pins or _names(endpoint) & set(self.pins)]
        unknown = [pin for pin in self.pins if not any(pin in _names(endpoint) for endpoint in endpoints)]
        if unknown:
            fix = f"It is served by: {'; '.join(map(_line, endpoints))}."
            raise UserError(f"no provider {', '.join(unknown)}", where=self.name, fix=fix)
        routes = [endpoint for endpoint in pinned if _supports(endpoint, ALWAYS)]
        if not routes:
            lacks = "; ".join(f"{_tag(e)} lacks {', '.join(name for name in ALWAYS if not _supports(e, (name,)))}" for e in pinned)
            fix = "Pin another provider, or none." if self.pins else "Choose another model."
            raise UserError(f"no endpoint takes every parameter that is sent: {lacks}", where=self.name, fix=fix)
        return routes

    def _one_quantization(self, routes: list[dict]) -> None:
        if self.mixed or len({_quantization(route) for route in routes}) == 1:
            return
        what = f"is served in different quantizations, and one dataset would mix them: {'; '.join(map(_line, routes))}"
        raise UserError(what, where=self.name, fix=f"Pin one with --provider {_tag(routes[0])}, or give --allow-mixed.")

    def _data(self, answer: Answer) -> dict:
        """The `data` object of an answer, or what went wrong as an error for people."""
        if isinstance(data := data_of(answer), dict):
            return data
        verdict = classify(answer, now=0.0)
        raise UserError(f"OpenRouter's preflight failed: {verdict.why or 'not the answer expected'}", where=self.name,
                        fix=verdict.fix or "Try again later.")  # fmt: skip


def _tag(endpoint: dict) -> str:
    """What a pin says: provider/variant, in OpenRouter's own spelling."""
    return str(endpoint.get("tag") or endpoint.get("provider_name") or "?").lower()


def _names(endpoint: dict) -> set[str]:
    return {_tag(endpoint), _tag(endpoint).partition("/")[0]}


def _supports(endpoint: dict, fields: Sequence[str]) -> bool:
    return set(fields) <= set(endpoint.get("supported_parameters") or ())


def _quantization(endpoint: dict) -> str:
    return str(endpoint.get("quantization") or "unknown")


def _price(endpoint: dict) -> tuple[float, float, float]:
    """USD per prompt token, completion token and request; infinite where it is not told, as -1 of routes that choose a model."""
    pricing = endpoint.get("pricing")
    try:
        told = [float(pricing[name]) for name in ("prompt", "completion")] + [float(pricing.get("request") or 0)]
    except (KeyError, TypeError, ValueError):
        told = [-1.0]
    return (inf, inf, inf) if min(told) < 0 else tuple(told)


def _room(endpoint: dict) -> int:
    """The longest reply in tokens; a prompt needs at least one of the context's."""
    context, cap = (n if isinstance(n := endpoint.get(name), int) else 0 for name in ("context_length", "max_completion_tokens"))
    return min(context - 1, cap) if cap and context else cap or max(context - 1, 0)


def _line(endpoint: dict) -> str:
    prompt, completion, _ = _price(endpoint)
    context = f"{endpoint.get('context_length') or '?'} tokens"
    price = "price unknown" if prompt == inf else f"${prompt * 1e6:.2f}/${completion * 1e6:.2f} per million"
    return f"{_tag(endpoint)} {_quantization(endpoint)} {price}, {context}"
