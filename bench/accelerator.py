"""What training's programs do on an accelerator, measured there, or read from what XLA compiles for one that is not here.

    python bench/accelerator.py --device here --depths 12 20                 # on the GPU or TPU itself: seconds, MFU, peak memory
    python bench/accelerator.py --device h200 --depths 12 20                 # anywhere, with jax[cuda12] of the same version installed
    python bench/accelerator.py --device h200 --mesh 2,4,1 --depths 12       # eight of them: data, fsdp, tensor
    python bench/accelerator.py --device v5e --depths 12 --rows 4            # anywhere, with libtpu installed (a minute a program)

For `h200` it prints which attention kernels are in the program, the memory that XLA planned, and a bound on MFU: every kernel takes its FLOPs over
the peak or its bytes over the bandwidth, whichever is longer (`roof`: at the published numbers; `likely`: at 70 % of the peak and 85 % of the
bandwidth). Launches, and bytes that stay in the L2 cache, count for nothing. XLA cannot try its kernels without the device: products are cuBLAS's here.
"""

import os
import re
import sys
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).parent.parent))

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, SingleDeviceSharding

from model import attention
from model.config import ModelConfig
from model.transformer import Decoder
from training import depth as dials
from training import losses
from training.data import Packed, as_batch
from training.fit import TrainState, updater
from training.losses import Preference
from training.mesh import AXES, ROWS, Layout
from training.muon import muon_adamw
from training.optim import OptimConfig, adamw
from training.planner import PEAKS, flops_per_token, planned, random_items, size
from training.programs import Programs, plain_logprobs, plain_nll


@dataclass(frozen=True)
class Config:
    """Compile or time one micro-batch and one update."""

    device: Literal["here", "h200", "v5e"] = "here"
    stage: Literal["pretrain", "sft", "dpo"] = "pretrain"
    """pretrain: models of --depths; sft, dpo: SmolLM2-135M, rows packed with segments."""
    depths: tuple[int, ...] = (12, 20)
    rows: int = 16
    """Rows per micro-batch (dpo: pairs)."""
    length: int = 2048
    vocab: int = 32_768
    mesh: str = "1,1,1"
    """Sizes of data, fsdp and tensor (h200, v5e)."""
    attention: Literal["fast", "xla"] = "fast"
    """xla: without the accelerator's own kernel, to see what it is worth."""
    steps: int = 10


CONFIG = tyro.cli(Config)
SMOLLM = ModelConfig(vocab_size=49_160, d_model=576, n_layers=30, n_heads=9, n_kv_heads=3, d_head=64, d_ff=1536, tied=True)
BANDWIDTH = 4.8e12  # bytes/s of an H200
H200 = """gpu_device_info { threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
memory_bandwidth: 4800000000000 l2_cache_size: 62914560 clock_rate_ghz: 1.98 device_memory_size: 150109880320 shared_memory_per_block_optin: 232448
cuda_compute_capability { major: 9 } registers_per_core_limit: 65536 registers_per_block_limit: 65536 } platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 } runtime_version { major: 12 minor: 9 } device_description_str: "NVIDIA H200" """


def devices() -> list:
    """The accelerator's, or ones that can only be compiled for; then the code is told that it runs there."""
    if CONFIG.device == "here":
        return jax.devices()
    jax.config.update("jax_platforms", "cpu")
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-8", "TPU_WORKER_HOSTNAMES": "localhost"}
    if CONFIG.device == "v5e":
        found, backend, fast = absent("v5e:2x4", "tpu"), "tpu", attention.by_splash
    else:
        os.environ["XLA_FLAGS"] = "--xla_gpu_enable_triton_gemm=false"
        from jax._src.cudnn import fused_attention_stablehlo as cudnn  # its questions to the device, answered as an H200 would

        cudnn.check_cudnn_version, cudnn.check_compute_capability = lambda: 91_000, lambda _: True
        cudnn.is_cuda_compute_capability_equal = lambda capability: capability == "9.0"
        count = np.prod([int(n) for n in CONFIG.mesh.split(",")])
        found = absent("h200", "cuda", target_config=H200, topology=f"1x1x{count}")
        backend, fast = "gpu", attention.by_cudnn
    jax.default_backend = lambda: backend
    attention.fast_attention = lambda *_: fast
    return found


def absent(name: str, platform: str, **how) -> list:
    """Devices that are not here."""
    try:
        return topologies.get_topology_desc(name, platform, **how).devices
    except RuntimeError as error:  # jax has no type of its own for a plugin that is not installed
        sys.exit(
            f"cannot compile for {CONFIG.device} here: {str(error).splitlines()[0]}\nInstall jax[cuda12] (h200) or libtpu (v5e) for this jax."
        )


@dataclass(frozen=True)
class Work:
    """One micro-batch's gradient and one update: programs, abstract arguments, and how many real tokens there are."""

    model: ModelConfig
    programs: Programs
    update: object
    state: TrainState
    batch: dict
    tokens: float
    rate: float
    """Model FLOPs per token."""


def work(layers: int, where) -> Work:
    """At `layers` layers; `where` is a Layout with a mesh, or a device."""
    if CONFIG.stage == "pretrain":
        plan = dials.dial(CONFIG.depths[0] if layers in (4, 8) else layers, CONFIG.vocab, length=CONFIG.length, batch_rows=CONFIG.rows)
        model, tokens = replace(plan.model, n_layers=layers), CONFIG.rows * CONFIG.length
        optimizer = muon_adamw(plan.rates, plan.steps, "bf16")
        batch = as_batch(np.random.default_rng(0).integers(0, CONFIG.vocab, (CONFIG.rows, CONFIG.length + 1)), CONFIG.rows)
    else:
        paired = CONFIG.stage == "dpo"
        model, optimizer = replace(SMOLLM, n_layers=layers, max_len=CONFIG.length), adamw(OptimConfig(), 1000)
        packed = Packed.build(random_items(paired, CONFIG.length // 4, 8 * CONFIG.rows, 0.4, 49_152), CONFIG.length, CONFIG.rows, 0)
        batch, tokens = packed.block(0), packed.tokens / len(packed.blocks)
        if paired:
            batch |= {"reference": np.zeros(packed.supervised, np.float32)}
    graph, params = nnx.split(nnx.eval_shape(lambda: Decoder(model, compute="bf16")))
    layout = replace(where, model=model) if isinstance(where, Layout) else Layout()
    loss = Preference() if CONFIG.stage == "dpo" else losses.nll
    programs = Programs(plain_logprobs(graph), loss, CONFIG.stage != "dpo", layout, plain_nll(graph))
    state = TrainState(params, jax.eval_shape(optimizer.init, params))

    def placed(x, sharding):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    if layout.mesh:
        state = jax.tree.map(placed, state, layout.shardings(state))
        split = NamedSharding(layout.mesh, ROWS)
        shapes = {name: placed(jax.ShapeDtypeStruct((layout.shards * len(x), *x.shape[1:]), x.dtype), split) for name, x in batch.items()}
    else:
        one = SingleDeviceSharding(where)
        state, shapes = (jax.tree.map(lambda x: placed(x, one), tree) for tree in (state, batch))
    return Work(model, programs, updater(optimizer, layout.shardings(state)), state, shapes, tokens, flops_per_token(model, batch, tokens))


def memory(this: Work) -> tuple[int, list]:
    """Bytes at the peak beside the state, and the programs of a gradient. Probe.memory's rule, but each abstract argument says its device:
    without, XLA would compile for the CPU."""
    p, params, batch = this.programs, this.state.params, this.batch
    value, grads = jax.eval_shape(p.gradients, params, None, batch)
    grads = jax.tree.map(lambda g, like: jax.ShapeDtypeStruct(g.shape, g.dtype, sharding=like.sharding), grads, params)
    if p.fused:
        peak, parts = planned(p.whole, params, None, batch), [(p.whole, (params, None, batch))]
    else:
        logp, pullback = jax.eval_shape(p.forward, params, None, batch)
        logp, pullback = (
            jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=batch["ids"].sharding), x) for x in (logp, pullback)
        )
        peak = max(planned(p.forward, params, None, batch), size(pullback) + planned(p.backward, params, pullback, logp))
        parts = [(p.forward, (params, None, batch)), (p.backward, (params, pullback, logp))]
    return max(peak, size(grads) + planned(this.update, this.state, grads, value)), parts


# ---- a compiled program's text


BYTES = {"f32": 4, "bf16": 2, "s32": 4, "u32": 4, "pred": 1, "s8": 1, "u8": 1, "u16": 2}


def shapes(text: str) -> list[tuple[str, list[int]]]:
    return [(kind, [int(n) for n in dims.split(",") if n]) for kind, dims in re.findall(r"(\w+)\[([\d,]*)\]", text)]


def nbytes(text: str) -> int:
    return sum(BYTES.get(kind, 0) * int(np.prod(dims)) for kind, dims in shapes(text))


def computations(text: str) -> tuple[dict[str, list], str]:
    """Instructions (name, type, operation, the rest) of each computation, and which is the entry."""
    found, entry, now = {}, "", ""
    for line in text.splitlines():
        line = re.sub(r"/\*index=\d+\*/", "", line)
        if (head := re.match(r"(ENTRY )?%?([\w.\-]+) .*->.*\{\s*$", line)) and not line.startswith(" "):
            now = head[2]
            found[now], entry = [], now if head[1] else entry
        elif row := re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$", line):
            found[now].append(row.groups())
    return found, entry


def kernels(found: dict, name: str, attention_flops: float, times: int = 1):
    """(FLOPs, bytes) of each kernel that a computation starts; loops count as often as they run."""
    types = {n: kind for n, kind, _, _ in found[name]}
    for _, kind, operation, rest in found[name]:
        if operation in ("parameter", "tuple", "get-tuple-element", "bitcast", "constant"):
            continue
        if operation == "while":
            body, trips = re.search(r"body=%?([\w.\-]+)", rest)[1], re.search(r'known_trip_count":\{"n":"(\d+)"', rest)
            yield from kernels(found, body, attention_flops, times * int(trips[1] if trips else 1))
            continue
        given = [types[n] for n in re.findall(r"%([\w.\-]+)", rest.split("), ")[0]) if n in types]
        flops = 0.0
        if "cublas" in rest:
            contracted = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', rest)[1]
            left = shapes(given[0])[0][1]
            flops = 2.0 * np.prod(shapes(kind)[0][1]) * np.prod([left[int(n)] for n in re.findall(r"\d+", contracted)])
        elif "fmha" in rest:
            flops = attention_flops * (2.5 if "Backward" in rest else 1)
        yield times * flops, times * (nbytes(kind) + sum(map(nbytes, given)))


def report(layers: int, where) -> None:
    this = work(layers, where)
    need, parts = memory(this)
    texts = [program.lower(*args).compile().as_text() for program, args in parts]
    names = Counter(name for text in texts for name in re.findall(r'custom_call_target="([^"]*(?:fmha|tpu_custom)[^"]*)"', text))
    state, shards = size(this.state), this.programs.layout.shards
    split = f" over {this.programs.layout.mesh.size} devices" if this.programs.layout.mesh else ""
    print(
        f"{CONFIG.stage}, {layers} layers, {CONFIG.rows} × {CONFIG.length}: state {state / 1e9:.2f} GB{split}, beside it {need / 1e9:.2f} GB a device"
    )
    print("  attention kernels:", ", ".join(f"{count} {name}" for name, count in names.items()) or "none")
    if CONFIG.stage == "pretrain" and layers == CONFIG.depths[0] > 8 and not split:
        low, high = (memory(work(n, where))[0] for n in (4, 8))
        guess = low + (high - low) * (layers - 4) / 4
        off = (guess + state) / (need + state) - 1
        print(f"  the planner, from 4 and 8 layers: {guess / 1e9:.2f} GB beside the state, {off:+.1%} of all")
    if CONFIG.device == "h200":
        peak, limits = PEAKS["H200"] * 1e12, ((1, 1), (0.7, 0.85))

        def seconds(found: list) -> list[float]:
            return [sum(max(f / (peak * p), b / (BANDWIDTH * w)) for f, b in found) for p, w in limits]

        heads, t = this.model.n_heads // (this.programs.layout.mesh.shape["tensor"] if split else 1), CONFIG.length
        rows = this.batch["ids"].shape[0] // shards
        found = [k for text in texts for k in kernels(*computations(text), 2 * rows * heads * t * t * this.model.d_head)]
        flops, moved = (sum(k[i] for k in found) for i in (0, 1))
        roof, likely = seconds(found)
        value, grads = jax.eval_shape(this.programs.gradients, this.state.params, None, this.batch)
        update = seconds(list(kernels(*computations(this.update.lower(this.state, grads, value).compile().as_text()), 0)))
        useful = this.rate * this.tokens / (1 if not split else this.programs.layout.mesh.shape["tensor"])
        print(f"  {useful / 1e12:.1f} TFLOP of the model, {flops / 1e12:.1f} in products, {moved / 1e9:.0f} GB moved in {len(found)} kernels: "
              f"roof {1e3 * roof:.0f} ms, {useful / peak / roof:.0%} MFU; likely {1e3 * likely:.0f} ms, {useful / peak / likely:.0%} MFU; an update {1e3 * update[1]:.1f} ms")  # fmt: skip


def measure(layers: int) -> None:
    """On the device itself: medians of --steps micro-batches and updates, and the peak that the device reports."""
    this = work(layers, jax.devices()[0])
    rng = np.random.default_rng(0)

    def real(x):
        value = rng.integers(0, 2, x.shape) if jnp.issubdtype(x.dtype, jnp.integer) else rng.normal(0, 0.02, x.shape)
        return jax.device_put(jnp.asarray(value, x.dtype))

    state, batch = jax.tree.map(real, this.state), jax.tree.map(real, this.batch)
    took = []
    for _ in range(CONFIG.steps + 2):
        marks = [time.perf_counter()]
        value, grads = jax.block_until_ready(this.programs.gradients(state.params, None, batch))
        marks.append(time.perf_counter())
        state, _ = jax.block_until_ready(this.update(state, grads, value))
        took.append(np.diff([*marks, time.perf_counter()]))
        del grads
    gradient, update = np.median(took[2:], axis=0)
    kind = jax.devices()[0].device_kind
    peak = next((p for name, p in PEAKS.items() if name in kind), None)
    mfu = f", {this.rate * this.tokens / gradient / peak / 1e12:.1%} MFU of a micro-batch" if peak else ""
    most = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)
    need = memory(this)[0] + size(state)
    print(f"{kind}: {CONFIG.stage}, {layers} layers, {CONFIG.rows} × {CONFIG.length}: {1e3 * gradient:.1f} ms a micro-batch, {1e3 * update:.1f} ms an update, "
          f"{this.tokens / gradient:,.0f} tokens/s{mfu}; memory planned {need / 1e9:.2f} GB, peak {most / 1e9:.2f}; "
          f"fast attention: {attention.fast_attention(jax.default_backend(), this.model.d_head, 'segments' in batch)}")  # fmt: skip


def main() -> None:
    found = devices()
    if CONFIG.attention == "xla":
        attention.fast_attention = lambda *_: None
    sizes = [int(n) for n in CONFIG.mesh.split(",")]
    where = found[0]
    if (count := int(np.prod(sizes))) > 1:
        where = Layout(Mesh(np.array(found[:count]).reshape(sizes), AXES, axis_types=(AxisType.Auto,) * 3))
    for layers in CONFIG.depths if CONFIG.stage == "pretrain" else (SMOLLM.n_layers,):
        measure(layers) if CONFIG.device == "here" else report(layers, where)


main()
