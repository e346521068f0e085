"""Which samples of a dataset a pass over a model looks at, and how they run."""
