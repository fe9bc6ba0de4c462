"""The roof: compile, the compiled module, train steps, and from a call to the program that serves it."""
