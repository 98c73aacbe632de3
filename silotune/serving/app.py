"""The routes of a served model, behind a guard that asks for a token and bounds what is sent."""

from __future__ import annotations

import asyncio
import hmac
import json
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import Body, Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from fastapi.security import HTTPBearer
from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from silotune.api.model import Model
from silotune.errors import ChatRefused, ColumnMissing, DataError, SilotuneError
from silotune.models.prediction import Prediction
from silotune.models.sampling import Sampling, drawing
from silotune.models.task import LoadedModel
from silotune.plan.plan import Plan
from silotune.protocol.asgi import headers_of, host_named, replay, whole_body
from silotune.serving.batching import Batcher
from silotune.serving.errors import ServerBusy, ServingRefused
from silotune.serving.wire import (
    ChatReply,
    ChatRequest,
    Choice,
    Fault,
    Health,
    Message,
    ModelCard,
    ModelList,
    Predicted,
    PredictReply,
    Problem,
    predict_request,
)
from silotune.version import __version__

_OPEN = "/health"
_TOKEN = [Depends(HTTPBearer(auto_error=False))]  # for the document; the guard asks for it
_PROBLEMS: dict[int | str, dict[str, Any]] = {
    status: {"model": Problem, "description": description}
    for status, description in {
        401: "No token, or another one.",
        400: "The model was not taught such examples or such a conversation.",
        413: "The body is too large.",
        422: "The body is not of the schema.",
        500: "The model failed.",
        503: "As many examples wait as may wait, or the deadline was over. See Retry-After.",
    }.items()
}


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a server takes on.

    Attributes
    ----------
    batch : int
        Examples that are computed together.
    waiting : int
        Examples that may wait.
    seconds : float
        How long a request may take, waiting included.
    body : int
        Bytes of a request's body.
    """

    batch: int = 32
    waiting: int = 512
    seconds: float = 30.0
    body: int = 4 << 20


class Counted:
    """What Prometheus is told: numbers only."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "silotune_serving_requests",
            "Requests answered, by route and status",
            ["route", "status"],
            registry=self.registry,
        )
        self.seconds = Histogram(
            "silotune_serving_request_seconds",
            "Time to the answer, by route",
            ["route"],
            registry=self.registry,
        )
        self.batches = Histogram(
            "silotune_serving_batch_examples",
            "Examples computed together",
            buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256),
            registry=self.registry,
        )
        self.computing = Counter(
            "silotune_serving_computing_seconds", "Time spent computing", registry=self.registry
        )
        self.waiting = Gauge(
            "silotune_serving_waiting_examples", "Examples that wait", registry=self.registry
        )

    def refused(self, status: int) -> None:
        """Note a request that the guard refused."""
        self.requests.labels("none", str(status)).inc()

    def batch(self, examples: int, seconds: float) -> None:
        """Note a batch."""
        self.batches.observe(examples)
        self.computing.inc(seconds)


class TokenGuard:
    """ASGI middleware: who has no token, sends too much or asks under another name gets no further.

    Parameters
    ----------
    app : ASGI application
    token : str
        What ``Authorization: Bearer`` must say; compared in constant time.
    body : int
        Bytes of a body.
    hosts : frozenset of str or None
        Names under which may be asked, against DNS rebinding; None for any.
    refused : callable
        Told the status of each refusal.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        token: str,
        body: int,
        hosts: frozenset[str] | None,
        refused: Callable[[int], None],
    ) -> None:
        self._app, self._token, self._body, self._hosts = app, token.encode(), body, hosts
        self._refused = refused

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        refusal = self._refusal(scope["path"], headers_of(scope))
        body = None if refusal is not None else await whole_body(receive, most=self._body)
        if body is None:
            refusal = refusal or _problem(413, f"more than {self._body} bytes")
            self._refused(refusal.status_code)
            await refusal(scope, receive, send)
            return
        await self._app(scope, replay(body, receive), send)

    def _refusal(self, path: str, headers: Mapping[str, str]) -> JSONResponse | None:
        if self._hosts is not None and host_named(headers.get("host", "")) not in self._hosts:
            return _problem(421, "this server is not called that")
        scheme, _, token = headers.get("authorization", "").partition(" ")
        fits = hmac.compare_digest(token.encode("latin-1").strip(), self._token)
        if path != _OPEN and not (fits and scheme.lower() == "bearer"):
            refusal = _problem(401, "this needs the token: Authorization: Bearer TOKEN")
            refusal.headers["www-authenticate"] = "Bearer"
            return refusal
        return None


def _problem(
    status: int, message: str, code: str = SilotuneError.code, *, param: str | None = None
) -> JSONResponse:
    kind: Any = "invalid_request_error" if status < 500 else "server_error"
    fault = Fault(message=message, type=kind, param=param, code=code)
    return JSONResponse(Problem(error=fault).model_dump(), status)


def require_served(plan: Plan) -> None:
    """Refuse a model whose examples are no texts. Raises `ServingRefused`."""
    if plan.task.sees:
        raise ServingRefused(
            f"{plan.model.task} reads files, and a request would say which of this machine's",
            remedy="Have files of records answered: silotune predict RUN --data FILE.",
        )


def build(
    model: Model, *, token: str, limits: Limits | None = None, hosts: frozenset[str] | None = None
) -> TokenGuard:
    """The whole application of a model.

    Parameters
    ----------
    model : Model
        What is asked.
    token : str
        What every request but ``/health`` must show.
    limits : Limits, optional
        What the server takes on.
    hosts : frozenset of str, optional
        Names under which it may be asked; any by default.

    Raises
    ------
    ServingRefused
        The model reads files.
    """
    require_served(model.plan)
    limits = limits or Limits()
    counted = Counted()
    app = routes(model, limits, counted)
    return TokenGuard(app, token=token, body=limits.body, hosts=hosts, refused=counted.refused)


def routes(model: Model, limits: Limits, counted: Counted) -> FastAPI:
    """The routes, without the guard before them."""
    batcher = Batcher[AskedExample](
        lambda asked: _answers(model.loaded, asked),
        most=limits.batch,
        waiting=limits.waiting,
        seconds=limits.seconds,
        computed=counted.batch,
    )
    counted.waiting.set_function(lambda: batcher.waiting)

    @asynccontextmanager
    async def living(app: FastAPI) -> AsyncIterator[None]:
        del app
        yield
        await asyncio.to_thread(batcher.close)

    app = FastAPI(
        title=f"silotune: {model.plan.plan.name}",
        version=__version__,
        lifespan=living,
        docs_url=None,  # its page would fetch scripts from elsewhere
        redoc_url=None,
    )
    served = _Answerer(model, batcher)
    _answer_failures(app, model.roles)
    _count(app, counted)
    _describe(app, served, counted)
    _classify(app, served)
    if model.plan.task.generates:
        _chat(app, served)
    return app


@dataclass(frozen=True, kw_only=True)
class AskedExample:
    """An example, and the request that may say how its answer is drawn."""

    example: Mapping[str, str]
    request: ChatRequest | None = None


def _answers(model: LoadedModel, asked: Sequence[AskedExample]) -> list[Prediction]:
    """Predictions in order; what is drawn alike is computed together.

    All that a request has to do with the model is done here, on the one thread of the batches: a
    tokenizer has state, by which control tokens in a text are text, and is not for two at a time.
    """
    found: dict[int, Prediction] = {}
    drawn = [
        None if one.request is None else sampling_of(one.request, one.example, model)
        for one in asked
    ]
    for sampling in dict.fromkeys(drawn):
        alike = [row for row, own in enumerate(drawn) if own == sampling]
        one = model if sampling is None else drawing(model, sampling)
        made = one.task.predict(one, [asked[row].example for row in alike])
        found |= zip(alike, made, strict=True)
    return [found[row] for row in range(len(asked))]


class _Answerer:
    """A model behind its queue."""

    def __init__(self, model: Model, batcher: Batcher[AskedExample]) -> None:
        self.model, self.batcher, self.plan = model, batcher, model.plan
        self.name = self.plan.plan.name

    async def ask(self, asked: Sequence[AskedExample]) -> list[Prediction]:
        """Predictions, or `ServerBusy` when the deadline is over."""
        answer = self.batcher.ask(asked)
        try:
            return await asyncio.wait_for(asyncio.wrap_future(answer), self.batcher.seconds)
        except TimeoutError:
            raise ServerBusy("its deadline is over") from None

    def card(self) -> ModelCard:
        """What is served."""
        return ModelCard(
            id=self.name,
            task=self.plan.model.task,
            reads=list(self.model.roles),
            labels=list(self.plan.model.labels),
            plan_sha256=self.plan.sha256,
        )


def _answer_failures(app: FastAPI, roles: Sequence[str]) -> None:
    """Codes and sentences of our own: no text of a request is in an answer, nor in a log."""
    keys = _KEYS | {*roles}

    @app.exception_handler(SilotuneError)
    async def known(request: Request, error: SilotuneError) -> Response:
        del request
        if isinstance(error, ServerBusy):
            refusal = _problem(503, error.detail, error.code)
            refusal.headers["retry-after"] = "1"
            return refusal
        status = 400 if isinstance(error, DataError | ChatRefused) else 500
        return _problem(status, error.detail, error.code)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        del request
        found = error.errors()[0]  # its "input" is what was sent
        place = ".".join(str(part) for part in found["loc"] if part in keys or type(part) is int)
        what = "not JSON" if found["type"] == "json_invalid" else found["msg"]
        return _problem(422, f"{place}: {what}", param=place)

    @app.exception_handler(HTTPException)
    async def other(request: Request, error: HTTPException) -> Response:
        del request
        refusal = _problem(error.status_code, str(error.detail))
        refusal.headers.update(error.headers or {})
        return refusal


_KEYS = {"body", "examples", *ChatRequest.model_fields, *Message.model_fields}


def _count(app: FastAPI, counted: Counted) -> None:
    @app.middleware("http")
    async def count(request: Request, call_next: Callable[..., Awaitable[Response]]) -> Response:
        started = time.monotonic()
        try:
            response = await call_next(request)
        except Exception as error:  # its message may quote a text: nobody is told, and no log
            response = _problem(500, type(error).__name__)
        found = request.scope.get("route")
        path = getattr(found, "path", "none")  # never the path as it was asked for
        counted.requests.labels(path, str(response.status_code)).inc()
        counted.seconds.labels(path).observe(time.monotonic() - started)
        return response


def _describe(app: FastAPI, served: _Answerer, counted: Counted) -> None:
    guarded: dict[str, Any] = {"responses": _pick(401), "dependencies": _TOKEN}

    @app.get("/health", summary="Whether the server is up; needs no token")
    async def health() -> Health:
        return Health(waiting=served.batcher.waiting)

    @app.get("/metrics", summary="For Prometheus", response_class=PlainTextResponse, **guarded)
    async def metrics() -> Response:
        return Response(generate_latest(counted.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/v1/models", summary="What is served, and what it reads", **guarded)
    async def models() -> ModelList:
        return ModelList(data=[served.card()])


def _pick(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: _PROBLEMS[status] for status in statuses}


_ASKED = _pick(400, 401, 413, 422, 500, 503)


def _classify(app: FastAPI, served: _Answerer) -> None:
    async def predict(asked: Any) -> PredictReply:
        rows = [AskedExample(example=example.model_dump()) for example in asked.examples]
        found = await served.ask(rows)
        return PredictReply(
            model=served.name,
            predictions=[
                Predicted(output=one.output, probabilities=dict(one.probabilities)) for one in found
            ],
        )

    # What an example consists of is the plan's to say, and the document says it.
    predict.__annotations__["asked"] = predict_request(served.model.roles)
    app.post(
        "/v1/predict",
        summary="One prediction an example",
        responses=_ASKED,
        dependencies=_TOKEN,
    )(predict)


def _chat(app: FastAPI, served: _Answerer) -> None:
    streamed: dict[int | str, dict[str, Any]] = {
        200: {"content": {"text/event-stream": {}}, "model": ChatReply}
    }

    @app.post(
        "/v1/chat/completions",
        summary="As OpenAI's API: a conversation in, the model's turn out",
        response_model=None,
        responses={**_ASKED, **streamed},
        dependencies=_TOKEN,
    )
    async def complete(asked: Annotated[ChatRequest, Body()]) -> Response:
        example = conversation(asked.messages, served.plan)
        (answer,) = await served.ask([AskedExample(example=example, request=asked)])
        reply = ChatReply(
            id=f"chatcmpl-{uuid.uuid4().hex}",
            created=int(time.time()),
            model=served.name,
            choices=[Choice(message={"role": "assistant", "content": str(answer.output)})],
        )
        if not asked.stream:
            return JSONResponse(reply.model_dump())
        return StreamingResponse(_events(reply), media_type="text/event-stream")


def sampling_of(
    asked: ChatRequest, example: Mapping[str, str], model: LoadedModel
) -> Sampling | None:
    """How an answer is to be drawn, within what the plan leaves; None if nothing is said."""
    lengths = [n for n in (asked.max_tokens, asked.max_completion_tokens) if n is not None]
    if lengths:
        task: Any = model.task
        left = model.plan.data.max_length - len(task.prompts(model, [example])[0])
        lengths.append(max(1, left))
    said = {
        "temperature": asked.temperature,
        "top_p": asked.top_p,
        "max_new_tokens": min(lengths, default=None),
        "seed": asked.seed,
    }
    said = {key: value for key, value in said.items() if value is not None}
    return Sampling(**said) if said else None  # type: ignore[arg-type]


def conversation(messages: Sequence[Message], plan: Plan) -> dict[str, str]:
    """A conversation as the model was taught: its messages, or a prompt that is one message.

    Raises
    ------
    ColumnMissing
        The model was taught single prompts, and this is no such one.
    """
    if messages[-1].role != "user":
        raise ColumnMissing("the last message is not the user's", remedy="End with the user's.")
    if plan.model.chat is not None:
        turns = [{"role": one.role, "content": one.content} for one in messages]
        return {"messages": json.dumps(turns, ensure_ascii=False, separators=(",", ":"))}
    if len(messages) != 1:
        raise ColumnMissing("the model was taught single prompts", remedy="Send one message.")
    return {plan.task.reads[0]: messages[0].content}


async def _events(reply: ChatReply) -> AsyncIterator[str]:
    """The answer as a stream of one chunk: it is made together with others', and comes as a whole."""
    head = {"id": reply.id, "object": "chat.completion.chunk", "created": reply.created}
    head |= {"model": reply.model}
    message = reply.choices[0].message
    for delta, reason in ((message, None), ({}, "stop")):
        choice = {"index": 0, "delta": delta, "finish_reason": reason}
        yield f"data: {json.dumps({**head, 'choices': [choice]})}\n\n"
    yield "data: [DONE]\n\n"
