"""A minimal wandb server, sufficient for one run: python -m tests.faults.fake_wandb <port>."""

import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

RUN = {
    "id": "run",
    "name": "run",
    "displayName": "run",
    "config": "{}",
    "historyLineCount": 0,
    "project": {"id": "project", "name": "diffusion-lab", "entity": {"id": "entity", "name": "me"}},
}
ANSWER = {
    "viewer": {"id": "viewer", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}},
    "model": {"bucket": None},
    "upsertBucket": {"bucket": RUN, "inserted": True},
    "createRunFiles": {"runID": "run", "uploadHeaders": [], "files": []},
}


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        content = {"data": ANSWER} if self.path.endswith("/graphql") else {}
        answer = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *arguments: object) -> None:
        print(self.path, flush=True)


if __name__ == "__main__":
    ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
