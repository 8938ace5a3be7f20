"""Real vLLM engines with a model made on the spot, for the demo, the benchmarks and the tests."""
