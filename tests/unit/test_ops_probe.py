import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from openai import OpenAI

from corral.errors import CorralError
from corral.verbs.demo.probe import client, embed, stream_chat

Answer = tuple[int, list[bytes]]


def piece(text: str, field: str = "content") -> bytes:
    data = {"id": "1", "object": "chat.completion.chunk", "created": 1, "model": "m"}
    choice = {"index": 0, "delta": {field: text}}
    return b"data: " + json.dumps({**data, "choices": [choice]}).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"
BUSY: Answer = (503, [b'{"error": {"message": "no server yet"}}'])
VECTOR = json.dumps(
    {
        "object": "list",
        "model": "m",
        "data": [{"object": "embedding", "index": 0, "embedding": [0.5, 0.25]}],
        "usage": {"prompt_tokens": 1, "total_tokens": 1},
    }
).encode()


@contextmanager
def gateway(*answers: Answer) -> Iterator[str]:
    """The base URL of a server that gives these answers in turn, the last one again and again."""
    left = list(answers)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            status, parts = left.pop(0) if len(left) > 1 else left[0]
            self.send_response(status)
            self.send_header(
                "Content-Type", "text/event-stream" if parts[0].startswith(b"data") else "application/json"
            )
            self.send_header("Content-Length", str(sum(map(len, parts)) + (10 if parts[-1] == b"" else 0)))
            self.end_headers()
            for part in parts:
                self.wfile.write(part)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/v1"
        finally:
            server.shutdown()
            thread.join()


def chat(base_url: str) -> list[str]:
    with client(base_url, "sk-key") as asked:
        return list(stream_chat(asked, "chat", "Hello"))


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OpenAI, "_calculate_retry_timeout", lambda *_: 0.01)
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")


def test_answer_comes_in_pieces_once_the_balancer_sees_its_servers() -> None:
    with gateway(BUSY, BUSY, (200, [piece("One "), piece("two", "reasoning_content"), DONE])) as base_url:
        assert chat(base_url) == ["One ", "two"]


def test_gateway_that_stays_busy_is_given_up() -> None:
    with gateway(BUSY) as base_url, pytest.raises(CorralError, match=r"the gateway did not answer: .*no server yet"):
        chat(base_url)


def test_wrong_key_is_no_reason_to_wait() -> None:
    answers: tuple[Answer, ...] = ((401, [b'{"error": {"message": "wrong key"}}']), (200, [piece("never"), DONE]))
    with gateway(*answers) as base_url, pytest.raises(CorralError, match="wrong key"):
        chat(base_url)


def test_answer_that_breaks_off_is_a_failure() -> None:
    with gateway((200, [piece("One "), b""])) as base_url, pytest.raises(CorralError, match="did not answer"):
        chat(base_url)


def test_answer_without_a_word_is_a_failure() -> None:
    with gateway((200, [piece(""), DONE])) as base_url, pytest.raises(CorralError, match="without a word"):
        chat(base_url)


def test_embedding_comes_as_numbers() -> None:
    with gateway(BUSY, (200, [VECTOR])) as base_url, client(base_url, "sk-key") as asked:
        assert embed(asked, "embed", "text") == [0.5, 0.25]


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (BUSY, r"the gateway did not answer: .*no server yet"),
        ((200, [VECTOR.replace(b"[0.5, 0.25]", b"[]")]), "into nothing"),
    ],
)
def test_missing_embedding_is_a_failure(answer: Answer, words: str) -> None:
    with gateway(answer) as base_url, pytest.raises(CorralError, match=words), client(base_url, "sk-key") as asked:
        embed(asked, "embed", "text")
