"""Head selection: scores every head against the teacher, chooses, writes the run's recipe, draws the pictures.

A host gives :class:`.samples.SelectionInputs`; :func:`.select.select_targets` does the rest.
"""
