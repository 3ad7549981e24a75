"""Scripts that call a library on a whole model, one for each engine of ``spec.libraries``.

They run in the library's own environment, whose Python may be older, and import neither quantmill's other modules nor
pydantic: a ``WholeRequest`` comes as a line of JSON on standard input, a ``WholeAnswer`` goes to standard output.
"""
