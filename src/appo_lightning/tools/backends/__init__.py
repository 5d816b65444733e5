"""Other places where the Python tool's interpreters may run: a container, a service.

Each gives the tool what the local sandbox gives it: sockets that speak the frames of ``_sandbox.frames``.
"""
