"""Bytes thrown at all that reads bytes from a peer: `python -m tests.fuzz --seconds 60 --seed 1`.

`inputs` makes them from a seed, `targets` feeds them to the project and says what must hold, `worker` does
both in a process of its own with bounds on memory and time, and `run` starts it and names the input that
broke it.
"""
