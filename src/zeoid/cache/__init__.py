"""Object caches on the client's side, behind `zeoid.ports.ObjectCache`."""
