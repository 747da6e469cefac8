"""A local Modal control plane, for the real and unmodified `modal` client and without an account.

A gRPC server speaks the part of the service that training and batch products use, and runs
functions in local containers with the entry point of the installed wheel. README.md says what it
emulates and what it does not.
"""
