"""Head selection: a host gives `samples.SelectionInputs`, and `select.select_targets` scores, chooses and writes."""
