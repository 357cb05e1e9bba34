"""Ask a model about images: the policy, another local LLaVA, or any server that speaks OpenAI's protocol.

Judges (judges/compare.py) and writers (pairs/corrupt.py) see one interface, a `Model`: a name that goes into
the records, and a function from requests to replies in the same order. A reply has a text or a problem,
never both: a text that was cut at the token limit is no answer. What a reasoning model thinks before it answers
(up to its last </think>, whether the text opens with <think> or the server's template did) is not part of the
text; nor is `reasoning_content`, where servers that know the model put it.

    local_model    a LLaVA in memory; greedy, so the same requests give the same replies
    server_model   POST {url}/chat/completions; the image goes along as a base64 data URL

A server is asked again, after 1, 2, 4, ... seconds times a random factor in [.5, 1.5], on time-outs, broken
connections, answers that are no chat completion, and status 408, 409, 429 and 5xx; `Retry-After` is obeyed.
Status 401, 403, 404 and redirects stop the run, as every request would meet them. Other refusals concern
one request and become its problem. A try ends after `timeout` seconds, even if the server goes on sending, and
a reply has at most `max_bytes`. Every reply is kept on disk under the SHA-256 of its request, so a run
that is repeated or goes on after an interruption pays for nothing twice. The key comes from an environment
variable, is sent to that server only, written nowhere and masked where a server repeats it.
"""

import contextlib
import hashlib
import http.client
import json
import os
import random
import re
import socket
import threading
import time
import unicodedata
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from email.message import Message
from pathlib import Path
from typing import NamedTuple

from common import BadInput, parse_json, read_json, write_text
from data.images import IMAGE, cut_at_images, data_url, open_image, references
from data.processor import Processor
from model.generate import generate
from model.llava import Llava

RETRY = (408, 409, 429)  # and 5xx
STOP = (401, 403, 404)  # and 3xx
CUT = "cut at the token limit"
THOUGHTS = re.compile(r".*(?:</(?:seed:)?think(?:ing)?>|\[/think\]|◁/think▷)", re.S | re.I)
THINKS = re.compile(r"(?:<(?:seed:)?think(?:ing)?>|\[think\]|◁think▷)", re.I)


class Request(NamedTuple):
    """One question."""

    image: str | list[str] | None  # image reference, or several, None for a question about texts alone
    text: str


class Reply(NamedTuple):
    """Its answer: `text`, or "" and why there is none."""

    text: str
    problem: str = ""


def read_reply(text: str) -> Reply:
    """What a model wrote -> its answer, without the thoughts before it.

    A problem instead: thoughts that lead to no answer, nothing at all, control characters, half a surrogate pair.
    """
    answer = THOUGHTS.sub("", text, count=1).strip()
    if THINKS.match(answer) or not answer:
        return Reply("", "thoughts without an answer" if THOUGHTS.match(text) or answer else "empty answer")
    if any(unicodedata.category(c) in ("Cc", "Cs") and c not in "\n\r\t" for c in answer):
        return Reply("", "characters that no text has")
    return Reply(answer)


class Model(NamedTuple):
    """Something to ask."""

    name: str  # what records say about who answered
    ask: Callable[[list[Request]], list[Reply]]


def local_model(model: Llava, processor: Processor, name: str, *, batch_size: int = 64,
                max_new_tokens: int = 256, root: Path | None = None) -> Model:
    """A LLaVA in memory, decoding greedily. Relative paths of images start at `root`."""

    def ask(requests: list[Request]) -> list[Reply]:
        replies: list[Reply] = []
        for start in range(0, len(requests), batch_size):
            replies += _answer(model, processor, requests[start : start + batch_size], max_new_tokens, root)
        return replies

    return Model(name, ask)


def _answer(model: Llava, processor: Processor, batch: list[Request], limit: int,
            root: Path | None) -> list[Reply]:
    views, shows = processor.show([request.image for request in batch], root)
    prompts = [_prompt(processor, request.text, [len(views[i].rows) for i in shown], limit)
               for request, shown in zip(batch, shows)]
    rows = [row for row, prompt in enumerate(prompts) if not isinstance(prompt, Reply)]
    out = generate(model, views, [prompts[row] for row in rows], eos_id=processor.eos_id,
                   shows=[shows[row] for row in rows], max_new_tokens=limit,
                   questions=[processor.question(batch[row].text) for row in rows]) if rows else []
    replies = list(prompts)  # why it was not asked, or the answer
    for row, (ids,) in zip(rows, out):
        replies[row] = Reply("", CUT) if len(ids) == limit else read_reply(processor.decode(ids))
    return replies


def _prompt(processor: Processor, text: str, counts: list[int], limit: int) -> list[int] | Reply:
    """The prompt's ids, or why it cannot be asked."""
    try:
        ids = processor.prompt(text, counts)
    except BadInput:
        return Reply("", "a special token in the question")
    return ids if len(ids) + limit <= processor.window else Reply("", "question longer than the model's window")


@dataclass(frozen=True)
class Server:
    """How to reach a model and how it is asked; every default is reconstructed."""

    url: str  # base, e.g. http://127.0.0.1:8000/v1
    model: str
    key_variable: str = "OPENAI_API_KEY"  # environment variable of the key; unset: no key is sent
    temperature: float = 0.0
    max_tokens: int = 512
    seed: int = 0  # of the server's sampling, where it has one
    images: bool = True  # False: a language model that sees no images
    side: int = 1024  # longest side of an image in pixels; larger ones are made smaller
    timeout: float = 120.0  # seconds for one try, from the connection to the last byte
    max_bytes: int = 2**24  # of one reply
    tries: int = 6
    wait: float = 1.0  # seconds before the second try
    workers: int = 8  # requests at a time


def server_model(server: Server, *, cache: Path, root: Path | None = None) -> Model:
    """A model that an OpenAI-compatible server runs; `cache` may be shared by runs and servers.

    Its `ask` raises ConnectionError when the server stays unreachable after all tries or refuses every request;
    what was answered before is in the cache.
    """

    def ask(requests: list[Request]) -> list[Reply]:
        with ThreadPoolExecutor(server.workers) as pool:  # `map` cancels what has not begun when one fails
            return list(pool.map(lambda request: _cached(server, request, cache, root), requests))

    return Model(server.model, ask)


def _cached(server: Server, request: Request, cache: Path, root: Path | None) -> Reply:
    body = _body(server, request, root)
    path = _place(cache, [server.url, body])
    if not path.exists():
        _keep(path, server.model, request, _post(server, body))
    return _kept(path)


def kept_model(model: Model, cache: Path) -> Model:
    """A local model whose replies are kept on disk like a server's."""

    def ask(requests: list[Request]) -> list[Reply]:
        paths = {request: _place(cache, [model.name, *request]) for request in requests}
        new = [request for request, path in paths.items() if not path.exists()]
        for request, reply in zip(new, model.ask(new), strict=True):
            _keep(paths[request], model.name, request, reply)
        return [_kept(paths[request]) for request in requests]

    return Model(model.name, ask)


def _place(cache: Path, asked: list) -> Path:
    key = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()
    return cache / key[:2] / f"{key}.json"


def _keep(path: Path, name: str, request: Request, reply: Reply) -> None:
    row = {"model": name, "image": request.image, "text": request.text, "reply": reply._asdict()}
    write_text(path, json.dumps(row, ensure_ascii=False))


def _kept(path: Path) -> Reply:
    """A reply of an earlier run. BadInput naming the file when it holds none."""
    reply = read_json(path).get("reply")
    if not isinstance(reply, dict) or not all(isinstance(reply.get(key), str) for key in ("text", "problem")):
        raise BadInput(f"{path}: holds no reply; delete it")
    return Reply("", reply["problem"]) if reply["problem"] else read_reply(reply["text"])


def _body(server: Server, request: Request, root: Path | None) -> dict:
    images = references(request.image) if server.images and request.image is not None else []
    shown, parts = (open_image(reference, root) for reference in images), []
    for part in cut_at_images(request.text, len(images)):
        if part == IMAGE:
            image = next(shown)
            image.thumbnail((server.side, server.side))
            parts.append({"type": "image_url", "image_url": {"url": data_url(image, "PNG")}})
        else:
            parts.append({"type": "text", "text": part})
    return {"model": server.model, "messages": [{"role": "user", "content": parts}],
            "temperature": server.temperature, "max_tokens": server.max_tokens, "seed": server.seed}


class _AsItIs(urllib.request.HTTPErrorProcessor):
    def http_response(self, request, response):  # following a redirect, urllib would send the key along
        return response

    https_response = http_response


class _Watched(urllib.request.HTTPHandler, urllib.request.HTTPSHandler):
    """Remembers the socket of a request, so that it can be broken off from outside."""

    sock: socket.socket | None = None
    late = False

    def do_open(self, kind, request, **options):
        def connection(host, **more):
            made = kind(host, **more)
            connect = made.connect

            def remember() -> None:
                connect()
                self.sock = made.sock  # urllib takes it out of the connection when the headers are there
                if self.late:
                    self.break_off()

            made.connect = remember
            return made

        return super().do_open(connection, request, **options)

    def break_off(self) -> None:
        """Whoever reads sees the end of the connection."""
        self.late = True
        if self.sock is not None:
            with contextlib.suppress(OSError):  # it is closed already
                self.sock.shutdown(socket.SHUT_RDWR)


def _exchange(request: urllib.request.Request, seconds: float, most: int) -> tuple[int, Message, bytes]:
    """(status, headers, at most `most` bytes). The time-out of sockets counts from byte to byte, so a server that
    drips would never end; here it is of the whole. Raises OSError (TimeoutError), HTTPException or BadInput."""
    watched = _Watched()
    timer = threading.Timer(seconds, watched.break_off)
    timer.daemon = True
    timer.start()
    try:
        with urllib.request.build_opener(_AsItIs, watched).open(request, timeout=seconds) as response:
            found = response.status, response.headers, response.read(most)
    except (OSError, http.client.HTTPException, ValueError):
        if not watched.late:
            raise
    finally:
        timer.cancel()
    if watched.late:
        raise TimeoutError(f"not done after {seconds:g} s")
    return found


def _post(server: Server, body: dict) -> Reply:
    """What the server says, or why it refuses this request. ConnectionError when asking again is no use."""
    address = f"{server.url.rstrip('/')}/chat/completions"
    key = os.environ.get(server.key_variable, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise ConnectionError(f"{server.key_variable} holds characters that no key has")
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    request = urllib.request.Request(address, json.dumps(body).encode(), headers)
    for attempt in range(server.tries):
        wait = 0.0
        try:
            status, headers, data = _exchange(request, server.timeout, server.max_bytes + 1)
        except (OSError, http.client.HTTPException, ValueError) as error:  # time-outs are OSErrors
            problem = f"{type(error).__name__}: {error}"
        else:
            problem = f"status {status}: {data[:300].decode('utf-8', 'replace')}"
            if status < 300:
                reply, problem = _completion(data, server.max_bytes)
                if reply is not None:
                    return reply
            if status in STOP or 300 <= status < 400:
                hint = f" (is {server.key_variable} set?)" if status in (401, 403) else ""
                raise ConnectionError(f"{address}: {_presentable(problem, key)}{hint}")
            if status >= 400 and status not in RETRY and status < 500:
                return Reply("", f"refused by the server, status {status}")
            after = headers.get("Retry-After", "").strip()
            wait = float(after) if after.isdecimal() else 0.0
        if attempt + 1 < server.tries:  # at random times, so that many do not come back at once
            time.sleep(min(max(wait, server.wait * 2**attempt * random.uniform(0.5, 1.5)), 120))
    problem = _presentable(problem, key)
    raise ConnectionError(f"{address}: no answer after {server.tries} tries; the last one: {problem}")


def _completion(data: bytes, most: int) -> tuple[Reply | None, str]:
    """(the reply, "") or (None, what is wrong with it)"""
    if len(data) > most:
        return None, f"the reply is longer than {most} bytes"
    try:
        choice = parse_json(data)["choices"][0]
        content = choice["message"]["content"]
    except BadInput as error:
        return None, f"the reply is {error}"
    except (KeyError, IndexError, TypeError):
        return None, "the reply is no chat completion"
    if isinstance(content, list):  # parts: thoughts may be of a type of their own
        texts = (part.get("text") for part in content if isinstance(part, dict) and part.get("type") == "text")
        content = "".join(text for text in texts if isinstance(text, str))
    if not isinstance(content, str | None):
        return None, "the reply is no chat completion"
    return Reply("", CUT) if choice.get("finish_reason") == "length" else read_reply(content or ""), ""


def _presentable(text: str, key: str) -> str:
    """A line for the screen: what a server says may hold the key, line breaks and codes that move the cursor."""
    masked = text.replace(key, "***") if key else text
    return "".join(c if c.isprintable() else " " for c in masked)
