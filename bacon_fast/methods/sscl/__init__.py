"""SsCL (methods.md F): the method, and what it keeps between steps."""
