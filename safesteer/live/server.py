"""The live lens as a local page: one model process, answers streamed by server-sent events.

    GET  /                    the page; the address must carry the session's token
    GET  /facts               what there is to choose from: layers, strength, S with its votes
    POST /prompt              a prompt read layer by layer
    POST /answers             every new token of every model, as events, until all answers have ended
    POST /direction           the direction as chosen now, as a file to keep
    POST /page                the view as shown now, as a page that works from disk

It binds to 127.0.0.1. Every request but the page's own files needs the token, in a header that other sites
cannot set, and a request that names another origin or host is refused. A view is answered for one reader at
a time, step by step: streams take turns with the model, and one whose reader has gone ends at its next step.
"""

import json
import secrets
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Lock
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import iterate_in_threadpool, run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from safesteer._errors import SafeSteerError, first_line
from safesteer.live.page import lens_page
from safesteer.live.reading import Subject, View, chosen_direction, read_prompt, stream_answers
from safesteer.live.wire import facts, prompt_of, prompt_reading, step, view_of

HOST = "127.0.0.1"
TOKEN_HEADER = "x-safesteer-token"
MAX_BODY = 20_000_000  # bytes of a request: a saved view holds every number that it shows


@dataclass(frozen=True, eq=False)
class Session:
    """What a server shows, and the token that its address carries."""

    subject: Subject
    token: str = field(default_factory=lambda: secrets.token_urlsafe(24))
    lock: Lock = field(default_factory=Lock)  # of the model: hooks are on it while a pass runs


def lens_app(session: Session) -> Starlette:
    """Build the application of the local page.

    Args:
        session: What is shown, and the token without which nothing is answered.
    """
    routes = [
        Route("/", _open(session)),
        Route("/facts", _guarded(session, _facts)),
        Route("/prompt", _guarded(session, _prompt), methods=["POST"]),
        Route("/answers", _guarded(session, _answers), methods=["POST"]),
        Route("/direction", _guarded(session, _direction), methods=["POST"]),
        Route("/page", _guarded(session, _page), methods=["POST"]),
    ]
    return Starlette(routes=routes)


def _is_ours(request: Request) -> bool:
    """Return whether host and origin are those of this server: a name that points here is not."""
    host = request.headers.get("host", "")
    origin = request.headers.get("origin")
    local = host.partition(":")[0] in (HOST, "localhost")
    return local and origin in (None, f"http://{host}")


def _open(session: Session) -> Callable[[Request], Response]:
    """Serve the page to who knows the token."""

    def page(request: Request) -> Response:
        token = request.query_params.get("token", "")
        if not _is_ours(request) or not secrets.compare_digest(token.encode(), session.token.encode()):
            return PlainTextResponse(
                "This page needs the whole address that `safesteer explore` printed, with its token.", 403
            )
        text, policy = lens_page()
        headers = {
            "content-security-policy": policy,
            "cache-control": "no-store",
            "referrer-policy": "no-referrer",
            "x-content-type-options": "nosniff",
            "x-frame-options": "DENY",
        }
        return Response(text, headers=headers, media_type="text/html")

    return page


def _guarded(session: Session, answer: Callable[[Session, Any], Any]) -> Callable[[Request], Any]:
    """Answer who brings the token, in one sentence where a view cannot be shown."""

    async def guarded(request: Request) -> Response:
        token = request.headers.get(TOKEN_HEADER, "")
        if not _is_ours(request) or not secrets.compare_digest(token.encode(), session.token.encode()):
            return JSONResponse({"error": "The token of this address is not the server's."}, 403)
        body = await request.body()
        if len(body) > MAX_BODY:
            return JSONResponse({"error": "The prompt is too long for this page."}, 413)
        try:
            result = await run_in_threadpool(answer, session, json.loads(body) if body else {})
        except SafeSteerError as error:
            return JSONResponse({"error": str(error)}, 400)
        except (ValueError, TypeError, KeyError):
            return JSONResponse({"error": "The request is not a view."}, 400)
        return result if isinstance(result, Response) else JSONResponse(result)

    return guarded


def _facts(session: Session, _: dict[str, Any]) -> dict[str, Any]:
    return facts(session.subject)


def _prompt(session: Session, body: dict[str, Any]) -> dict[str, Any]:
    prompt = prompt_of(body["prompt"])
    with session.lock:
        return prompt_reading(read_prompt(session.subject, prompt))


def _answers(session: Session, body: dict[str, Any]) -> Response:
    view = view_of(session.subject, body)
    return StreamingResponse(_events(session, view), media_type="text/event-stream")


async def _events(session: Session, view: View) -> AsyncIterator[str]:
    """Yield the steps of a view; the model is held for one step at a time."""
    steps = stream_answers(session.subject, view)

    def next_step() -> dict[str, Any] | None:
        with session.lock:
            tokens = next(steps, None)
        return None if tokens is None else step(tokens)

    def all_steps() -> Any:
        try:
            while (shown := next_step()) is not None:
                yield shown
            yield {"end": True}
        except SafeSteerError as error:
            yield {"error": str(error)}
        except Exception as error:  # the stream has begun: nobody but the page can be told
            yield {"error": f"{type(error).__name__}: {error}"}

    async for event in iterate_in_threadpool(all_steps()):
        yield f"data: {json.dumps(event)}\n\n"


def _direction(session: Session, body: dict[str, Any]) -> Response:
    chosen = chosen_direction(session.subject, view_of(session.subject, body))
    with TemporaryDirectory() as folder:
        path = Path(folder) / "direction.safetensors"
        chosen.save(path)
        return Response(path.read_bytes(), media_type="application/octet-stream")


def _page(session: Session, body: dict[str, Any]) -> Response:
    return Response(lens_page(body)[0], media_type="text/html")


def serve(subject: Subject, *, port: int = 8765, say: Callable[[str], object] = print) -> None:
    """Serve the lens on this machine until it is interrupted.

    Args:
        subject: What is shown.
        port: Port of 127.0.0.1; 0 takes a free one.
        say: Is told the address, with its token.

    Raises:
        SafeSteerError: Where the port is in use, or cannot be used.
    """
    session, listening = Session(subject), socket.socket()
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((HOST, port))
    except (OSError, OverflowError) as error:
        raise SafeSteerError(
            f"Port {port} cannot be used ({first_line(error)}): choose another with --port, or 0 for a free"
            " one."
        ) from error
    options = {"log_level": "warning", "timeout_graceful_shutdown": 1, "access_log": False}
    server = uvicorn.Server(uvicorn.Config(lens_app(session), **options))
    say(f"http://{HOST}:{listening.getsockname()[1]}/?token={session.token}")
    with suppress(KeyboardInterrupt):
        server.run(sockets=[listening])
