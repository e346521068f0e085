"""ROSS, JARVIS and LaVer's Gram loss, objectives of other papers, which ``hera_objective`` finds by name.

They exist only to reproduce those papers for comparison; the rest of the package never imports these modules.
"""
