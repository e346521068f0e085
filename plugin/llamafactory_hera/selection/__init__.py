"""Head selection: `resolve.select_targets` scores and chooses heads of the `samples.SelectionInputs` of a host."""
