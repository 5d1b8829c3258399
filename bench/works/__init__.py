"""The works that are measured, one module each, in the order of the tables."""

from bench.measure import Benchmark
from bench.works import blob, cache_hit, cache_open, commit1, commit16, copy, far, large, load, pack, prefetch

BENCHMARKS: dict[str, Benchmark] = {
    benchmark.name: benchmark
    for benchmark in (
        load.BENCHMARK, load.WITH_TLS, prefetch.BENCHMARK, cache_hit.BENCHMARK, cache_open.BENCHMARK,
        *far.BENCHMARKS, commit1.BENCHMARK, commit16.BENCHMARK, large.BENCHMARK, pack.BENCHMARK,
        blob.BENCHMARK, copy.BENCHMARK,
    )
}
