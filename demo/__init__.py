"""The demo: one Zeoid storage server, three real Zope processes that share it. Run it with `make demo`."""
