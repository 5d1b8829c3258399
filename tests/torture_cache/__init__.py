"""A torture of the shared object cache: whoever is killed or stopped, every revision that is read is true.

Processes that share a small cache read and write objects at random through a real server, while they and the
server are killed, and stopped for a while, at random. Each writes down every revision that it read, and
where; in the end a client without a cache reads the whole history, and all of them are compared with it.

    worker      a process that shares the cache: what it does, and the journal that it leaves
    checker     journals against history
    run         who is killed and stopped, and when

The server, and what a port must be, are `tests.torture`'s.
"""
