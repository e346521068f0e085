"""Head selection: scores every head against the teacher, chooses, writes the run's recipe, draws the pictures.

The functions of a recipe are in :mod:`.api`. Nothing is imported here: the command line reads :mod:`.cli` alone.
"""
