"""The torture test: one server, eight client processes with three threads each, and `kill -9` for all.

    make torture                        ten minutes
    make torture SEED=7 SECONDS=60      the random choices of a run seen before, for a minute

A server process has two data files, "1" and "2". Clients do random transactions on both: counters that
resolve conflicts and counters that don't, keys of a shared BTree, objects of a thread's own, pairs that span
both files, and transactions that are given up. Each writes down what it is about to do, and what became of
it. Clients and server are killed again and again. In the end `checker` compares what was written down with
what stock ZODB finds in the files.

The seed drives every choice that the harness makes: what each thread does and in which order, the waits of
its retries, whom a kill hits and after how long, the kind of socket. It does not drive the scheduling of
processes and threads, nor how far each has come when a kill arrives, so the same seed is the same torture but
not the same run.

What no test can ask for: ZODB has no recovery across databases. When a client or the server dies between the
two finishes of a transaction that spans both files, one has it and the other doesn't. Such torn pairs are
counted, and only transactions whose outcome nobody knows may be torn.
"""
