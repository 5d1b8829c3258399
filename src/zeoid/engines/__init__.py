"""Engines: what a storage server keeps its data in. Each adapts one kind of store to `zeoid.ports.Engine`."""
