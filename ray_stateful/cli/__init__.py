"""The command `ray-stateful`: thin commands that turn arguments into calls, and results into text or JSON.

Exit codes: 0, all is well; 1, the command did its work and found something (damage, differences, an orphan that could
not be deleted); 2, it could not do its work, and one line says why and what to do; 130, it was interrupted; 141, the
reader of its output closed the pipe.
"""
