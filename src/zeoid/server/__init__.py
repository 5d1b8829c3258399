"""The storage server: connections in, what `commit` decides carried out on an engine, invalidations out."""
