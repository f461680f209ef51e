"""What would be uploaded is shown; what is uploaded reaches an endpoint that speaks the Hub's protocol."""

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from laco_train.errors import InputError, TrainingStopped
from laco_train.export.hub import check_push, planned_push, push


class Endpoint(BaseHTTPRequestHandler):
    """The calls that an upload of small files makes."""

    made: dict[str, Any]
    files: dict[str, bytes]

    def do_POST(self) -> None:
        """Make a repository, accept the card, tell how to send each file, take a commit."""
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/api/repos/create":
            self.made |= json.loads(body)
            self._answer({"url": f"http://{self.headers['Host']}/me/tiny"})
        elif self.path == "/api/validate-yaml":
            self._answer({"errors": [], "warnings": []})
        elif self.path.startswith("/api/models/me/tiny/preupload/"):
            sent = json.loads(body)["files"]
            self._answer(
                {"files": [{"path": one["path"], "uploadMode": "regular", "shouldIgnore": False} for one in sent]}
            )
        elif self.path.startswith("/api/models/me/tiny/commit/"):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self._answer(
                {"success": True, "commitUrl": "https://huggingface.co/me/tiny/commit/0", "commitOid": "0" * 40}
            )
        else:
            self.send_error(404)

    def do_GET(self) -> None:
        """Nothing else is there."""
        self.send_error(404)

    def _answer(self, values: dict[str, Any]) -> None:
        content = json.dumps(values).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        """Print nothing."""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, type[Endpoint]]]:
    """Address and record of an endpoint on this machine, and a token for it."""
    handler = type("Handler", (Endpoint,), {"made": {}, "files": {}})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_none")
    huggingface_hub.close_session()
    yield f"http://127.0.0.1:{server.server_port}", handler
    server.shutdown()
    server.server_close()
    huggingface_hub.close_session()


@pytest.fixture
def export(tmp_path: Path) -> Path:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n# A model\n", encoding="utf-8")
    (tmp_path / "model.safetensors").write_bytes(bytes(range(256)) * 8)
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}", encoding="utf-8")
    return tmp_path


def test_every_file_arrives_in_a_private_repository(export: Path, hub: tuple[str, type[Endpoint]]) -> None:
    address, endpoint = hub
    assert push(export, "me/tiny", address).endswith("/me/tiny")
    assert endpoint.made["name"] == "tiny"
    assert endpoint.made.get("private") is True or endpoint.made.get("visibility") == "private"  # by version
    assert endpoint.files == {
        str(path.relative_to(export)): path.read_bytes() for path in export.rglob("*") if path.is_file()
    }


def test_a_refusal_is_one_line(export: Path, hub: tuple[str, type[Endpoint]]) -> None:
    with pytest.raises(TrainingStopped, match=r"me/other was not uploaded, .* is complete all the same: .*404"):
        push(export, "me/other", hub[0])


def test_offline_is_one_line(export: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_none")
    with pytest.raises(TrainingStopped, match="was not uploaded"):
        push(export, "me/tiny", "http://127.0.0.1:9")


def test_a_dry_run_lists_files_and_card(export: Path) -> None:
    lines = planned_push(export, "me/tiny")
    assert lines == [
        "Dry run, nothing is sent. me/tiny would get 3 files, 0.0 MB:",
        "               31 bytes  README.md",
        "                2 bytes  adapter/adapter_config.json",
        "            2,048 bytes  model.safetensors",
        "Its model card:",
        "  ---",
        "  license: mit",
        "  ---",
        "  # A model",
    ]


def test_what_could_not_work_is_refused_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(InputError, match="--push-to-hub: 'a/b/c' is no id"):
        check_push("a/b/c", dry_run=True)
    with pytest.raises(InputError, match="no token of the Hub; run `hf auth login`"):
        check_push("me/tiny", dry_run=False)
    check_push("me/tiny", dry_run=True)
