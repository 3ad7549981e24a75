"""The workers' side: what a stage of a job does, on the machine that runs it."""

from workers.spec import plugins

# Rows that plugins add are there before anything looks for them, in every process.
plugins.load()
