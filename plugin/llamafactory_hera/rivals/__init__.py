"""Objectives of other papers, found by name like any objective: ROSS and JARVIS, with what only they need.

This shelf promises nothing beyond reproducing those papers for comparison; the rest of the package never imports it.
"""
