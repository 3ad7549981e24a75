"""What became of a run: results, ledger, logs, ``report.html``."""
