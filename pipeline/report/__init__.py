"""Report a run: results.json, ledger, logs, progress, metrics and report.html."""
