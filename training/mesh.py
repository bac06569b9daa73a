"""One mesh (data, fsdp, tensor): which devices, how state is split over them, and how a step runs on all of them.

A step's micro-batches are numbered over all shards: with D = data × fsdp shards, D consecutive ones run at once, one on each. So what a step
computes doesn't depend on the number of devices but for the order of sums, and a run goes on with more or fewer of them. The loss and its
gradient run in `jax.shard_map` over (data, fsdp): every device runs the program of one device on its own micro-batch, weights are gathered at
their use and gradients scattered to their owners (ZeRO-3, arXiv 1910.02054). What `tensor` splits, and the optimizer, is XLA's partitioner's.
"""

import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from model.config import ModelConfig
from model.transformer import param_table
from soul.console import console
from soul.errors import UserError

AXES = ("data", "fsdp", "tensor")
SHARDS = ("data", "fsdp")  # a micro-batch for each pair of these
ROWS = P(SHARDS)  # of a batch's arrays, joined along their first axis
RULES = {"embed": "fsdp", "vocab": "tensor", "heads": "tensor", "kv_heads": "tensor", "mlp": "tensor"}  # a parameter's logical axis to ours
COMFORT = 0.5  # share of a device's memory that weights, gradients and optimizer may take; the rest is for activations
ENV = "SOULSMITH_DISTRIBUTED"


def join() -> None:
    """Become one of several processes when $SOULSMITH_DISTRIBUTED says so; all but process 0 are silent from then on.

    "HOST:PORT,PROCESSES,ID" is explicit; "auto" asks the cluster (Slurm, MPI, Kubernetes, Cloud TPU). To be called before JAX sees its devices.
    An environment variable and no flag: the command is the same on every machine, and so are the settings that it saves.
    Raises UserError when the variable is not of that form or the others cannot be reached.
    """
    if (spec := os.environ.get(ENV)) and not jax.distributed.is_initialized():
        try:
            where, count, this = (None, None, None) if spec == "auto" else spec.split(",")
            jax.distributed.initialize(where, count and int(count), this and int(this))
        except (ValueError, RuntimeError) as error:
            raise UserError(f"cannot join: {error}", where=f"{ENV}={spec}", fix="Write HOST:PORT,PROCESSES,ID or auto.") from None
        console.quiet = jax.process_index() > 0


def make_mesh(spec: str = "auto", *, accumulate: int = 1, state_bytes: int = 0) -> Mesh | None:
    """The mesh of "auto" or of sizes such as "data=2,fsdp=4" (others are 1), or None for one device.

    "auto" takes every device, splits the state (`state_bytes`: weights, gradients and optimizer) no finer than comfort asks and shards
    data over the rest. CPU devices of one process are the same cores, so there "auto" takes one.
    Raises UserError when the sizes don't multiply to the number of devices, or `accumulate` micro-batches don't divide among the shards.
    """
    devices = jax.devices()
    if spec != "auto":
        sizes = _sizes(spec, len(devices))
    elif devices[0].platform == "cpu" and jax.process_count() == 1:
        return None
    else:
        n = len(devices)
        if jax.process_count() == 1 and accumulate % n:
            n = max(d for d in range(1, n) if accumulate % d == 0)
            console.print(f"[yellow]training on {n} of {len(devices)} devices[/]: --accumulate {accumulate} does not divide among more")
        room = COMFORT * _memory(devices[0])
        fsdp = min((f for f in range(1, n + 1) if n % f == 0 and state_bytes / f <= room), default=n)
        sizes = {"data": n // fsdp, "fsdp": fsdp, "tensor": 1}
    shards = sizes["data"] * sizes["fsdp"]
    if accumulate % shards:
        raise UserError(f"--accumulate {accumulate} micro-batches a step do not divide among {shards} shards (data × fsdp)",
                        fix=f"Use a multiple of {shards}, with fewer --batch-rows if the step shall stay as large.")  # fmt: skip
    count = shards * sizes["tensor"]
    if count == 1:
        return None
    return jax.make_mesh(tuple(sizes.values()), AXES, (AxisType.Auto,) * 3, devices=devices[:count])


def _sizes(spec: str, devices: int) -> dict[str, int]:
    fix = f"Write sizes that multiply to {devices}, such as --mesh data={devices}, or auto."
    sizes = dict.fromkeys(AXES, 1)
    for part in spec.split(","):
        name, _, size = part.partition("=")
        if name.strip() not in AXES or not size.strip().isdecimal() or int(size) < 1:
            raise UserError(f"{part!r} is not {', '.join(AXES)}=SIZE", where=f"--mesh {spec}", fix=fix)
        sizes[name.strip()] = int(size)
    if (product := math.prod(sizes.values())) != devices and (product > 1 or jax.process_count() > 1):
        raise UserError(f"asks for {product} devices, here are {devices}", where=f"--mesh {spec}", fix=fix)
    return sizes


def _memory(device) -> int:
    stats = device.memory_stats() or {}
    return stats.get("bytes_limit") or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // jax.local_device_count()


@dataclass(frozen=True)
class Layout:
    """Where arrays live. Without a mesh every method does what one device needs, which is nothing or a plain `device_put`."""

    mesh: Mesh | None = None
    model: ModelConfig | None = None

    @property
    def shards(self) -> int:
        """How many micro-batches run at once."""
        return self.mesh.shape["data"] * self.mesh.shape["fsdp"] if self.mesh else 1

    @cached_property
    def _params(self) -> dict[tuple, tuple[tuple[int, ...], P]]:
        """Shape and split of each parameter by its path."""
        heads = {"heads": self.model.n_heads, "kv_heads": self.model.n_kv_heads}  # split between heads, never inside of one

        def axis(name, size):
            to = RULES.get(name)
            return to if to and heads.get(name, size) % self.mesh.shape[to] == 0 else None

        return {s.path: (s.shape, P(*map(axis, s.axes, s.shape))) for s in param_table(self.model)}

    def specs(self, tree: Any) -> Any:
        """A PartitionSpec for each leaf (array or ShapeDtypeStruct) of parameters, optimizer state or adapters.

        A leaf whose path holds a parameter's and that has its shape is split like it; another (a stack of matrices, an adapter) along the
        longest axis that `fsdp` divides.
        """

        def one(path, leaf):
            names = tuple(name for key in path if (name := _name(key)) != "value")
            for start, stop in combinations(range(len(names) + 1), 2):
                shape, spec = self._params.get(names[start:stop], (None, None))
                if shape == leaf.shape:
                    return spec
            fits = [axis for axis, size in enumerate(leaf.shape) if size % self.mesh.shape["fsdp"] == 0]
            longest = max(fits, key=lambda axis: leaf.shape[axis], default=None)
            return P(*("fsdp" if axis == longest else None for axis in range(len(leaf.shape))))

        return jax.tree_util.tree_map_with_path(one, tree)

    def shardings(self, tree: Any) -> Any:
        """The same as NamedShardings, for `jit` and for reading checkpoints; None without a mesh."""
        return jax.tree.map(lambda spec: NamedSharding(self.mesh, spec), self.specs(tree)) if self.mesh else None

    def put(self, tree: Any) -> Any:
        """Place parameters or optimizer state, which every process holds whole."""
        if not self.mesh:
            return tree

        def one(leaf, sharding):
            if isinstance(leaf, jax.Array) and leaf.sharding.is_equivalent_to(sharding, leaf.ndim):
                return leaf
            whole = np.asarray(leaf)
            return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])

        return jax.tree.map(one, tree, self.shardings(tree))

    def init(self, make: Callable, *args: Any) -> Any:
        """`make(*args)` compiled so that its result is born in its place: optimizer state, or parameters too large for one device."""
        return jax.jit(make, out_shardings=self.shardings(jax.eval_shape(make, *args)))(*args)

    def whole(self, tree: Any) -> Any:
        """The opposite of `put`, on this process's first device: for what knows no mesh, such as the sampler. Every process has to ask."""
        if not self.mesh:
            return tree
        copies = jax.jit(lambda tree: tree, out_shardings=NamedSharding(self.mesh, P()))(tree)
        return jax.tree.map(lambda x: x.addressable_data(0), copies)

    def local(self, numbers: Sequence[int]) -> list[int]:
        """Those of a step's micro-batches, a multiple of `shards`, that this process has to build."""
        if not self.mesh:
            return list(numbers)
        here, devices = jax.process_index(), self.mesh.devices.reshape(self.shards, -1)
        return [k for i, k in enumerate(numbers) if any(d.process_index == here for d in devices[i % self.shards])]

    def place(self, batches: Sequence[dict]) -> Iterator[dict]:
        """This process's batches to device batches, `shards` of them at a time joined along axis 0 of every array."""
        if not self.mesh:
            yield from map(jax.device_put, batches)
            return
        each, sharding = len(self.local(range(self.shards))), NamedSharding(self.mesh, ROWS)
        for at in range(0, len(batches), each):
            joined = jax.tree.map(lambda *parts: np.concatenate(parts), *batches[at : at + each])
            yield {
                name: jax.make_array_from_process_local_data(sharding, x, (len(x) // each * self.shards, *x.shape[1:]))
                for name, x in joined.items()
            }

    def fetch(self, x: jax.Array) -> np.ndarray:
        """An array joined along axis 0 as one numpy array per shard, on every process."""
        whole = multihost_utils.process_allgather(x, tiled=True) if jax.process_count() > 1 else np.asarray(x)
        return whole.reshape(self.shards, -1, *whole.shape[1:])

    # The rest is for the inside of a jitted program.

    def spread(self, function: Callable, inputs: tuple, outputs: Any) -> Callable:
        """`function` run on each shard's part: `inputs` and `outputs` are PartitionSpecs (prefixes of the trees)."""
        if not self.mesh:
            return function
        axes = set(SHARDS if self.mesh.shape["tensor"] > 1 else AXES)  # cuDNN's attention can't be lowered where XLA might still split it
        return jax.shard_map(function, mesh=self.mesh, in_specs=inputs, out_specs=outputs, axis_names=axes, check_vma=False)

    def parts(self, tree: Any) -> Any:
        """How `spread` splits parameters: `specs` without `tensor`, which stays XLA's within a shard."""
        if not self.mesh:
            return None
        split = SHARDS if self.mesh.shape["fsdp"] > 1 else ()
        return jax.tree.map(lambda spec: P(*(axis if axis in split else None for axis in spec)), self.specs(tree))

    def gathered(self, function: Callable, *specs: Any) -> Callable:
        """`function(*trees, batch)` of whole parameters as one of this shard's parts of them.

        The backward gathers again instead of keeping every weight of the model on every device from the forward on.
        """
        if not self.mesh:
            return function

        def gather(x, spec):
            return jax.lax.all_gather(x, "fsdp", axis=tuple(spec).index("fsdp"), tiled=True) if "fsdp" in spec else x

        def whole(*args):
            return function(*(jax.tree.map(gather, tree, spec) for tree, spec in zip(args, specs)), *args[len(specs) :])

        return jax.checkpoint(whole, policy=lambda primitive, *_, **__: primitive.name != "all_gather")

    def total(self, tree: Any) -> Any:
        """Sums over all shards."""
        return jax.lax.psum(tree, SHARDS) if self.mesh else tree

    def scattered(self, grads: Any, specs: Any) -> Any:
        """Sums of gradients over all shards; the transpose of the gather has summed over `fsdp` what is split along it."""
        if not self.mesh:
            return grads
        return jax.tree.map(lambda g, spec: jax.lax.psum(g, "data" if "fsdp" in spec else SHARDS), grads, specs)

    def stacked(self, tree: Any) -> Any:
        """Leaves of any rank, each shard's own, as what `ROWS` joins: how a pullback leaves `spread`."""
        return jax.tree.map(lambda x: x[None], tree) if self.mesh else tree

    def unstacked(self, tree: Any) -> Any:
        return jax.tree.map(lambda x: x[0], tree) if self.mesh else tree


ONE_DEVICE = Layout()


def _name(key) -> Any:
    """The plain name of one step of a pytree path."""
    return next((getattr(key, kind) for kind in ("key", "idx", "name") if hasattr(key, kind)), None)
