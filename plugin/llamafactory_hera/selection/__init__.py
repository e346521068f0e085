"""Head selection: a host gives `samples.SelectionInputs`, and `resolve.select_targets` scores, chooses and writes."""
