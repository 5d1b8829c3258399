"""Zeoid beside ZEO, FileStorage and a bare socket, in one run. See docs/benchmarks.md."""
