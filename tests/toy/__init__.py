"""A toy format, runtime and engine, added as CONTRIBUTING says: rows and modules, and no other file is touched."""
