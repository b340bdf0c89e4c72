"""`g2rpo compare`: methods at an equal budget of transformer evaluations, over several seeds.

    methods.py   what is compared: presets with a few keys changed, their runs and updates
    sweep.py     a key's value for each method, chosen by the trained reward
    workers.py   the runs, side by side, each an ordinary one that can be gone on with
    table.py     what came of them: means and standard errors over seeds
    terminal.py  the table as a terminal shows it
    pictures.py  the curves, and the last samples
    command.py   the command
"""
