"""The works that are measured, one module each, in the order of the tables."""

from bench.measure import Benchmark
from bench.works import blob, cache_hit, commit1, commit16, copy, large, load, pack, prefetch

BENCHMARKS: dict[str, Benchmark] = {
    module.BENCHMARK.name: module.BENCHMARK
    for module in (load, prefetch, cache_hit, commit1, commit16, large, pack, blob, copy)
}
