"""Strictness for every test (after equinox's conftest): silent promotion, broadcasting and warnings are errors."""

import os

os.environ.setdefault("SOULSMITH_HOME", os.path.expanduser("~/.cache/soulsmith"))
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"

import jax
from hypothesis import HealthCheck, settings

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_compilation_cache_dir", os.path.join(os.environ["SOULSMITH_HOME"], "jax-tests"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)

settings.register_profile(
    "soulsmith", deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)
settings.load_profile("soulsmith")
