"""An LLM's endpoint that answers from a list."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from af2_ray.llm.client import Endpoint


class Scripted:
    """An endpoint that answers from a list, and keeps what it was asked."""

    def __init__(self) -> None:
        self.answers: list[Any] = []
        self.asked: list[dict[str, Any]] = []
        scripted = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                scripted.asked.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
                answer = scripted.answers.pop(0)
                status = answer if isinstance(answer, int) else 200
                message = {"role": "assistant", "content": json.dumps(answer)}
                choice = {"index": 0, "finish_reason": "stop", "message": message}
                usage = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
                body = {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}
                data = json.dumps(body | {"usage": usage}).encode()
                self.send_response(status)
                self.send_header("content-type", "application/json")
                self.send_header("retry-after-ms", "1")
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    @property
    def endpoint(self) -> Endpoint:
        url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"
        return Endpoint("m", url, price_prompt=2.0, price_completion=10.0, max_retries=2)
