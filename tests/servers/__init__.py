"""Servers for tests: real ones started on private sockets and ports, and scripted fakes that misbehave."""
