"""SsCL (methods.md F): the method, and its state between steps."""
