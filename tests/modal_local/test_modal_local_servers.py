"""`app.server`: cold answers, readiness and sticky routing."""

import pytest

from modal_local.client import LocalModal
from modal_local.programs import Program

pytest_plugins = ["modal_local.fixtures"]
pytestmark = pytest.mark.usefixtures("needs_modal")

APP = """
import http.server, json, os, subprocess, sys, time, urllib.error, urllib.request
import modal

app = modal.App("servers")
SERVER = '''
import http.server, os
class Answer(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_GET(self):
        body = (os.environ["MODAL_TASK_ID"] + " " + self.path).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *args): pass
http.server.ThreadingHTTPServer(("0.0.0.0", 8000), Answer).serve_forever()
'''

@app.server(port=8000, min_containers=2, max_containers=2, target_concurrency=4,
            unauthenticated=True)
class Engine:
    @modal.enter()
    def start(self):
        self.process = subprocess.Popen([sys.executable, "-c", SERVER])

    @modal.exit()
    def stop(self):
        self.process.kill()

def ask(url, session=None):
    headers = {"Modal-Session-ID": session} if session else {}
    with urllib.request.urlopen(urllib.request.Request(url + "/x?y=1", headers=headers)) as answer:
        return answer.read().decode().split()
"""


def test_sticky_routing(run_program: Program, isolated_modal: LocalModal) -> None:
    sessions, paths, spread, first = run_program(
        APP,
        """
        with app.run():
            url = Engine.get_url()
            first, deadline, seen = None, time.time() + 120, set()
            while len(seen) < 2 and time.time() < deadline:
                try:
                    seen |= {ask(url, str(number))[0] for number in range(16)}
                except urllib.error.HTTPError as error:
                    first = first or error.code
                    time.sleep(0.1)
            sessions = {s: sorted({ask(url, s)[0] for _ in range(5)}) for s in map(str, range(8))}
            paths = {ask(url)[1] for _ in range(3)}
            print(json.dumps([sessions, sorted(paths), len(seen), first]))
        """,
    )
    assert all(len(tasks) == 1 for tasks in sessions.values())
    assert paths == ["/x?y=1"]
    assert spread == 2
    assert first in (None, 503)
