"""ROSS, JARVIS and LaVer's Gram loss, for comparison. ``hera_objective`` finds them; nothing else imports them."""
