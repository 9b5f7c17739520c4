"""A model behind HTTP: JSON in, JSON out, one user a request.

    GET  /             which model answers, its tasks, and how many users the store holds
    POST /recommend    {"user": "8", "k": 5}
    POST /score        {"history": [{"item": "Heat (1995)", "rating": 5}], "items": ["16", "34"]}
    POST /generate     {"user": "8", "prompt": "Tonight, watch"}
    POST /reload       reads the store again, after ``userllm embed`` has brought it up to date

A user is one of the store ("user"), or comes along ("history", as in a history file; [] is a user of whom nothing is
known). What cannot be answered is told as {"error": ...}, with status 404 for a user who is not in the store and 422
for everything else. Needs the extra ``serve``. The model answers one request at a time: more throughput is more
processes behind a balancer.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.responses import Response

from userllm.data.history_file import parse_history
from userllm.errors import UserError
from userllm.events import UserHistory
from userllm.model import UserLLM
from userllm.saved_model import package_version
from userllm.serving.embed import event_fields
from userllm.serving.record import UserRecord
from userllm.serving.store import UserStore
from userllm.serving.user_side import UserSide

MOST_EVENTS = 10_000
"""Of a history that comes along."""
MOST_BYTES = 1 << 20
"""Of a request; larger ones are refused unread."""
WAITING = 32
"""Requests at work or waiting for the model; more are told to come back. Fewer than the server's threads."""


class Asked(BaseModel):
    """Whose answers: exactly one of the two."""

    model_config = ConfigDict(extra="forbid", strict=True)

    user: str | None = None
    history: Annotated[list[dict[str, Any]], Field(max_length=MOST_EVENTS)] | None = None


class AskedToRecommend(Asked):
    """The k best answers; ``task`` is by default the model's first."""

    k: Annotated[int, Field(ge=1, le=1000)] = 10
    task: str | None = None
    exclude_seen: bool = True


class AskedToScore(Asked):
    """Log-likelihoods of these answers, exact."""

    items: Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1, max_length=1000)]
    task: str | None = None


class AskedToGenerate(Asked):
    """Free text, greedy."""

    prompt: Annotated[str, Field(min_length=1, max_length=20_000)]
    max_new_tokens: Annotated[int, Field(ge=1, le=1024)] = 32
    chat: bool = False


class _NotThere(UserError):
    """No such user."""


@dataclass
class Service:
    """A model, and the users it has been told of. folder: of the store; None without one."""

    model: UserLLM
    folder: Path | None = None

    def __post_init__(self) -> None:
        """Raise UserError where the store is no store, or another model's."""
        self.store: UserStore | None = None
        self._fields = event_fields(UserSide.of(self.model))
        self.reload()

    def reload(self) -> int:
        """Read the store as it is now; returns its number of users."""
        if self.folder is None:
            return 0
        self.store = UserStore.read(self.folder, self.model)
        return len(self.store)

    def about(self) -> dict[str, Any]:
        """What answers here."""
        return {
            "userllm": package_version(),
            "language_model": self.model.reference.name,
            "strategy": self.model.strategy,
            "tasks": {name: task.config.kind for name, task in self.model.tasks.items()},
            "users": 0 if self.store is None else len(self.store),
        }

    def recommend(self, asked: AskedToRecommend) -> dict[str, Any]:
        """See ``UserLLM.recommend``."""
        who, told = self._who(asked)
        task = asked.task or self.model.first_closed_task
        found = self.model.recommend(who, asked.k, task=task, exclude_seen=asked.exclude_seen)
        return {"task": task, **told, "answers": [asdict(answer) for answer in found]}

    def score(self, asked: AskedToScore) -> dict[str, Any]:
        """See ``UserLLM.score``; in the order asked."""
        who, told = self._who(asked)
        task = asked.task or self.model.first_closed_task
        scores = self.model.score(who, asked.items, task=task).tolist()
        answers = [
            {"item": item, "log_likelihood": score} for item, score in zip(asked.items, scores, strict=True)
        ]
        return {"task": task, **told, "answers": answers}

    def generate(self, asked: AskedToGenerate) -> dict[str, Any]:
        """See ``UserLLM.generate``."""
        who, told = self._who(asked)
        text = self.model.generate(asked.prompt, who, max_new_tokens=asked.max_new_tokens, chat=asked.chat)
        return {**told, "text": text}

    def _who(self, asked: Asked) -> tuple[UserHistory | UserRecord, dict[str, Any]]:
        """The user, and what the answer says of them."""
        if (asked.user is None) == (asked.history is None):
            raise UserError('give "user" (of the store) or "history" (a list of events), one of them')
        if asked.history is not None:
            history = parse_history(asked.history, "history", self._fields)
            _, unread = self.model.collator.from_histories([history], self.model.encoder.max_length)
            return history, {"events": len(history), "unread": str(unread) or None}
        store = self.store  # a reload puts another one there
        if store is None or asked.user is None:
            raise UserError('this service has no store of users (--store); give a "history"')
        if asked.user not in store:
            raise _NotThere(f"no user {asked.user!r} in the store; give a history, or `userllm embed` it")
        record = store[asked.user]
        return record, {"events": len(record), "unread": None}


def build_app(service: Service, hosts: Sequence[str] = ("*",)) -> FastAPI:
    """The service as an ASGI application; its schema is at /openapi.json. hosts: the names it answers to."""
    # their pages load scripts from elsewhere
    app = FastAPI(title="userllm", version=package_version(), docs_url=None, redoc_url=None)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))

    @app.exception_handler(UserError)
    def refused(_: Request, error: Exception) -> JSONResponse:
        return JSONResponse({"error": str(error)}, 404 if isinstance(error, _NotThere) else 422)

    @app.exception_handler(RequestValidationError)
    def malformed(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        return JSONResponse({"error": "; ".join(map(_in_words, error.errors()))}, 422)

    @app.exception_handler(HTTPException)
    def no_request(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        return JSONResponse({"error": error.detail}, error.status_code, error.headers)

    at_work = 0

    @app.middleware("http")
    async def some_at_a_time(request: Request, answer: Callable[[Request], Awaitable[Response]]) -> Response:
        nonlocal at_work
        size = request.headers.get("content-length", "0")
        if "transfer-encoding" in request.headers or not size.isdecimal() or int(size) > MOST_BYTES:
            return JSONResponse({"error": f"give at most {MOST_BYTES:,} bytes, and say how many"}, 413)
        if request.method != "POST":
            return await answer(request)
        if at_work >= WAITING:
            return JSONResponse({"error": "busy; come back later"}, 503, {"Retry-After": "1"})
        at_work += 1
        try:
            return await answer(request)
        finally:
            at_work -= 1

    @app.get("/")
    async def about() -> dict[str, Any]:  # no thread: those may all be waiting for the model
        return service.about()

    # not async: each runs in a thread, and the model lets them take turns
    app.post("/recommend")(service.recommend)
    app.post("/score")(service.score)
    app.post("/generate")(service.generate)

    @app.post("/reload")
    def reload() -> dict[str, int]:
        return {"users": service.reload()}

    return app


def _in_words(problem: dict[str, Any]) -> str:
    """A mistake in a request as one line."""
    place: Sequence[Any] = problem["loc"][1:]
    where = ".".join(map(str, place)) if problem["type"] != "json_invalid" else ""
    said = problem.get("ctx", {}).get("error", problem["msg"])
    return f"{where}: {said}" if where else f"the body: {said}"
