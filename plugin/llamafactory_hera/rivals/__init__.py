"""ROSS and JARVIS, the objectives of other papers, which are found by name like any objective.

They reproduce those papers for comparison, and no more; the rest of the package never imports them.
"""
