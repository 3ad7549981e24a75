"""Decide which stages run where and when (the scheduler), and run them on a cluster."""
