"""The pure part: (event, now) in, answers and effects out. No clock, no I/O, no randomness."""
