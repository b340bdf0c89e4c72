"""Which folder a run reads, and what it says of a file that is missing or damaged.

The hub is a small server of this machine that speaks as much of its protocol as a download needs;
the client is huggingface_hub's own, in processes of their own, whose addresses come from the
environment.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from g2rpo.errors import ConfigurationError
from g2rpo.flux import files

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CHILD = """
import json, sys
from g2rpo.errors import ConfigurationError
from g2rpo.flux.files import resolve_folder
for path, weights in json.loads(sys.argv[1]):
    try:
        print(json.dumps(["folder", str(resolve_folder(path, weights))]))
    except ConfigurationError as error:
        print(json.dumps(["error", str(error)]))
"""


@pytest.fixture
def folder(miniature: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(miniature, tmp_path / "pipeline"))


def resolve(cache: Path, *requests: tuple[str, bool], **environment: str) -> list[tuple[str, str]]:
    """What resolve_folder gives for each request, in a process with this hub."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    environment = {
        "HF_HUB_CACHE": str(cache), "HF_HOME": str(cache.parent / "home"),
        "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "NO_PROXY": "*",
        "HF_HUB_DISABLE_TELEMETRY": "1", **environment,
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", CHILD, json.dumps(requests)],
        env={**clean, **environment}, text=True, capture_output=True, check=True, timeout=120,
    )  # fmt: skip
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()]


@pytest.fixture
def hub(miniature: Path) -> Iterator[tuple[str, list[str]]]:
    """Address of a hub with the repositories org/flux (the miniature, and a large file beside it),
    org/gated and org/refused; and the files it was asked for."""
    large = {"flux1-dev.safetensors": b"never to be fetched", "text_encoder/model.bin": b"nor this"}
    content = {
        path.relative_to(miniature).as_posix(): path.read_bytes()
        for path in miniature.rglob("*")
        if path.is_file()
    } | large
    asked: list[str] = []

    class Hub(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self, status: int, body: bytes = b"{}", **headers: str) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("X-Repo-Commit", COMMIT)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def do_GET(self) -> None:
            path = self.path.split("?")[0]
            if path.startswith(("/api/models/org/flux/revision", "/api/models/org/gated/revision",
                                "/api/models/org/refused/revision")):  # fmt: skip
                siblings = [{"rfilename": name} for name in content]
                info = {"id": "org/flux", "sha": COMMIT, "siblings": siblings}
                self.answer(200, json.dumps(info).encode(), Content_Type="application/json")
            elif "/tree/" in path:
                listing = [
                    {"type": "file", "path": name, "size": len(data), "oid": COMMIT}
                    for name, data in content.items()
                ]
                self.answer(200, json.dumps(listing).encode(), Content_Type="application/json")
            elif path.startswith("/org/gated/resolve"):
                self.answer(401, X_Error_Code="GatedRepo", X_Error_Message="Access is restricted")
            elif path.startswith("/org/refused/resolve"):
                self.answer(403, X_Error_Message="enable access to gated repositories in the token")
            elif path.startswith("/org/flux/resolve"):
                name = path.split(f"/{COMMIT}/")[1]
                asked.append(name)
                self.answer(200, content[name], ETag=f'"{name.replace("/", "-")}"')
            else:
                self.answer(404, X_Error_Code="RepoNotFound", X_Error_Message="No such repository")

        do_HEAD = do_GET

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    thread.join()
    server.server_close()


def test_from_the_hub(hub, tmp_path):
    address, asked = hub
    cache = tmp_path / "cache"
    (kind, light), gated, refused, nowhere = resolve(
        cache, ("org/flux", False), ("org/gated", True), ("org/refused", True),
        ("org/nowhere", True), HF_ENDPOINT=address,
    )  # fmt: skip
    assert kind == "folder", light
    # The transformer's weights are replaced: they are not fetched, its configuration is.
    assert not [name for name in asked if "transformer/" in name and name.endswith(".safetensors")]
    assert "transformer/config.json" in asked and "vae/diffusion_pytorch_model.safetensors" in asked
    for found in (gated, refused):
        assert found[0] == "error"
        assert "accept its licence at https://huggingface.co/org/" in found[1]
        assert "`hf auth login`" in found[1]
    assert nowhere[0] == "error" and "model.path is 'org/nowhere'" in nowhere[1]
    assert "no such repository" in nowhere[1] and "hf auth login" in nowhere[1]

    whole, again = resolve(cache, ("org/flux", True), ("org/flux", True), HF_ENDPOINT=address)
    assert whole == again == (kind, light)
    assert not {"flux1-dev.safetensors", "text_encoder/model.bin"} & set(asked)
    found = Path(light)
    assert len(files.weight_files(files.component(found, "transformer"))) == 4
    for name in files.COMPONENTS:
        assert files.component(found, name) == found / name
    asked_so_far = len(asked)
    # What is in the cache is not downloaded again, and needs no hub.
    assert resolve(cache, ("org/flux", True), HF_ENDPOINT=address) == [whole]
    offline = resolve(cache, ("org/flux", True), HF_ENDPOINT=address, HF_HUB_OFFLINE="1")
    assert offline == [whole] and len(asked) == asked_so_far

    file = found / "vae" / "diffusion_pytorch_model.safetensors"
    file.unlink()  # a cache from which someone removed a file, or which a full disk cut short
    with pytest.raises(ConfigurationError, match=r"run `hf download org/flux vae/\S+ --force-down"):
        files.weight_files(files.component(found, "vae"))


def test_a_cache_written_by_hand_serves_offline(miniature, tmp_path):
    cache = tmp_path / "cache"
    repository = cache / "models--org--copied"
    shutil.copytree(miniature, repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    found, missing = resolve(cache, ("org/copied", True), ("org/other", True), HF_HUB_OFFLINE="1")
    assert found == ("folder", str(repository / "snapshots" / COMMIT))
    assert missing[0] == "error" and "HF_HUB_OFFLINE" in missing[1]
    # And where nobody answers at that address.
    found, missing = resolve(
        cache, ("org/copied", True), ("org/other", True), HF_ENDPOINT="http://127.0.0.1:9"
    )
    assert found == ("folder", str(repository / "snapshots" / COMMIT))
    assert missing[0] == "error" and "network connection" in missing[1]


def test_a_folder(folder):
    assert files.resolve_folder(str(folder)) == folder
    for name in files.COMPONENTS:
        assert files.component(folder, name) == folder / name
    shards = files.weight_files(folder / "transformer")
    assert shards == sorted((folder / "transformer").glob("*.safetensors")) and len(shards) == 4
    assert files.weight_files(folder / "vae") == [
        folder / "vae" / "diffusion_pytorch_model.safetensors"
    ]
    assert files.weight_files(folder / "text_encoder_2")[0].name == "model.safetensors"


@pytest.mark.parametrize("path", ["digit", "./nowhere", "/no/such/folder", "a/b/c", "~/nowhere/x"])
def test_neither_folder_nor_hub_id(path):
    with pytest.raises(ConfigurationError) as caught:
        files.resolve_folder(path)
    assert f"model.path is {path!r}" in str(caught.value)
    assert "model_index.json" in str(caught.value) and "FLUX.1-dev" in str(caught.value)


def test_another_folder_or_pipeline(folder):
    with pytest.raises(ConfigurationError, match=r"without model_index.*model\.transformer"):
        files.resolve_folder(str(folder / "transformer"))
    with pytest.raises(ConfigurationError, match="without model_index.json"):
        files.resolve_folder(str(folder / "vae"))
    with pytest.raises(ConfigurationError, match="no folder here"):
        files.resolve_folder(str(folder / "model_index.json"))
    index = folder / "model_index.json"
    index.write_text(index.read_text().replace("FluxPipeline", "FluxFillPipeline"))
    with pytest.raises(ConfigurationError, match="FluxFillPipeline.*expected a FluxPipeline"):
        files.resolve_folder(str(folder))
    index.write_text("{")
    with pytest.raises(ConfigurationError, match="model_index.json cannot be read"):
        files.resolve_folder(str(folder))
    index.write_text("[]")
    with pytest.raises(ConfigurationError, match="no JSON object"):
        files.resolve_folder(str(folder))


def test_missing_parts(folder):
    (folder / "vae" / "config.json").unlink()
    with pytest.raises(ConfigurationError, match="vae/config.json is missing.*hf download"):
        files.component(folder, "vae")
    (folder / "vae" / "diffusion_pytorch_model.safetensors").rename(folder / "vae" / "model.bin")
    with pytest.raises(ConfigurationError, match=r"vae has no weights \(it has \['model.bin'\]\)"):
        files.weight_files(folder / "vae")
    shard = files.weight_files(folder / "transformer")[1]
    shard.unlink()
    with pytest.raises(ConfigurationError, match=f"{shard.name} cannot be read.*hf download"):
        files.weight_files(folder / "transformer")


def truncate(file: Path, size: int) -> None:
    with file.open("r+b") as opened:
        opened.truncate(size)


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda file: truncate(file, file.stat().st_size - 1), "not downloaded or copied whole"),
        (lambda file: truncate(file, 0), "is empty"),
        (lambda file: truncate(file, 5), "no readable header"),
        (lambda file: truncate(file, 100), "no readable header"),
        (lambda file: file.write_bytes(b"PK\x03\x04" + bytes(1000)), "no readable header"),
        (lambda file: file.write_bytes((2).to_bytes(8, "little") + b"[]"), "no readable header"),
        (lambda file: file.write_bytes(file.read_bytes() + b"x"), "not downloaded or copied whole"),
        (
            lambda file: file.write_text("version https://git-lfs.github.com/spec/v1"),
            "git lfs pull",
        ),
        (
            lambda file: file.write_bytes(file.read_bytes().replace(b'"BF16"', b'"F32" ', 1)),
            "no readable header",
        ),
    ],
)
@pytest.mark.parametrize("component", ["transformer", "vae"])
def test_damaged_weights(folder, component, damage, expected):
    file = files.weight_files(folder / component)[-1]
    damage(file)
    with pytest.raises(ConfigurationError, match=expected) as caught:
        files.weight_files(folder / component)
    assert str(file) in str(caught.value)


def test_damaged_index(folder):
    index = folder / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    content = json.loads(index.read_text())
    places = content["weight_map"]
    shard = next(iter(places.values()))
    for change, expected in (
        ({**places, "nobody.has.this": shard}, f"{shard} holds 'nobody.has.this'"),
        ({**places, "x": "../../secret.safetensors"}, "expected one beside it"),
        ({**places, "x": "other.safetensors"}, "other.safetensors cannot be read"),
        ({}, "no weight_map"),
    ):
        index.write_text(json.dumps({**content, "weight_map": change}))
        with pytest.raises(ConfigurationError, match=expected):
            files.weight_files(folder / "transformer")
    index.write_text("{")
    with pytest.raises(ConfigurationError, match="index.json cannot be read"):
        files.weight_files(folder / "transformer")
