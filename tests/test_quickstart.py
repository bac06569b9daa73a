"""The whole loop has a pulse: quickstart through its command, on a two-layer model made here."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

import quickstart
from model.config import ModelConfig
from model.transformer import param_table
from soul.rows import write_rows
from soul.spec import load_soul

ROOT = Path(__file__).parent.parent
CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<extra_{n}>" for n in range(17))]
SMALL = ["--chat-seeds", "2", "--rollouts", "8", "--sft-tokens", "900", "--dpo-tokens", "900", "--prompts", "6", "--loops", "1", "--own-replies", "6"]  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A Hugging Face directory with ChatML control tokens and random weights."""
    path = tmp_path_factory.mktemp("base")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=1500, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=CONTROL, show_progress=False
    )
    tokenizer.train([json.__file__, os.__file__, subprocess.__file__, str(ROOT / "soul" / "SOUL.md")], trainer)
    tokenizer.save(str(path / "tokenizer.json"))
    config = ModelConfig(tokenizer.get_vocab_size(), d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, d_head=8, d_ff=64, max_len=4096)
    rng = np.random.default_rng(0)
    weights = {}
    for spec in param_table(config):
        shape = spec.shape[::-1] if spec.transpose else spec.shape
        weights[spec.hf] = (np.ones(shape) if len(shape) == 1 else rng.normal(0, 0.05, shape)).astype(np.float32)
    save_file(weights, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(config.to_hf()))
    return path


def command(out: Path, base: Path, *more: str) -> list[str]:
    flags = ["--out", str(out), "--base", str(base), "--teacher", f"local:{base}", *SMALL, *more]
    return [sys.executable, str(ROOT / "soulsmith.py"), "quickstart", *flags]


def test_from_soul_to_report_stopped_and_resumed(tmp_path, base):
    out = tmp_path / "run"
    environment = {**os.environ, "GLIBC_TUNABLES": ""}
    process = subprocess.Popen(
        command(out, base), cwd=ROOT, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, start_new_session=True
    )
    while process.poll() is None and not (out / "data" / "rollouts_preference.parquet").exists():
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to every process of the group
    error = process.communicate()[1]
    assert process.returncode == 130 and f"soulsmith quickstart --config {out / 'quickstart.json'}" in error, error
    assert "Traceback" not in error

    # what random weights draft and reply depends on the machine's last bits; that there are pairs must not
    shutil.copy(out / "data" / "rollouts_preference.parquet", out / "data" / "preference.parquet")
    resume = [sys.executable, str(ROOT / "soulsmith.py"), "quickstart", "--config", str(out / "quickstart.json")]
    done = subprocess.run(resume, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "generate, critique, revise: done before" in done.stderr
    stages = {entry["name"]: entry for entry in json.loads((out / "stages.json").read_text())}
    assert list(stages) == ["seeds", "generate", "convert", "sft", "on-policy", "dpo", "eval", "report"] and all(
        entry["done"] for entry in stages.values()
    )
    first = json.loads((out / "dpo" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["margin"] == 0 and first["accuracy"] == 0.5  # policy and reference are one model
    assert {path.stem for path in (out / "evals").glob("*.json")} == {"base", "base-chat", "sft", "dpo"}
    assert "moss" in (out / "report.html").read_text() and (out / "report.md").exists()

    again = subprocess.run(resume, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert again.returncode == 0 and again.stderr.count("done before") == len(stages)


def test_without_a_pair_preference_tuning_is_left_out(tmp_path, base, capsys):
    config = quickstart.Config(out=tmp_path, base=str(base), teacher=f"local:{base}")
    for name in ("preference", "on_policy_preference"):
        write_rows(tmp_path / "data" / f"{name}.parquet", [], "preference")
    (stage,) = [stage for stage in quickstart.stages(config, load_soul(config.soul)) if stage.name == "dpo"]
    assert stage.run() == 0 and "no preference pairs" in capsys.readouterr().err and not (tmp_path / "dpo").exists()
