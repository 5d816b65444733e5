"""Separate Python interpreters, cheap to start: a fork server and the sessions that it forks, behind walls.

``client`` runs in the trainer, with what it imports: ``layout``, ``protections``, ``files``, ``frames``, ``limits``.
``server`` and the rest run in the interpreter processes. Those import the standard library only, and nothing of this
package by its name: the interpreters never load the trainer's code.

The walls: ``namespaces``, ``landlock``, ``seccomp``, ``limits``; ``walls`` puts them up in order, ``probe`` tries them.
"""
