"""What a storage server decides about transactions, without doing anything: events in, actions out.

Nothing in this package knows a socket, a thread, a clock or a log.
"""
