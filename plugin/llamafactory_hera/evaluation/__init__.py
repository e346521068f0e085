"""Evaluation with lmms-eval: benchmarks as suites, any output of ours as a model, the paper's table beside them."""
