"""Head selection: `select.select_targets` scores and chooses heads, given a host's `samples.SelectionInputs`."""
