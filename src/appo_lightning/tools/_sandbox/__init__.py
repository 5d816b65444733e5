"""Separate Python interpreters, cheap to start: a fork server and the sessions that it forks.

``client`` runs in the trainer. ``server`` and ``session`` run in the interpreter processes, as does what they import:
``frames``, ``limits``, ``processes``. Those five import the standard library only, and nothing of this package by
its name: the interpreters never load the trainer's code.
"""
