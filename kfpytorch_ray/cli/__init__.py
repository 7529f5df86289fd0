"""The command line ``kfpytorch-ray``: a launch from a shell, and what can be done with runs that go on without one.

A module for each group of commands; ``group`` puts them together. They say what the Python interface says
(``launch``, ``attach``, kfpytorch_ray.runs) and add nothing of their own but how it is typed and shown. ray and torch
are imported by the command that needs them, so that ``--help`` is quick.
"""
