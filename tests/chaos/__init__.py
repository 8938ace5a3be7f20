"""Chaos: faults at random, in real engines under load, and what must hold all the while.

    python -m tests.chaos --seconds 120 --seed 1

An arena has NATS, registries and nodes; load asks the nodes; a schedule strikes with faults; and
judges count what is wrong, what is late, what leaks, and how long everyone takes to agree again.
"""
